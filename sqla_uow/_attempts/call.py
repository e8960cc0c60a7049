"""One call: what it was told, what is around it, and how far it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic

from sqlalchemy.ext.asyncio import AsyncSession
from typing_extensions import TypeVar

from sqla_uow._scope.lookup import surroundings
from sqla_uow._session.instances import taint
from sqla_uow._settings.sources import Sources
from sqla_uow._transaction.tainted import Tainted
from sqla_uow.events import Call as Key

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine
    from types import FrameType

    from sqlalchemy.orm import Session

    from sqla_uow._databases.failures import Failure
    from sqla_uow._retry.groups import Groups
    from sqla_uow._scope.read_session import ReadSession
    from sqla_uow._transaction.times import Times
    from sqla_uow._transaction.transaction import Transaction
    from sqla_uow._unit.options import Options
    from sqla_uow._unit.setup import Setup
    from sqla_uow.typing import IsolationLevel

__all__ = ["Call", "before_first_attempt"]

S = TypeVar("S", bound=AsyncSession, default=AsyncSession)


before_first_attempt: list[Callable[[Call[Any], Callable[[], Coroutine[Any, Any, object]]], Awaitable[None]]] = []
"""Awaited before the first attempt of each transactional function, with its call and what runs its body."""


class Call(Generic[S]):
    """What the attempts of one call have in common; each of them takes note here of what the next one must know.

    Args:
        setup: of the manager.
        options: of the function or block; what they leave open is the manager's.
        function: whose calls take turns with this one; None is that of the options.
    """

    __slots__ = (
        "attempt", "called", "deadline", "enclosing", "function", "given_up", "groups", "isolation", "key", "more", "observers",
        "options", "policy", "reading", "retries", "scope", "setup", "sources", "started", "tainted", "timeout", "times",
    )  # fmt: skip

    def __init__(self, setup: Setup[S], options: Options, function: object = None) -> None:
        self.setup = setup
        self.options = options
        self.isolation: IsolationLevel | None = options.isolation or setup.isolation
        self.policy = options.retry or setup.retry
        self.retries = setup.retries if options.retries is None else options.retries
        self.timeout = setup.timeout if options.timeout is None else options.timeout
        # The clock is read once per call, and again only on trouble.
        self.started = self.policy.clock()
        self.deadline = None if self.timeout is None else self.started + self.timeout
        self.attempt = 0
        self.more = True
        self.function = function or options  # whose calls take turns with this one
        self.groups: Groups | None = None  # if it may be run again, and takes turns
        self.given_up: Failure | None = None
        self.called: tuple[Any, ...] | None = None  # the fields of a `Called`, which takes longer to make
        self.reading: ReadSession | None = None
        self.tainted: Tainted | None = None
        self.times: Times | None = None
        self.scope, inside, self.enclosing = surroundings(setup)
        self.observers = setup.observers
        self.sources = setup.sources
        if self.scope is not None:
            if (
                not inside
            ):  # only an outermost call ends the scope's reading; around an inner one the outer unit guards its objects
                self.reading = self.scope.reading
            self.tainted = self.scope.reading.tainted
            self.observers += self.scope.observers
            self.sources = self.scope.sources
        if options.settings is not None:
            setup.database.system.check_settings(who=options.who)
            self.sources = (self.sources or Sources()).under(options.settings, options.who)
        self.key: Key | None = Key() if self.observers else None

    @property
    def elapsed(self) -> float:
        return self.policy.clock() - self.started

    def will_go_on(self, frame: FrameType) -> bool:  # noqa: ARG002  # the decorator's own loop always does
        """Say whether the frame that leaves the attempt will ask for the next one."""
        return True

    def remember(self, transaction: Transaction, session: Session) -> None:
        """Remember the objects of a failed attempt: a new one keeps its key, a loaded one has lost its changes."""
        if self.tainted is None or (self.scope is not None and self.tainted is self.scope.reading.tainted):
            self.tainted = Tainted() if self.tainted is None else self.tainted.copy()
        taint(transaction, session, self.tainted, "attempt")
