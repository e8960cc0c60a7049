"""One physical transaction: where it stands, and whether SQL may be sent in it.

Synchronous throughout.  `_session` calls it from inside SQLAlchemy; `_unit` begins and ends it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from greenlet import getcurrent

from sqla_uow._databases.levels import is_weaker_or_same
from sqla_uow._tasks.owner import Owner
from sqla_uow._transaction import refusals
from sqla_uow._transaction.doom import Doom
from sqla_uow._transaction.hooks import Hooks
from sqla_uow._transaction.phase import Phase
from sqla_uow.errors import IsolationConflictError, NoUnitError, ReadOnlyError, RollbackOnlyError

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Mapping
    from weakref import WeakSet

    from greenlet import greenlet
    from sqlalchemy.engine import Connection, Engine
    from sqlalchemy.orm import InstanceState, Session

    from sqla_uow._databases.database import Database
    from sqla_uow._databases.driver import Ended
    from sqla_uow._databases.failures import Failure
    from sqla_uow._databases.self_wait import Watch
    from sqla_uow._replicas.router import LastWrite, Replica, ReplicaRouter
    from sqla_uow._retry.turn import Turn
    from sqla_uow._settings.preamble import Preamble
    from sqla_uow._transaction.tainted import Tainted
    from sqla_uow._transaction.times import Idle, Times
    from sqla_uow.errors import PropagationError, StaleVersionError
    from sqla_uow.typing import IsolationLevel, Status

__all__ = ["OpenStream", "Transaction", "VersionGuard", "transaction_of"]


class OpenStream(Protocol):
    """Rows that are fetched as they are read."""

    def check_unread(self, what: str) -> None:
        """Raise if something that is about to be done would cut the rows off."""
        ...

    def close_if_left(self) -> None:
        """Close the cursor if nobody can read on."""
        ...

    def end(self) -> None:
        """Let nobody read on."""
        ...

    def body_returned(self) -> None:
        """Let nobody read on, as the body has returned; raise if another task still reads."""
        ...


class VersionGuard(Protocol):
    """What a unit knows of the versions of its rows."""

    @property
    def expectations(self) -> Mapping[Any, object]:
        """What clients expect."""
        ...

    def flushed(self) -> None:
        """A flush has written all it had to."""
        ...

    def check_unwritten(self, session: Session) -> None:
        """Compare what the body has not written."""
        ...

    def find_stale(self, connection: Connection) -> StaleVersionError | None:
        """Read the versions again, after the rollback."""
        ...

    def stale(self, who: str) -> StaleVersionError:
        """Return the error for a write that found another version."""
        ...


class Transaction:
    """Where one unit's transaction stands, and whether SQL may be sent in it.

    Args:
        name: how messages call the unit.
        database: where it runs.
        isolation: the level, None for the database's default.
        read_only: writes are refused.
        deadline: monotonic seconds of `clock`, or None.
        clock: the policy's clock.

    Attributes:
        tainted: ORM objects that may not be attached, with the reason.
        enclosing: the transactions of the units around this one, in this task.
        scope_read: it is a read session's.
        times: what it waits for is noted there, if an observer wants to know.
    """

    __slots__ = (
        "__weakref__",
        "attached",
        "beginnings",
        "chosen",
        "clock",
        "closer",
        "connect_failure",
        "connection",
        "database",
        "deadline",
        "doom",
        "enclosing",
        "engine",
        "final",
        "hooks",
        "idle",
        "isolation",
        "joined",
        "last_write",
        "lifted_lock_wait",
        "lifts_lock_wait",
        "lock_wait",
        "lock_watch",
        "name",
        "on_rollback",
        "owner",
        "pending_savepoint",
        "phase",
        "preamble",
        "raw_taken",
        "read_only",
        "replica",
        "replicas",
        "required",
        "rolling_back_to_savepoint",
        "scope_read",
        "self_wait",
        "session",
        "stale",
        "stream",
        "tainted",
        "times",
        "turn",
        "unwatch",
        "versions",
        "was_open",
        "watch",
        "wrote",
        "wrote_rows",
    )

    def __init__(
        self,
        name: str,
        database: Database,
        *,
        isolation: IsolationLevel | None,
        read_only: bool,
        deadline: float | None,
        clock: Callable[[], float],
    ) -> None:
        self.name: str = name
        self.database: Database = database
        self.isolation: IsolationLevel | None = isolation
        self.read_only: bool = read_only
        self.deadline: float | None = deadline
        self.clock: Callable[[], float] = clock
        self.tainted: Tainted | None = None
        self.enclosing: tuple[Transaction, ...] = ()
        self.scope_read: bool = False
        self.times: Times | None = None
        self.idle: Idle | None = None  # if an observer wants to know of idling
        self.hooks: Hooks = Hooks()
        self.doom: Doom = Doom(self.hooks)
        self.preamble: Preamble | None = None  # what it is told first
        self.owner: Owner = Owner(name, self.doom)
        self.phase: Phase = Phase.NEW
        self.closer: greenlet | None = None
        self.session: Any = None  # the unit's, until the end: the session names the transaction, which would be a cycle
        self.final: Status | None = None  # what became of it
        self.engine: Engine | None = None
        self.connection: Connection | None = None
        self.connect_failure: Failure | None = None
        self.attached: WeakSet[InstanceState[Any]] | None = None
        self.on_rollback: Callable[[Transaction, Session], None] | None = None
        self.joined: int = 0
        self.turn: Turn | None = None  # where something has conflicted lately
        self.lock_wait: float | None = None  # seconds that a lock may be waited for; None is for ever
        self.lifts_lock_wait: bool = False  # with the next statement
        self.lifted_lock_wait: bool = False
        self.chosen: BaseException | None = None  # an error that the `retry_on` of a joined call wants to be retried
        self.lock_watch: Watch | None = None
        self.self_wait: PropagationError | None = None  # its statement waits for a unit around it, and is being stopped
        self.wrote: bool = False
        self.raw_taken: bool = False  # user code has the driver's own connection
        self.unwatch: tuple[Callable[[], object], ...] = ()  # what ends the watch on it
        self.was_open: bool = False  # the driver has said that a transaction is open
        self.stream: OpenStream | None = None  # whose rows are being read
        self.wrote_rows: bool = False  # since the last COMMIT that DDL makes MariaDB do
        self.watch: Callable[[bool], Ended | None] | None = None
        self.pending_savepoint: str | None = None
        self.rolling_back_to_savepoint: bool = False
        self.replicas: ReplicaRouter | None = None  # that it may read from
        self.replica: Replica | None = None  # that it reads from
        self.beginnings: int = 0  # how often its first statement may be sent again, on another connection
        self.last_write: LastWrite | None = None  # of its client, if the manager has replicas
        self.stale: Failure | None = (
            None  # the last write that found another version, even if a savepoint has undone it
        )
        self.versions: VersionGuard | None = None  # made by `mixins`, with the first version that matters
        self.required: tuple[str, IsolationLevel] | None = (
            None  # what a joined call needs, checked at the first connection
        )

    def seconds_left(self) -> float | None:
        """Return what is left until the deadline; None if there is no deadline."""
        return None if self.deadline is None else self.deadline - self.clock()

    def keeps_snapshot(self) -> bool:
        """Say whether its first query decides what all of them see."""
        return self.database.keeps_snapshot(self.isolation)

    @property
    def settings(self) -> Mapping[str, str] | None:
        """What the server is told first, as SET LOCAL would; None if there is nothing."""
        return None if self.preamble is None else self.preamble.told

    def is_calm(self) -> bool:
        """Say whether it has begun, is not doomed, and has nothing in flight, as is so for most statements."""
        return self.phase.is_active and self.doom.marked is None and self.owner.in_flight is None

    def check_usable(self) -> None:
        """Raise if the running task may not send SQL."""
        phase = self.phase
        if phase.is_open:
            self.owner.check()
            if self.doom.marked is not None:
                self.check_sound()
            return
        self.check_not_ending()
        if phase is Phase.YIELDED:
            raise NoUnitError(refusals.GAVE_WAY)
        if phase is Phase.ENDED:
            raise NoUnitError(refusals.ended(self.name, scope_read=self.scope_read))

    def before_statement(self, *, writes: bool) -> None:
        """A statement is about to be sent.

        Raises:
            UnitOfWorkError: it may not be.
        """
        owner = self.owner
        if self.phase.is_active and self.doom.marked is None and not self.rolling_back_to_savepoint:
            owner.check()
            if self.stream is not None:
                self.stream.check_unread("a statement was sent")
                self.stream.close_if_left()
        elif (self.phase.is_ending and self.is_ending_here()) or self.rolling_back_to_savepoint:
            if self.stream is not None:
                self.stream.close_if_left()
            return
        else:
            self.check_usable()
        if self.read_only and writes:
            raise ReadOnlyError(self.read_only_message("an INSERT, UPDATE or DELETE was sent"))
        owner.in_flight = owner.last
        if self.idle is not None:
            self.idle.ends()

    def after_statement(self) -> None:
        """The statement was answered."""
        if self.pending_savepoint:
            self.doom.begin_savepoint(self.pending_savepoint)
        self.pending_savepoint = None
        self.rolling_back_to_savepoint = False
        self.owner.in_flight = None
        self.beginnings = 0
        if self.idle is not None:
            self.idle.begins()
        if self.owner.idle is not None:
            self.owner.end_operation()

    def seal(self, phase: Phase) -> None:
        """Let nobody use the session and its connection, until `end_here`."""
        self.phase = phase
        self.closer = None

    def end_here(self, phase: Phase) -> None:
        """Let only the running greenlet use the session and its connection from now on: it ends the transaction.

        Not the task: SQLAlchemy runs the whole end in one greenlet, in which nobody else's code runs, and a greenlet can be
        looked up in a tenth of the time.
        """
        self.phase = phase
        self.closer = getcurrent()

    def is_ending_here(self) -> bool:
        """Say whether this is the greenlet that ends the transaction."""
        return self.phase.is_ending and getcurrent() is self.closer

    def check_not_ending(self) -> None:
        """Refuse SQL if another greenlet is ending the transaction."""
        if self.phase.is_ending and getcurrent() is not self.closer:
            raise NoUnitError(refusals.ending(self.name, scope_read=self.scope_read))

    def hold_for_rollback(self) -> asyncio.Task[Any] | None:
        """Doom the unit, because user code calls ``rollback()``; if it was doomed before, keep the cause.

        Returns:
            what `Owner.let_go` needs.
        """
        self.check_not_ending()
        before = self.owner.hold()
        mark = self.doom.marked
        cause, failure = (None, None) if mark is None else (mark.cause, mark.failure)
        self.doom.mark(cause, failure=failure, hard=True, reason="rollback() was called on its session")
        return before

    def check_sound(self) -> None:
        """Raise if the unit can only be rolled back.

        Raises:
            RollbackOnlyError: from its first cause.
        """
        mark = self.doom.marked
        if mark is not None:
            raise RollbackOnlyError(refusals.doomed(self.name, mark, scope_read=self.scope_read)) from mark.cause

    def wait_for_locks(self) -> None:
        """Wait for locks as the last attempt does, from the next statement on."""
        if self.turn is not None:
            self.turn.is_last = True
        if self.lock_wait is None:
            return
        self.lock_wait = None
        told = self.connection is not None and self.database.system.limits_lock_wait
        self.lifts_lock_wait = told

    def give_back_turn(self) -> None:
        """Let the next writer of an SQLite database in."""
        queue = self.database.writer_queue()
        if queue is not None:
            queue.give_back(self)

    def unwatch_raw(self) -> None:
        """End the watch on the driver's own connection."""
        endings, self.unwatch = self.unwatch, ()
        for end in reversed(endings):
            end()

    def read_only_message(self, what: str) -> str:
        """Return what to say of a write that is refused."""
        return refusals.read_only(what, self.name, scope_read=self.scope_read)

    def check_join(self, who: str, isolation: IsolationLevel | None, *, read_only: bool) -> None:
        """Refuse a call that needs more than this unit gives; else code for SERIALIZABLE would run at READ COMMITTED.

        Raises:
            IsolationConflictError: the call needs a stronger level, or writes in a read-only unit.
        """
        if self.read_only and not read_only:
            raise IsolationConflictError(
                f"{who} needs read-write but joins {self.name}, which is read-only; begin the outer one read-write or "
                "use propagation='requires_new'"
            )
        if isolation is None or isolation == self.isolation:
            return
        if self.isolation is None:
            default = self.database.default_isolation()
            if default is None:  # not known before the first connection: checked then
                strongest = self.required
                if strongest is None or not is_weaker_or_same(isolation, strongest[1]):
                    self.required = (who, isolation)
                return
            self.check_default(who, isolation)
        elif not is_weaker_or_same(isolation, self.isolation):
            raise IsolationConflictError(refusals.stronger(who, isolation, self.isolation))

    def check_default(self, who: str, isolation: IsolationLevel) -> None:
        """Refuse a call that needs more than the database's default, which the unit was begun with.

        Raises:
            IsolationConflictError: it does.
        """
        default = self.database.default_isolation()
        if default is not None and not is_weaker_or_same(isolation, default):
            raise IsolationConflictError(refusals.stronger(who, isolation, f"{default}, the default of the database"))


def transaction_of(session: Session | None) -> Transaction | None:
    """Return the transaction of a session's unit, None if the session does not belong to a unit."""
    transaction: Transaction | None = getattr(session, "transaction_of_unit", None)
    return transaction
