"""What a manager tells its observers: a run of a body begins, is to be run again, and what became of the call.

::

    class Conflicts(Observer):
        def on_retry(self, event: RetryEvent) -> None:
            print(event.function, event.reason, event.code)

    manager = UnitOfWorkManager(engine, observers=[Conflicts()])

A *call* is what begins units of its own: an outermost transactional function, one with ``propagation="requires_new"``, a
block of `begin()` or `attempts()`, an atomic request.  Joined functions, savepoints and read sessions are not counted as
calls.  An event never holds SQL, parameters or URLs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sqla_uow.typing import IsolationLevel, Status

__all__ = ["AttemptEvent", "Call", "EndEvent", "Event", "IdleEvent", "Observer", "OutcomeEvent", "RetryEvent"]


class Call:
    """Which call an event is of: the same object in all events of one, and of no other; good as a key."""

    __slots__ = ("__weakref__",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """What every event says.

    Attributes:
        call: which call it is of.
        function: whose: ``transfer()``; ``begin()`` and ``attempts()`` for blocks; an atomic request is
            ``POST /accounts/{id}``, or ``POST request`` before it has its route.
        manager: its name.
        system: the database: ``postgresql``, ``cockroachdb``, ``mariadb``, ``mysql`` or ``sqlite``; MariaDB behind the dialect "mysql" is
            known as such from the engine's first connection on.
        namespace: the name of the database, None where the engine's URL has none; for SQLite the file.
        attempt: which run of the body, from 1; in an outcome it may be one that never came to its turn.
        retries: how often the body may be run again.
        isolation: the level asked for; None is the database's default.
        read_only: writes are refused.
        status: where the unit of this run stands.
        elapsed: seconds since the call began, by the clock of its `RetryPolicy`.
    """

    call: Call
    function: str
    manager: str
    system: str
    namespace: str | None
    attempt: int
    retries: int
    isolation: IsolationLevel | None
    read_only: bool
    status: Status
    elapsed: float


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptEvent(Event):
    """A run of the body is about to begin; the call has had its turn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EndEvent(Event):
    """What the end of a run says.

    Attributes:
        error: the class of what the run, or the call, ended with; None for success.
        connection_seconds: until the run had its connection: it waited for the pool, for a new one to be made, or, on
            SQLite, for its turn to write; None where it needed none.
        commit_at: when COMMIT was begun, in seconds since the call began; None where none was sent.
        commit_seconds: until COMMIT was answered, or given up.
    """

    error: type[BaseException] | None
    connection_seconds: float | None
    commit_at: float | None
    commit_seconds: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryEvent(EndEvent):
    """A run has failed and is rolled back; after a wait there is another.

    Attributes:
        reason: as in `ConflictError.reason`.
        code: the driver's, or None.
        wait: seconds.
    """

    reason: str
    code: str | None
    wait: float


@dataclass(frozen=True, slots=True, kw_only=True)
class OutcomeEvent(EndEvent):
    """A call has ended; `attempt` is how many runs it took, and `status` what became of the last one.

    Its hooks have run.  A loop of `attempts()` that is left between two runs has no outcome.

    Attributes:
        gave_up: a failure has outlived its retries.
        doomed: the body came to its end, and was rolled back all the same.
        reason: of the last failure where it gave up, as in `ConflictError.reason`; else None.
        code: likewise, of the driver.
    """

    gave_up: bool
    doomed: bool
    reason: str | None
    code: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class IdleEvent(Event):
    """A unit has held its connection, its transaction and its locks without sending anything: it called something slow.

    Told when it goes on, by a statement or by its end.

    Attributes:
        idle: seconds between two statements, or between the last one and the end of the body.
    """

    idle: float


class Observer:
    """Is told what the calls of a manager do.  Subclass it and override what is of interest.

    Attributes:
        idle_seconds: from how many seconds on `on_idle` is called.

    Called in the task, or thread, where it happens, without await: be quick.  An `Exception` that is raised, or a
    `CancelledError`, is logged with its traceback and changes nothing; what ends the program, as `KeyboardInterrupt`, goes on.
    """

    idle_seconds: float = 1.0

    def on_attempt(self, event: AttemptEvent, /) -> None:
        """Take note that a run of the body begins; a context variable that is set here is seen in the body.

        Args:
            event: which run, of what.
        """

    def on_retry(self, event: RetryEvent, /) -> None:
        """Take note that a run has failed, and that there is another after a wait.

        Args:
            event: why, and how long the wait is.
        """

    def on_outcome(self, event: OutcomeEvent, /) -> None:
        """Take note of how a call has ended.

        Args:
            event: what became of it.
        """

    def on_idle(self, event: IdleEvent, /) -> None:
        """Take note that a unit was idle in its transaction; nobody looks at the clock where this is not overridden.

        Args:
            event: which unit, and how long.
        """
