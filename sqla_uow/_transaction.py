"""One physical transaction: its phase, its owner, its damage, and the rules that SQLAlchemy's events are held to.

Synchronous throughout: `_session` and `_connection` call in from inside SQLAlchemy, `_commit` and `_rollback` finish it.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Any, NoReturn

from greenlet import getcurrent

from sqla_uow._classify import HARD, Failure, Kind, classify, hidden_conflict
from sqla_uow._damage import Damage
from sqla_uow._hooks import Hooks
from sqla_uow._isolation import is_weaker_or_same
from sqla_uow._tasks import Owner
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
    from collections.abc import Callable, Mapping
    from weakref import WeakSet

    from greenlet import greenlet
    from sqlalchemy.engine import Connection, Engine
    from sqlalchemy.orm import InstanceState, Session

    from sqla_uow._contention import Slot
    from sqla_uow._database import Database
    from sqla_uow._instances import Tainted
    from sqla_uow._observing import Times
    from sqla_uow._replicas import LastWrite, Replica, Replicas
    from sqla_uow._versions import Versions
    from sqla_uow.typing import IsolationLevel

__all__ = ["Phase", "Transaction", "transaction_of"]


class Phase(enum.Enum):
    """Where the transaction stands; the order is the order of life."""

    NEW = "open", "new"
    ACTIVE = "open", "active"
    COMMITTING = "ending", "committing"  # ours to commit: flushes and the COMMIT itself pass
    SENT = "ending", "sent"  # COMMIT has been handed to the driver
    ENDING = "ending", "rolling back or closing"
    YIELDED = "over", "yielded"  # a read session that gave way: objects readable, SQL refused
    ENDED = "over", "ended"

    def __init__(self, stage: str, label: str) -> None:
        self.label: str = label
        # Attributes, because they are asked several times a statement: hashing a member runs Python code, and so does
        # looking one up by its name on Python 3.11.
        self.is_open: bool = stage == "open"
        self.is_active: bool = label == "active"
        self.is_ending: bool = stage == "ending"
        self.is_over: bool = stage == "over"


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
        "clock",
        "closer",
        "connect_failure",
        "connection",
        "damage",
        "database",
        "deadline",
        "enclosing",
        "engine",
        "hooks",
        "isolation",
        "joined",
        "last_write",
        "lock_wait",
        "name",
        "on_rollback",
        "owner",
        "pending_savepoint",
        "phase",
        "read_only",
        "replica",
        "replicas",
        "rolling_back_to_savepoint",
        "scope_read",
        "slot",
        "stale",
        "tainted",
        "times",
        "versions",
        "wrote",
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
        self.hooks: Hooks = Hooks()
        self.damage: Damage = Damage(self.hooks)
        self.owner: Owner = Owner(name, self.damage)
        self.phase: Phase = Phase.NEW
        self.closer: greenlet | None = None
        self.engine: Engine | None = None
        self.connection: Connection | None = None
        self.connect_failure: Failure | None = None
        self.attached: WeakSet[InstanceState[Any]] | None = None
        self.on_rollback: Callable[[Transaction, Session], None] | None = None
        self.joined: int = 0
        self.slot: Slot | None = None
        self.lock_wait: float | None = None  # seconds that a lock may be waited for; None is for ever
        self.wrote: bool = False
        self.pending_savepoint: str | None = None
        self.rolling_back_to_savepoint: bool = False
        self.replicas: Replicas | None = None  # where it may read
        self.replica: Replica | None = None  # where it does
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
                "the read session of this scope gave way to a transaction; "
                "use current_session(), and read again what you need inside it"
            )
        if phase is Phase.ENDED:
            raise NoUnitError(f"{self.name} has ended and its session is closed; open a new unit for more SQL")

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
            raise NoUnitError(f"{self.name} is ending and takes no more SQL; open a new unit for it")

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
            raise RollbackOnlyError(
                f"{self.name} can only be rolled back: {self.why()}; let the error leave the function, or guard the step "
                "that may fail with propagation='nested'"
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
        elif (self.phase.is_ending and self.is_ending_here()) or self.rolling_back_to_savepoint:
            return
        else:
            self.check_usable()
        if self.read_only and writes:
            raise ReadOnlyError(self.read_only_message("an INSERT, UPDATE or DELETE was sent"))
        owner.in_flight = owner.last

    def refuse_control(self, word: str) -> NoReturn:
        """Refuse SQL that would end the transaction behind SQLAlchemy's back, and ours."""
        self.owner.leave()
        error = PropagationError(
            f"{word} was sent as SQL inside {self.name}, which begins and ends its transaction itself; leave it to the unit, "
            "call doom() to roll back, or use propagation='nested' for a part"
        )
        self.damage.add(error, hard=True)
        raise error

    def after_statement(self) -> None:
        if self.pending_savepoint:
            self.damage.savepoint(self.pending_savepoint)
        self.pending_savepoint = None
        self.rolling_back_to_savepoint = False
        self.owner.in_flight = None
        if self.owner.idle is not None:
            self.owner.leave()

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

    def before_rollback(self, cause: BaseException | None) -> None:
        """A ROLLBACK is about to be sent: not under another task's statement."""
        if self.phase.is_open:
            self.owner.check()
        self.rolled_back_outside(cause)

    def rolled_back_outside(self, cause: BaseException | None) -> None:
        """SQLAlchemy has ended the transaction: a flush failed, or user code called ``rollback()``."""
        if not self.phase.is_open:
            return
        failure = classify(cause) if isinstance(cause, Exception) else None
        if cause is None or (failure is None and self.damage.mark is None):
            self.damage.add(cause, hard=True, reason="its transaction was rolled back inside the body")
        else:
            self.damage.add(cause, hard=True, failure=failure)

    def before_commit(self) -> None:
        """The engine is about to send COMMIT: only ours, only a sound one."""
        if self.phase is not Phase.COMMITTING or not self.is_ending_here():
            error = PropagationError(
                f"COMMIT was called inside {self.name}, which commits at its own end; remove the commit() "
                "or use propagation='requires_new' for a part that must be durable earlier"
            )
            self.damage.add(error, hard=True)
            raise error
        self.check_sound()
        if self.database.is_open(self.connection):
            self.phase = Phase.SENT

    # -- read-only

    def read_only_message(self, what: str) -> str:
        if self.scope_read:
            return (
                f"{what} in the read session of a scope; write in a @transactional function: pass the key and get_one() "
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


def _stronger(who: str, asked: str, given: str) -> str:
    return (
        f"{who} needs {asked} but joins a unit begun at {given}; begin the outer one at {asked} or "
        "use propagation='requires_new'"
    )


def transaction_of(session: Session | None) -> Transaction | None:
    """Return the unit's transaction behind a session, None for a session of nobody's unit."""
    transaction: Transaction | None = getattr(session, "transaction_of_unit", None)
    return transaction
