"""One physical transaction: its phase, its owner, its damage, and the rules that SQLAlchemy's events are held to.

Synchronous throughout: `_session` and `_connection` call in from inside SQLAlchemy, `_commit` and `_rollback` finish it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

from greenlet import getcurrent
from sqlalchemy.exc import PendingRollbackError

from sqla_uow._databases.driver_state import Ended, State, in_autocommit
from sqla_uow._databases.failures import HARD, Failure, Kind, classify, hidden_conflict
from sqla_uow._databases.levels import is_weaker_or_same
from sqla_uow._tasks.owner import Owner
from sqla_uow._transaction.doom import Damage
from sqla_uow._transaction.hooks import Hooks
from sqla_uow._transaction.phase import Phase
from sqla_uow.errors import (
    IsolationConflictError,
    NoUnitError,
    PropagationError,
    ReadOnlyError,
    RollbackOnlyError,
    UnitOfWorkError,
)

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Mapping, Sequence
    from weakref import WeakSet

    from greenlet import greenlet
    from sqlalchemy.engine import Connection, Engine
    from sqlalchemy.orm import InstanceState, Session

    from sqla_uow._attempts.observers import Idle, Times
    from sqla_uow._databases.self_wait import Watch
    from sqla_uow._replicas.router import LastWrite, Replica, Replicas
    from sqla_uow._retry.controller import Slot
    from sqla_uow._session.database import Database
    from sqla_uow._session.instances import Tainted
    from sqla_uow._session.streams import Stream
    from sqla_uow._versions.expectations import Versions
    from sqla_uow.typing import IsolationLevel, Status

__all__ = ["Transaction", "committing", "transaction_of"]

committing: dict[greenlet, Transaction] = {}
"""What is being committed, by the greenlet that does so: there SQLAlchemy's own events call code of the user."""


class Transaction:
    """State of one unit's transaction.

    Args:
        name: how messages call the unit.
        database: where it runs.
        isolation: the level, None for the database's default.
        read_only: writes are refused.
        deadline: monotonic seconds of `clock`, or None.
        clock: the policy's clock.
        tainted: ORM objects that may not be attached, with the reason.
        enclosing: the transactions of the units around this one, in this task.
        scope_read: it is a read session's.
        times: where it notes what it waits for, if anybody wants to know.
    """

    __slots__ = (
        "__weakref__",
        "_required",
        "attached",
        "beginnings",
        "chosen",
        "clock",
        "closer",
        "connect_failure",
        "connection",
        "damage",
        "database",
        "deadline",
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
        "raw_taken",
        "read_only",
        "replica",
        "replicas",
        "rolling_back_to_savepoint",
        "scope_read",
        "self_wait",
        "session",
        "slot",
        "stale",
        "stream",
        "tainted",
        "times",
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
        database: Database[Any],
        *,
        isolation: IsolationLevel | None,
        read_only: bool,
        deadline: float | None,
        clock: Callable[[], float],
        tainted: Tainted | None = None,
        enclosing: tuple[Transaction, ...] = (),
        scope_read: bool = False,
        times: Times | None = None,
    ) -> None:
        self.name: str = name
        self.database: Database[Any] = database
        self.isolation: IsolationLevel | None = isolation
        self.read_only: bool = read_only
        self.deadline: float | None = deadline
        self.clock: Callable[[], float] = clock
        self.tainted: Tainted | None = tainted
        self.enclosing: tuple[Transaction, ...] = enclosing
        self.scope_read: bool = scope_read
        self.times: Times | None = times
        self.idle: Idle | None = None  # where somebody wants to know of slow calls
        self.hooks: Hooks = Hooks()
        self.damage: Damage = Damage(self.hooks)
        self.owner: Owner = Owner(name, self.damage)
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
        self.slot: Slot | None = None
        self.lock_wait: float | None = None  # seconds that a lock may be waited for; None is for ever
        self.lifts_lock_wait: bool = False  # with the next statement
        self.lifted_lock_wait: bool = False
        self.chosen: BaseException | None = None  # an error that the `retry_on` of a joined call has said to retry
        self.lock_watch: Watch | None = None
        self.self_wait: PropagationError | None = (
            None  # its statement is being stopped, as it waits for a unit around it
        )
        self.wrote: bool = False
        self.raw_taken: bool = False  # the driver's own connection, by user code
        self.unwatch: list[Callable[[], object]] = []  # end the watch on it
        self.was_open: bool = False  # the driver has said so
        self.stream: Stream | None = None  # whose rows are being read
        self.wrote_rows: bool = False  # since MariaDB has committed, as DDL makes it
        self.watch: Callable[[bool], Ended | None] | None = None
        self.pending_savepoint: str | None = None
        self.rolling_back_to_savepoint: bool = False
        self.replicas: Replicas | None = None  # where it may read
        self.replica: Replica | None = None  # where it does
        self.beginnings: int = 0  # how often its first statement may be sent again, on another connection
        self.last_write: LastWrite | None = None  # of its client, where there are replicas
        self.stale: Failure | None = None  # the last write that found another version, though a savepoint took it back
        self.versions: Versions | None = None  # made by `mixins`, where there is something to know
        self._required: tuple[str, IsolationLevel] | None = None

    # -- may SQL be sent?

    def is_calm(self) -> bool:
        """Say whether it is in the middle of its life, sound, and nothing is in flight: what most statements meet."""
        return self.phase.is_active and self.damage.mark is None and self.owner.in_flight is None

    def check_usable(self) -> None:
        """Let the running task send SQL, or raise why not."""
        phase = self.phase
        if phase.is_open:
            self.owner.check()
            if self.damage.mark is not None:
                self.check_sound()
            return
        self.check_not_ending()
        if phase is Phase.YIELDED:
            raise NoUnitError(
                "this session gave way to a transaction; call current_session() again, and read again what you need"
            )
        if phase is Phase.ENDED:
            raise NoUnitError(f"{self.name} has ended and its session is closed; {self._instead()}")

    def seal(self, phase: Phase) -> None:
        """Let nobody use the session and its connection any more, until `end_here`."""
        self.phase = phase
        self.closer = None

    def end_here(self, phase: Phase) -> None:
        """Let nobody but the running greenlet use the session and its connection any more: it ends the transaction.

        A greenlet, not the task: SQLAlchemy runs the whole end in one, nobody else's code runs in it, and it costs a
        tenth to ask for.
        """
        self.phase = phase
        self.closer = getcurrent()

    def is_ending_here(self) -> bool:
        """Say whether this is the greenlet that ends the transaction."""
        return self.phase.is_ending and getcurrent() is self.closer

    def check_not_ending(self) -> None:
        """Refuse SQL of others while one ends the transaction."""
        if self.phase.is_ending and getcurrent() is not self.closer:
            raise NoUnitError(f"{self.name} is ending and takes no more SQL; {self._instead()}")

    def _instead(self) -> str:
        """Return what to do where this session takes no more SQL."""
        if self.scope_read:
            return "call current_session() again for each use"
        return "open a new unit for more SQL, or call current_session() again"

    def hold_for_rollback(self) -> asyncio.Task[Any] | None:
        """Doom, because user code calls ``rollback()``; keep the cause that it had."""
        self.check_not_ending()
        before = self.owner.hold()
        mark = self.damage.mark
        cause, failure = (None, None) if mark is None else (mark.cause, mark.failure)
        self.damage.add(cause, failure=failure, hard=True, reason="rollback() was called on its session")
        return before

    def check_sound(self) -> None:
        """Raise if the unit can only be rolled back.

        Raises:
            RollbackOnlyError: from its first cause.
        """
        mark = self.damage.mark
        if mark is not None:
            instead = "or guard the step that may fail with propagation='nested'"
            if self.scope_read:
                instead = "or read what may fail in a @transactional(read_only=True) function"
            raise RollbackOnlyError(
                f"{self.name} can only be rolled back: {self.why()}; let the error leave the function, {instead}"
            ) from mark.cause

    def why(self) -> str:
        """Return the fact behind the mark, in words without any SQL or parameter."""
        mark = self.damage.mark
        assert mark is not None
        if mark.reason is not None:
            return mark.reason
        code = f" {mark.failure.code}" if mark.failure is not None and mark.failure.code is not None else ""
        kind = f" ({mark.failure.kind.value}{code})" if mark.failure is not None else ""
        return f"{type(mark.cause).__name__}{kind} was raised in it"

    # -- told by the connection

    def before_connect(self) -> None:
        """Refuse to wait for a connection that can only come from this very task."""
        self.owner.enter()
        self.database.check_loop(self.owner.loop, who=self.name)
        if not self.enclosing:
            return
        capacity = self.database.capacity()
        held = sum(1 for other in self.enclosing if other.database.pool is self.database.pool and other.connection)
        if capacity is not None and held >= capacity:
            raise PropagationError(self._no_room(capacity))

    def _no_room(self, capacity: int) -> str:
        within = self.database.within
        if within is not None:
            return (
                f"{self.name} needs a connection of its own, but {within} has one for all units; join the outer unit, "
                "or test it on a database of its own"
            )
        return (
            f"{self.name} needs a connection of its own, but the units around it hold all {capacity} of the pool; "
            "use a pool with room for the nesting, or join the outer unit"
        )

    def connect_failed(self, error: BaseException) -> None:
        self.owner.leave()
        if self.phase is Phase.ENDED:  # while this waited; the end could not give back what was not taken yet
            self.give_back_turn()
        if isinstance(error, Exception) and not isinstance(error, UnitOfWorkError):
            self.connect_failure = classify(error, connecting=True)
            # A failed statement like any other: swallowed, it must not end in a commit of the rest.
            self.damage.add(error, failure=self.connect_failure)

    def wait_for_locks(self) -> None:
        """Wait for locks as the last attempt does, from the next statement on."""
        if self.lock_wait is None:
            return
        self.lock_wait = None
        told = self.connection is not None and self.database.family == "postgresql" and self.database.server is None
        self.lifts_lock_wait = told

    def give_back_turn(self) -> None:
        turns = self.database.turns()
        if turns is not None:
            turns.give_back(self)

    def _foreign_level(self, connection: Connection) -> str | None:
        """Return a level that the body asked SQLAlchemy for behind the unit's back; AUTOCOMMIT would undo the unit."""
        ours: Mapping[str, Any] = self.engine.get_execution_options() if self.engine else {}
        theirs = connection.get_execution_options()
        if theirs is ours:
            return None
        asked: str | None = theirs.get("isolation_level")
        return None if asked == ours.get("isolation_level") else asked

    def begun(self, connection: Connection) -> None:
        """Take note of the transaction's connection, before anything is sent on it."""
        self.connection = connection
        foreign = self._foreign_level(connection)
        if foreign is not None:
            error = IsolationConflictError(
                f"{self.name} was given isolation_level {foreign!r} through execution options; say isolation= where the "
                "unit is begun"
            )
            self.damage.add(error, hard=True)
            raise error
        if self.phase is Phase.NEW and in_autocommit(connection):
            error = IsolationConflictError(
                f"the connection of {self.name} is in autocommit, where nothing can be rolled back; leave autocommit out of "
                "connect_args, and of what listens to connect and checkout"
            )
            self.damage.add(error, hard=True)
            raise error
        if self.phase is Phase.NEW:  # at the end of a unit a connection changes nothing
            self.phase = Phase.ACTIVE
        if self._required is not None:
            try:
                self._check_default(*self._required)
            except IsolationConflictError as error:
                # It has begun: if this is swallowed, no other statement may run in it.
                self.damage.add(error, hard=True)
                raise

    def before_statement(self, *, writes: bool) -> None:
        owner = self.owner
        if self.phase.is_active and self.damage.mark is None and not self.rolling_back_to_savepoint:
            owner.check()
            if self.stream is not None:
                self.check_no_stream("a statement was sent")
                self.close_left_stream()
        elif (self.phase.is_ending and self.is_ending_here()) or self.rolling_back_to_savepoint:
            self.close_left_stream()
            return
        else:
            self.check_usable()
        if self.read_only and writes:
            raise ReadOnlyError(self.read_only_message("an INSERT, UPDATE or DELETE was sent"))
        owner.in_flight = owner.last
        if self.idle is not None:
            self.idle.ends()

    def refuse_control(self, word: str) -> NoReturn:
        """Refuse SQL that would end the transaction behind SQLAlchemy's back, and ours."""
        self.owner.leave()
        error = PropagationError(
            f"{word} was sent as SQL inside {self.name}, which begins and ends its transaction itself; leave it to the unit, "
            "call doom() to roll back, or use propagation='nested' for a part"
        )
        self.damage.add(error, hard=True)
        raise error

    def refuse_implicit_commit(self, word: str) -> NoReturn:
        """Refuse SQL before which MariaDB commits what is open."""
        self.owner.leave()
        error = PropagationError(
            f"{word} was sent inside {self.name}, which has written: MariaDB commits that first, and no rollback could take "
            "it back; send it outside the unit, before or after"
        )
        self.damage.add(error, hard=True)
        raise error

    def ended_by_statement(self, how: Ended) -> NoReturn:
        """Raise because a statement has ended the transaction, which could not be seen before."""
        self.watch = None
        if how is Ended.AUTOCOMMIT:
            what = "switched its connection to autocommit, so what it sends is committed"
        else:
            what = "ended its transaction, so what was sent before is committed"
        error = PropagationError(
            f"a statement in {self.name} {what} and cannot be rolled back; leave COMMIT and the like to the unit, and "
            "procedures that commit outside"
        )
        self.damage.add(error, hard=True)
        raise error

    def after_statement(self) -> None:
        if self.pending_savepoint:
            self.damage.savepoint(self.pending_savepoint)
        self.pending_savepoint = None
        self.rolling_back_to_savepoint = False
        self.owner.in_flight = None
        self.beginnings = 0
        if self.idle is not None:
            self.idle.begins()
        if self.owner.idle is not None:
            self.owner.leave()

    def can_begin_again(self) -> bool:
        """Say whether nothing has been read yet, and the connection was found dead."""
        mark = self.damage.mark
        lost = mark is not None and mark.failure is not None and mark.failure.kind is Kind.LOST
        return lost and self.beginnings > 0 and self.phase.is_active and self.damage.depth == 0

    def begin_again(self) -> None:
        """Forget the connection that was found dead, and a replica behind it."""
        self.beginnings -= 1
        if self.replica is not None and self.replicas is not None:
            self.database, self.replica = self.replicas.primary, None
        self.connection = self.engine = self.closer = None
        self.damage.mark = None
        self.phase = Phase.NEW

    def failed(self, error: BaseException, shown: BaseException | None, *, lost: bool, sent: bool) -> None:
        """Take note of an error that the connection reported.

        Args:
            error: the driver's own exception, or a cancellation.
            shown: what SQLAlchemy raises instead, None where it is the same.
            lost: the connection is gone.
            sent: a statement had been handed to the driver; else the server knows nothing of it.
        """
        undoing = self.rolling_back_to_savepoint
        self.pending_savepoint = None
        self.rolling_back_to_savepoint = False
        self.owner.leave()
        if self.phase.is_ending and self.phase is not Phase.COMMITTING:
            return
        failure = classify(error) if isinstance(error, Exception) else None
        failure = hidden_conflict(error) or failure
        if lost and isinstance(error, Exception) and (failure is None or failure.kind not in HARD):
            failure = Failure(Kind.LOST, failure.code if failure else None, error)
        hard = lost or undoing or (failure is not None and failure.kind in HARD)
        if sent or hard:
            self.damage.add(shown or error, failure=failure, hard=hard)
        if self.replica is not None and failure is not None:
            self.replica.met(failure)

    def failure_behind(self, links: Sequence[BaseException]) -> Failure | None:
        """Return the retryable failure of this transaction's own connection behind a chain of exceptions."""
        ids = {id(link) for link in links}
        mark = self.damage.mark
        if mark is not None and mark.failure is not None and mark.failure.retryable:
            forced = mark.hard and mark.failure.kind in (Kind.CONFLICT, Kind.LOCK_TIMEOUT, Kind.STALE_PLAN)
            # SQLAlchemy's answer to SQL, a RELEASE say, after a failure that was swallowed; it does not name that one.
            aftermath = any(isinstance(link, PendingRollbackError) for link in links)
            if forced or aftermath or id(mark.cause) in ids or id(mark.failure.error) in ids:
                return mark.failure
        if self.stale is not None and id(self.stale.error) in ids:
            return self.stale
        refused = self.connect_failure
        return refused if refused is not None and refused.retryable and id(refused.error) in ids else None

    def before_rollback(self, cause: BaseException | None) -> None:
        """A ROLLBACK is about to be sent: not under another task's statement."""
        if self.phase.is_open:
            self.owner.check()
        self.rolled_back_outside(cause)

    def rolled_back_outside(self, cause: BaseException | None) -> None:
        """SQLAlchemy has ended the transaction: a flush failed, or user code called ``rollback()``."""
        if not self.phase.is_open and self.phase is not Phase.COMMITTING:
            return
        self.end_stream()
        failure = classify(cause) if isinstance(cause, Exception) else None
        if cause is None or (failure is None and self.damage.mark is None):
            self.damage.add(cause, hard=True, reason="its transaction was rolled back inside the body")
        else:
            self.damage.add(cause, hard=True, failure=failure)

    def before_commit(self) -> None:
        """COMMIT was asked for: only ours, only a sound one."""
        if self.phase is not Phase.COMMITTING or not self.is_ending_here():
            error = PropagationError(
                "COMMIT was called on a session that only reads; write in a @transactional function, which commits at its end"
                if self.scope_read
                else f"COMMIT was called inside {self.name}, which commits at its own end; remove the commit() "
                "or use propagation='requires_new' for a part that must be durable earlier"
            )
            self.damage.add(error, hard=True)
            raise error
        self.check_sound()

    def sending_commit(self) -> None:
        """COMMIT is being handed to the driver: from here on its outcome may be unknown."""
        if self.database.is_open(self.connection):
            self.phase = Phase.SENT

    def hear(self, state: State | None) -> None:
        """Take the driver's word on the transaction that is to be committed.

        Raises:
            RollbackOnlyError: there is nothing to commit any more.
        """
        if state is State.FAILED:
            self.damage.add(None, hard=True, reason="a statement in it failed on the driver's own connection")
        elif state is State.NONE and self.was_open:
            self.ended_raw()
        elif state is State.BUSY:
            self.damage.add(None, hard=True, reason="an operation on the driver's own connection is still under way")
        self.check_sound()

    def ended_raw(self) -> None:
        """The transaction that was begun for the unit is over, whatever has been begun since."""
        self.damage.add(None, hard=True, reason="its transaction was ended on the driver's own connection")

    def was_closed(self) -> None:
        """COMMIT had nothing to be sent on.

        Raises:
            RollbackOnlyError: always.
        """
        self.phase = Phase.COMMITTING
        self.damage.add(None, hard=True, reason="the driver's own connection was closed in it")
        self.check_sound()

    def unwatch_raw(self) -> None:
        """Hear no more of the driver's own connection."""
        while self.unwatch:
            self.unwatch.pop()()

    def answered_by_rollback(self) -> None:
        """The server has rolled back instead.

        Raises:
            RollbackOnlyError: always.
        """
        self.phase = Phase.COMMITTING  # the outcome is known
        self.damage.add(
            None,
            hard=True,
            reason="the server answered its COMMIT by ROLLBACK, because a statement had failed on the driver's own connection",
        )
        self.check_sound()

    def begin_raw(self) -> object:
        """A statement is about to be sent by the driver's own connection; of its own ones SQLAlchemy has told."""
        if self.owner.in_flight is not None or not self.phase.is_open:
            return None
        before = self.owner.hold() or _NOBODY
        if self.stream is not None and self.database.family == "mysql":
            try:
                self.check_no_stream("a statement was sent on the driver's own connection")
            except BaseException:
                self.end_raw(before)
                raise
        return before

    def end_raw(self, begun: Any) -> None:
        if begun is not None:
            self.owner.let_go(None if begun is _NOBODY else begun)

    def raw_failed(self, error: BaseException) -> None:
        """A statement failed on the driver's own connection; of its own ones SQLAlchemy will tell."""
        if self.owner.in_flight is None and (self.phase.is_active or self.phase is Phase.COMMITTING):
            failure = classify(error) if isinstance(error, Exception) else None
            self.damage.add(error, failure=failure, hard=failure is not None and failure.kind in HARD)

    def raw_conflicted(self, error: Exception) -> None:
        """Take note of what is to be run again; on asyncpg it may be told when the unit is already rolling back."""
        failure = classify(error)
        if failure is None or failure.kind not in HARD or self.owner.in_flight is not None:
            return
        if self.phase.is_active or self.phase is Phase.COMMITTING:
            self.damage.add(error, failure=failure, hard=True)
        elif self.phase is Phase.ENDING and self.connect_failure is None:
            self.connect_failure = failure

    # -- streams

    def check_no_stream(self, what: str) -> None:
        """Refuse what would cut off a stream that is being read: MariaDB's drivers then drop its rows without an error.

        Raises:
            PropagationError: it is this task's own.
            TaskBoundaryError: another task reads it.
        """
        stream = self.stream
        if stream is None or stream.is_left() or stream.is_reading_here(self.database.family):
            return
        reader = stream.other_reader()
        by = "" if reader is None else f" by task {reader.get_name()!r}"
        message = (
            f"{what} in {self.name} while the rows of {stream.name} are still being read{by}; read it to its end or close it "
            "first, or read by pages"
        )
        if reader is not None:
            raise self.owner.refuse(message)
        error = PropagationError(message)
        if not self.scope_read:  # it has nothing to lose
            self.damage.add(error)
        raise error

    def close_left_stream(self) -> None:
        """Close a stream that was left in the middle, before something else is sent; in SQLAlchemy's greenlet."""
        stream = self.stream
        if stream is None or not stream.is_left():
            return
        try:
            stream.close()
        except Exception as error:
            if self.connection is None or self.connection.invalidated:
                return  # nothing is left to close but the driver's own object, which would warn that it was not
            self.damage.add(error, failure=classify(error), hard=True)
            raise

    def end_stream(self) -> None:
        """Let nobody read on what the end of its savepoint, or of the transaction, cuts off."""
        if self.stream is not None:
            self.stream.is_over = True

    def leave_stream(self) -> None:
        """The body has returned: nobody reads on a stream that it left in the middle.

        Raises:
            TaskBoundaryError: but for another task, which still does.
        """
        if self.stream is not None and self.stream.other_reader() is not None:
            self.check_no_stream("the end was reached")
        self.end_stream()

    # -- read-only

    def read_only_message(self, what: str) -> str:
        if self.scope_read:
            return (
                f"{what} in a session that only reads; write in a @transactional function: pass the key and get_one() "
                "the object inside, or open the unit around the read as well; never merge() it"
            )
        return f"{what} in {self.name}, which is read-only; drop read_only=True or keep the write out of it"

    # -- joined by a call

    def check_join(self, who: str, isolation: IsolationLevel | None, *, read_only: bool) -> None:
        """Refuse a call that needs more than this unit gives (others run SERIALIZABLE code at READ COMMITTED).

        Raises:
            IsolationConflictError: a stronger level, or read-write in read-only.
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
                strongest = self._required
                if strongest is None or not is_weaker_or_same(isolation, strongest[1]):
                    self._required = (who, isolation)
                return
            self._check_default(who, isolation)
        elif not is_weaker_or_same(isolation, self.isolation):
            raise IsolationConflictError(_stronger(who, isolation, self.isolation))

    def _check_default(self, who: str, isolation: IsolationLevel) -> None:
        default = self.database.default_isolation()
        if default is not None and not is_weaker_or_same(isolation, default):
            raise IsolationConflictError(_stronger(who, isolation, f"{default}, the default of the database"))


_NOBODY = object()


def _stronger(who: str, asked: str, given: str) -> str:
    return (
        f"{who} needs {asked} but joins a unit begun at {given}; begin the outer one at {asked} or "
        "use propagation='requires_new'"
    )


def transaction_of(session: Session | None) -> Transaction | None:
    """Return the unit's transaction behind a session, None for a session of nobody's unit."""
    transaction: Transaction | None = getattr(session, "transaction_of_unit", None)
    return transaction
