"""Frames inside an open unit: joined calls and savepoints."""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, Generic

from sqlalchemy.ext.asyncio import AsyncSession
from typing_extensions import TypeVar

from sqla_uow._databases.interrupt import break_link
from sqla_uow._log import log
from sqla_uow._retry.predicates import ask
from sqla_uow._session.session import has_changes
from sqla_uow._settings.preamble import check_join
from sqla_uow._tasks.shield import shielded
from sqla_uow._unit.ending import wait_briefly
from sqla_uow.errors import PropagationError

if TYPE_CHECKING:
    from types import TracebackType

    from sqlalchemy.orm import SessionTransaction

    from sqla_uow._transaction.transaction import Transaction
    from sqla_uow._unit.options import Options
    from sqla_uow._unit.unit import UnitOfWork

__all__ = ["Joined", "Nested", "join", "joinable"]

S = TypeVar("S", bound=AsyncSession, default=AsyncSession)

SAVEPOINT_SECONDS = 5.0
"""How long rolling back a savepoint may take after a cancellation; the unit's own end cleans up what is left."""


class Joined(Generic[S]):
    """A call that runs in the unit that is open: sends nothing of its own, but flushes at its end."""

    __slots__ = ("_options", "_transaction", "_unit")

    def __init__(self, unit: UnitOfWork[S], transaction: Transaction, options: Options) -> None:
        self._unit = unit
        self._transaction = transaction
        self._options = options

    async def __aenter__(self) -> UnitOfWork[S]:
        transaction, options = self._transaction, self._options
        transaction.owner.check()
        transaction.check_join(options.who, options.isolation, read_only=options.read_only)
        if transaction.preamble is not None or options.settings is not None:
            check_join(transaction.preamble, options.settings, options.who, transaction.name)
        transaction.joined += 1
        if options.retries:
            log(
                logging.DEBUG, "%s joins %s, which alone retries", options.who, transaction.name,
                function=options.who, joins=transaction.name,
            )  # fmt: skip
        return self._unit

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        transaction = self._transaction
        transaction.joined -= 1
        if error is None:
            try:
                await flush(transaction)
            except BaseException as raised:
                transaction.doom.mark(raised)
                self.choose(raised)
                raise
        else:
            transaction.doom.mark(error)
            self.choose(error)

    def choose(self, error: BaseException) -> None:
        """Ask the call's own `retry_on` whether the owner of the unit should run it again."""
        retry_on, who = self._options.retry_on, self._options.who
        if retry_on is not None and isinstance(error, Exception) and ask(retry_on, f"retry_on of {who}", error):
            self._transaction.chosen = error


async def flush(transaction: Transaction) -> None:
    """Send what is pending, so that its errors surface here."""
    session = transaction.session
    if session is not None and has_changes(session.sync_session):
        await session.flush()


def joinable(unit: UnitOfWork[S] | None, options: Options, manager: str) -> UnitOfWork[S] | None:
    """Return the open unit if a call joins it, None if the call begins one of its own.

    Args:
        unit: the one that is open here, if any.
        options: of the call.
        manager: the name of the unit's.

    Raises:
        PropagationError: there is one and must not be, or the other way round.
    """
    propagation = options.propagation
    if propagation in ("required", "nested"):
        return unit
    if unit is None and propagation == "mandatory":
        raise PropagationError(
            f"{options.who} must join a unit of manager {manager!r}, but none is open; call it from a "
            "transactional function, or drop propagation='mandatory'"
        )
    if unit is not None and propagation == "durable":
        raise PropagationError(
            f"{options.who} must be outermost to be durable, but was called inside {unit._transaction.name}; "
            "call it after the outer one, or drop propagation='durable'"
        )
    return unit if propagation == "mandatory" else None


def join(unit: UnitOfWork[S], options: Options) -> Joined[S] | Nested[S]:
    """Return the frame of a call that does not begin a unit of its own."""
    transaction = unit._transaction
    nested = options.propagation == "nested"
    return Nested(unit, transaction, options) if nested else Joined(unit, transaction, options)


class Nested(Generic[S]):
    """A savepoint in the unit that is open: rolled back alone when its body fails, unless the failure is a conflict."""

    __slots__ = ("_joined", "_savepoint", "_transaction", "_unit")

    def __init__(self, unit: UnitOfWork[S], transaction: Transaction, options: Options) -> None:
        self._joined = Joined(unit, transaction, options)
        self._unit = unit
        self._transaction = transaction
        self._savepoint: SessionTransaction | None = None

    async def __aenter__(self) -> UnitOfWork[S]:
        unit = await self._joined.__aenter__()
        try:
            self._savepoint = await unit.session.run_sync(lambda session: session.begin_nested())
        except BaseException:
            self._transaction.joined -= 1
            raise
        return unit

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        unit, savepoint = self._unit, self._savepoint
        assert savepoint is not None
        self._transaction.joined -= 1
        if error is None:
            try:
                self._transaction.check_usable()
                await unit.session.run_sync(lambda _: savepoint.commit())
            except BaseException as raised:
                await self._roll_back(savepoint)
                self._joined.choose(raised)
                raise
        else:
            await self._roll_back(savepoint)
            self._joined.choose(error)

    async def _roll_back(self, savepoint: SessionTransaction) -> None:
        """Roll back to the savepoint; its own trouble never hides why."""

        def undo(_session: object) -> None:
            if savepoint.is_active or savepoint.session.get_nested_transaction() is savepoint:
                savepoint.rollback()

        outcome = await shielded(partial(self._unit.session.run_sync, undo), limit=SAVEPOINT_SECONDS)
        transaction = self._transaction
        if not outcome.task.done():
            reason = f"rolling back a savepoint in it took more than {SAVEPOINT_SECONDS:g} s"
            transaction.doom.mark(None, hard=True, reason=reason)  # at once: the caller may go on
            if not break_link(transaction.connection):
                outcome.stop()
            await wait_briefly(outcome.task)
        elif (trouble := outcome.trouble) is not None:
            # MariaDB has rolled back everything at a deadlock: 1305, SAVEPOINT does not exist.
            transaction.doom.mark(trouble, hard=True)
            log(
                logging.DEBUG, "rolling back a savepoint failed (%s); the unit is doomed", type(trouble).__name__,
                function=transaction.name, error=trouble,
            )  # fmt: skip
        if outcome.cancelled is not None:
            raise outcome.cancelled
