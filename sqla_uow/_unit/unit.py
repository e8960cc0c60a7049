"""`UnitOfWork`: exactly one session, one transaction, one attempt."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, ParamSpec

from sqlalchemy.ext.asyncio import AsyncSession
from typing_extensions import TypeVar

from sqla_uow._transaction.hooks import Hook, being_run
from sqla_uow._transaction.phase import Phase
from sqla_uow.errors import NoUnitError
from sqla_uow.typing import IsolationLevel, Status

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqla_uow._session.maker import SessionMaker
    from sqla_uow._transaction.hooks import Hooks
    from sqla_uow._transaction.transaction import Transaction

__all__ = ["UnitOfWork"]

S = TypeVar("S", bound=AsyncSession, default=AsyncSession)
P = ParamSpec("P")


class UnitOfWork(Generic[S]):
    """One session, one transaction, one attempt; used once.

    `UnitOfWorkManager` and `transactional` make units; do not make one by hand.

    Attributes:
        attempt: which run of the body this is, from 1.
    """

    __slots__ = ("__weakref__", "_is_last", "_maker", "_session", "_transaction", "attempt")

    def __init__(
        self, transaction: Transaction, maker: SessionMaker[S], *, attempt: int = 1, is_last_attempt: bool = True
    ) -> None:
        self._transaction = transaction
        self._maker = maker
        self._session: S | None = None
        self.attempt: int = attempt
        self._is_last: bool = is_last_attempt

    @property
    def is_last_attempt(self) -> bool:
        """Whether a retryable failure of this attempt will reach the caller.

        Set it to True once the body has done something that it cannot do again; the unit then waits for locks as in a
        last attempt.
        """
        return self._is_last

    @is_last_attempt.setter
    def is_last_attempt(self, is_last: bool) -> None:
        self._is_last = is_last
        if is_last:
            self._transaction.wait_for_locks()

    @property
    def session(self) -> S:
        """The unit's session.  It takes a connection with its first SQL, not before."""
        session = self._session
        if session is None:
            transaction = self._transaction
            if transaction.final is not None:
                raise NoUnitError(f"{transaction.name} has ended without a session; open a new unit for SQL")
            session = self._session = transaction.session = self._maker.session(transaction)
        return session

    @property
    def status(self) -> Status:
        """Where the unit stands.  After the end it says reliably how the unit ended."""
        if self._transaction.final is not None:
            return self._transaction.final
        if self._transaction.doom.marked is not None:
            return Status.DOOMED
        return Status.NEW if self._transaction.phase is Phase.NEW else Status.ACTIVE

    @property
    def isolation(self) -> IsolationLevel | None:
        """The isolation level that the unit was begun with; None is the database's default."""
        return self._transaction.isolation

    @property
    def read_only(self) -> bool:
        """Whether writes are refused, by the database and by a guard before each flush."""
        return self._transaction.read_only

    @property
    def has_written(self) -> bool:
        """Whether the unit has sent a statement that may have written; still true after the end, however it ended.

        Only the beginning of a statement is looked at, so a SELECT of a function that writes counts as reading.
        """
        return self._transaction.wrote

    def after_commit(self, hook: Callable[P, Any], /, *args: P.args, **kwargs: P.kwargs) -> None:
        """Call `hook` once after this unit has committed, in order of registration, with no transaction open.

        The hook is dropped if the attempt fails, or if the savepoint is rolled back under which it was registered.  A
        hook may open a unit of its own.  It may register further hooks, which run after those that wait already.

        Args:
            hook: a sync or async function; its result is ignored, and what it raises ends up in an `AfterCommitError`.
            args: passed to the hook.
            kwargs: passed to the hook.

        Raises:
            NoUnitError: the unit has ended, or is a scope's read session.
            TypeError: `hook` cannot be called.
        """
        hooks = self._transaction.hooks.after_commit
        if being_run("after_commit") is not hooks:  # a hook of this unit may register further ones
            hooks = self._open_hooks("after_commit").after_commit
        hooks.append(Hook.of(hook, args, kwargs))

    def before_commit(self, hook: Callable[P, Any], /, *args: P.args, **kwargs: P.kwargs) -> None:
        """Call `hook` inside the transaction, just before COMMIT; it may write, and its errors roll back.

        Args:
            hook: a sync or async function; its result is ignored.
            args: passed to the hook.
            kwargs: passed to the hook.

        Raises:
            NoUnitError: the unit has ended, or is a scope's read session.
            TypeError: `hook` cannot be called.
        """
        hooks = self._open_hooks("before_commit")
        if self._transaction.phase.is_ending:  # it would be forgotten: its COMMIT, or its ROLLBACK, is on the way
            raise NoUnitError(
                f"{self._transaction.name} is ending and runs no more before_commit hooks; register it before"
            )
        hooks.before_commit.append(Hook.of(hook, args, kwargs))

    def after_rollback(self, hook: Callable[P, Any], /, *args: P.args, **kwargs: P.kwargs) -> None:
        """Call `hook` after a rollback of this unit, or of the savepoint it was registered under; errors are logged.

        A hook may register further hooks, which run after those that wait already.

        Args:
            hook: a sync or async function; its result is ignored.
            args: passed to the hook.
            kwargs: passed to the hook.

        Raises:
            NoUnitError: the unit has ended, or is a scope's read session.
            TypeError: `hook` cannot be called.
        """
        hooks = self._transaction.hooks.after_rollback
        if being_run("after_rollback") is not hooks:
            hooks = self._open_hooks("after_rollback").after_rollback
        hooks.append(Hook.of(hook, args, kwargs))

    def doom(self, reason: str | None = None) -> None:
        """Roll back at the end; SQL is refused from now on.

        If the function that owns the unit calls it, the function returns normally.  If a joined function calls it, the
        owner did not ask for the rollback and gets `RollbackOnlyError`.

        Args:
            reason: the errors that follow give it.

        Raises:
            NoUnitError: the unit has ended.
        """
        self._check_open("call doom()")
        self._transaction.doom.mark(
            None, hard=True, reason=f"doom() was called: {reason}" if reason else "doom() was called",
            quiet=self._transaction.joined == 0,
        )  # fmt: skip

    def _open_hooks(self, what: str) -> Hooks:
        if self._transaction.scope_read:
            raise NoUnitError(f"{what}() was called outside a unit of work; call it inside a @transactional function")
        self._check_open("register hooks")
        return self._transaction.hooks

    def _check_open(self, what: str) -> None:
        if self._transaction.final is not None:
            raise NoUnitError(f"{self._transaction.name} has ended; {what} while it is open")

    def __repr__(self) -> str:
        return f"<UnitOfWork {self._transaction.name} attempt {self.attempt} {self.status.value}>"
