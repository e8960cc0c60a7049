"""What a manager tells its observers: that a run of a body begins, that it will be run again, and how the call ended.

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
    """The call that an event belongs to.  All events of one call have the same object, so it can be a key."""

    __slots__ = ("__weakref__",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """What every event says.

    Attributes:
        call: the call that the event belongs to.
        function: the name of what was called: ``transfer()``; for blocks ``begin()`` or ``attempts()``; for an atomic
            request ``POST /accounts/{id}``, or ``POST request`` before it has its route.
        manager: the manager's name.
        system: the database: ``postgresql``, ``cockroachdb``, ``mariadb``, ``mysql`` or ``sqlite``; MariaDB behind the
            dialect "mysql" is recognised with the engine's first connection.
        namespace: the name of the database, None if the engine's URL has none; for SQLite the file.
        attempt: the number of the run, from 1; in an outcome it may be a run that never got its turn.
        retries: how often the body may be run again.
        isolation: the level asked for; None is the database's default.
        read_only: whether writes are refused.
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
        connection_seconds: seconds until the run had its connection: it waited for the pool, for a new connection or,
            on SQLite, for its turn to write; None if it needed none.
        commit_at: when COMMIT was begun, in seconds since the call began; None if no COMMIT was sent.
        commit_seconds: seconds until COMMIT was answered or given up.
    """

    error: type[BaseException] | None
    connection_seconds: float | None
    commit_at: float | None
    commit_seconds: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryEvent(EndEvent):
    """A run has failed and is rolled back; another one follows after a wait.

    Attributes:
        reason: as in `ConflictError.reason`.
        code: the driver's code, or None.
        wait: seconds until the next run.
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
        reason: why the last run failed, if the call gave up, as in `ConflictError.reason`; else None.
        code: the driver's code of that failure, or None.
    """

    gave_up: bool
    doomed: bool
    reason: str | None
    code: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class IdleEvent(Event):
    """A unit has held its connection, its transaction and its locks without sending anything: it called something slow.

    The observer is told when the unit goes on: at its next statement or at its end.

    Attributes:
        idle: seconds between two statements, or between the last one and the end of the body.
    """

    idle: float


class Observer:
    """The base of objects that are told what the calls of a manager do.  Subclass it and override what you need.

    Attributes:
        idle_seconds: after how many idle seconds `on_idle` is called.

    The methods are called, not awaited, in the task or thread where it happens: be quick.  If one raises an `Exception`
    or a `CancelledError`, that is logged with its traceback and changes nothing.  What ends the program, such as
    `KeyboardInterrupt`, goes on.
    """

    idle_seconds: float = 1.0

    def on_attempt(self, event: AttemptEvent, /) -> None:
        """Take note that a run of the body begins; a context variable that is set here is seen in the body.

        Args:
            event: the run that begins, and its call.
        """

    def on_retry(self, event: RetryEvent, /) -> None:
        """Take note that a run has failed, and that another one follows after a wait.

        Args:
            event: why, and how long the wait is.
        """

    def on_outcome(self, event: OutcomeEvent, /) -> None:
        """Take note of how a call has ended.

        Args:
            event: how the call ended.
        """

    def on_idle(self, event: IdleEvent, /) -> None:
        """Take note that a unit was idle in its transaction; the clock is read only if this is overridden.

        Args:
            event: which unit, and how long.
        """
