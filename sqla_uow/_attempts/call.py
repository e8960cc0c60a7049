"""The attempts of one call: how many there are, the waits between them, and what the last failure becomes."""

from __future__ import annotations

import logging
import sys
import time
from typing import TYPE_CHECKING, Any, Generic

from sqlalchemy.ext.asyncio import AsyncSession
from typing_extensions import TypeVar

from sqla_uow._attempts.arguments import Called, renew
from sqla_uow._attempts.attempt import Attempt
from sqla_uow._attempts.loop import Loop, leads_back, loop_of
from sqla_uow._attempts.observers import Times, tell_attempt, tell_outcome, tell_retry
from sqla_uow._databases.failures import Failure, Kind
from sqla_uow._log import record
from sqla_uow._scope.lookup import surroundings
from sqla_uow._session.instances import Tainted, taint
from sqla_uow._unit.options import Options, block_options
from sqla_uow._unit.statistics import name_of
from sqla_uow.errors import (
    ConflictError,
    InstanceReuseError,
    RollbackOnlyError,
    StaleVersionError,
    TransactionTimeoutError,
)
from sqla_uow.events import Call
from sqla_uow.typing import IsolationLevel, Status

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine
    from types import FrameType

    from sqlalchemy.orm import Session

    from sqla_uow._retry.controller import Gate
    from sqla_uow._scope.scope import Scope
    from sqla_uow._transaction.transaction import Transaction
    from sqla_uow._unit.setup import Setup

__all__ = ["Attempts", "LoopedAttempts", "rehearsals"]

S = TypeVar("S", bound=AsyncSession, default=AsyncSession)


rehearsals: list[Callable[[Attempts[Any], Callable[[], Coroutine[Any, Any, object]]], Awaitable[None]]] = []
"""Awaited before the first attempt of each transactional function, with its attempts and what runs its body."""


def _of(failure: Failure) -> str:
    return failure.kind.value if failure.code is None else f"{failure.kind.value} {failure.code}"


class Attempts(Generic[S]):
    """As many runs as the retries allow, or one that commits: `next` as long as there are `more`."""

    __slots__ = (
        "attempt", "call", "called", "deadline", "enclosing", "function", "gate", "given_up", "isolation", "more", "observers",
        "options", "policy", "reading", "retries", "scope", "setup", "started", "tainted", "timeout", "times",
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
        self.scope: Scope | None
        self.scope, inside, self.enclosing = surroundings(setup)
        # Only an outermost call ends the scope's reading; around an inner one the outer unit still guards its objects.
        self.reading = None if inside else self.scope
        self.tainted: Tainted | None = self.scope.tainted if self.scope else None
        self.more = True
        self.function = function or options  # whose calls take turns with this one
        self.gate: Gate | None = None
        self.given_up: Failure | None = None
        self.called: tuple[Any, ...] | None = None  # the fields of a `Called`, which takes longer to make
        self.observers = setup.observers
        if self.scope is not None and self.scope.observers:
            self.observers += self.scope.observers
        self.call: Call | None
        self.times: Times | None
        if self.observers:
            self.call, self.times = Call(), None

    def next(self) -> Attempt[S]:
        """Return the next attempt; the caller knows that there is one."""
        self.more = False
        self.attempt += 1
        if self.attempt == 1 and self.retries:
            self._count_in()
        return Attempt(self)

    def beside(self, timeout: float | None) -> Attempt[S]:
        """Return a unit of its own that only reads.

        Args:
            timeout: seconds for it; None is the manager's.
        """
        options = block_options(
            who="begin()", isolation=None, read_only=True, propagation="requires_new", retries=0, timeout=timeout
        )
        return Attempts(self.setup, options).next()

    def _count_in(self) -> None:
        """Take part in what the calls that may be run again share: their budget, and their turns."""
        self.setup.database.budget.earn()
        # Whoever is in a unit holds a connection and locks, so it never waits for a turn; its outermost call did.
        if not self.enclosing and self.policy.contention == "auto":
            self.gate = self.setup.gate(self.function, name_of(self.function), self.policy.clock)

    @property
    def elapsed(self) -> float:
        return self.policy.clock() - self.started

    def will_go_on(self, frame: FrameType) -> bool:  # noqa: ARG002  # the decorator's own loop always does
        """Say whether the frame that leaves the attempt will ask for the next one."""
        return True

    async def go_on(self, failure: Failure, error: Exception, frame: FrameType, *, is_last: bool) -> None:
        """Wait before the next attempt.

        Args:
            failure: what the last one met.
            error: what it raised.
            frame: that leaves it.
            is_last: somebody has said that it was the last.

        Raises:
            ConflictError: there is none.
            InstanceReuseError: it would miss what this one has used up of the arguments.
            TransactionTimeoutError: the wait would cross the deadline.
        """
        is_last = is_last or self.attempt > self.retries
        if is_last or not self.will_go_on(frame):
            raise self.gave_up(failure, is_last=is_last) from error
        if self.called is not None:
            try:
                await renew(Called._make(self.called), self.attempt)
            except InstanceReuseError as refused:
                raise refused from error
        wait = self.policy.delay(self.attempt - 1)
        if failure.kind in (Kind.NOT_STARTED, Kind.LOST):
            soonest = self.setup.database.budget.reserve(time.monotonic(), patience=self.policy.cap)
            if soonest is None:
                raise self.gave_up(failure, spent=True) from error
            wait = max(wait, soonest)
        if self.deadline is not None and self.policy.clock() + wait >= self.deadline:
            raise self.timed_out(f"{_of(failure)}, and the next wait would cross the deadline") from error
        record(
            logging.INFO, "%s: attempt %d of %d failed (%s); again in %.1f ms",
            self.options.who, self.attempt, self.retries + 1, _of(failure), wait * 1000,
            **self._fields(failure), wait=wait,
        )  # fmt: skip
        if self.observers:
            tell_retry(self, failure, error, wait)
        if self.gate is None:
            await self.policy.sleep(wait)
        else:
            await self.gate.back_off(self.policy.sleep, wait)
        self.setup.counts.retried(failure)
        self.more = True

    def lock_wait(self, gate: Gate) -> float | None:
        """Return how long the attempt that begins now should wait for locks, in seconds; None is for ever."""
        longest = gate.lock_wait(self.attempt)
        # Two that wait for each other began at the same time: with the same patience both would go, and meet again.
        return None if longest is None else max(longest / 2, self.policy.rng(longest / 2, longest))

    def _fields(self, failure: Failure) -> dict[str, Any]:
        """Return what a record says of a failed run."""
        return {
            "function": self.options.who, "manager": self.setup.name, "attempt": self.attempt,
            "attempts": self.retries + 1, "reason": failure.kind.value, "code": failure.code,
        }  # fmt: skip

    def begins(self) -> None:
        """Tell those who want to know that the next run has its turn."""
        self.times = Times(self.policy.clock)
        tell_attempt(self)

    def over(self, status: Status, error: BaseException | None, *, finished: bool = False) -> None:
        """Count and tell what became of the call.

        Args:
            status: of its last unit.
            error: what it ends with.
            finished: the body came to its end.
        """
        doomed = False
        if status is Status.COMMITTED:
            self.setup.counts.committed += 1
        else:
            refused = error is None or isinstance(error, RollbackOnlyError)
            doomed = finished and refused and status is Status.ROLLED_BACK
            self.setup.counts.failed(status, error, gave_up=self.given_up is not None, doomed=doomed)
        if self.observers:
            tell_outcome(self, status, error, doomed=doomed)

    def remember(self, transaction: Transaction, session: Session) -> None:
        """Remember the objects of a failed attempt: a new one keeps its key, a loaded one has lost its changes."""
        if self.tainted is None or self.tainted is (self.scope and self.scope.tainted):
            self.tainted = Tainted() if self.tainted is None else self.tainted.copy()
        taint(transaction, session, self.tainted, "attempt")

    def gave_up(self, failure: Failure, *, is_last: bool = True, spent: bool = False) -> ConflictError:
        """Return the error for a failure that has outlived its retries, or the budget that all calls have for them."""
        who, runs, elapsed = self.options.who, self.attempt, self.elapsed
        plural = "attempt" if runs == 1 else "attempts"
        self.given_up = failure
        record(
            logging.WARNING, "%s: gave up after %d %s and %.3f s (%s)", who, runs, plural, elapsed, _of(failure),
            **self._fields(failure), elapsed=elapsed,
        )  # fmt: skip
        attempts = "its only attempt" if self.retries == 0 else f"each of {runs} attempts"
        remedy = "give it retries" if self.retries == 0 else "call it again later, or shorten the transaction"
        if is_last and runs <= self.retries:
            attempts = f"attempt {runs} of {self.retries + 1}, which was made the last,"
        elif runs <= self.retries:
            attempts = f"attempt {runs} of {self.retries + 1}, which leaves its loop,"
            remedy = "let the block come to its end, return or break behind the loop, or use @transactional"
        if spent:
            attempts = f"attempt {runs} of {self.retries + 1}, and too many calls wait to be run again,"
            remedy = "call it again later, when the database answers"
        error_class = StaleVersionError if failure.kind is Kind.STALE else ConflictError
        return error_class(
            f"{who} failed in {attempts} within {elapsed:.3f} s, last by {_of(failure)}; {remedy}",
            attempts=runs, elapsed=elapsed, reason=failure.kind.value, code=failure.code,
        )  # fmt: skip

    def timed_out(self, why: str) -> TransactionTimeoutError:
        """Return the error for a deadline that has passed, or that the next wait would cross."""
        assert self.timeout is not None
        return TransactionTimeoutError(
            f"{self.options.who} did not finish within {self.timeout:g} s: {why} in attempt {self.attempt}; "
            "raise the timeout, or shorten the transaction",
            attempts=self.attempt, elapsed=self.elapsed, timeout=self.timeout,
        )  # fmt: skip


class LoopedAttempts(Attempts[S]):
    """``async for attempt in ...: async with attempt as unit``: a loop that may be left by ``break`` or ``return``."""

    __slots__ = ("_loop",)

    def __init__(self, setup: Setup[S], options: Options, function: object) -> None:
        super().__init__(setup, options, function)
        self._loop: Loop | None = None

    def __aiter__(self) -> LoopedAttempts[S]:
        return self

    def __anext__(self) -> Coroutine[Any, Any, Attempt[S]]:  # no coroutine function: its caller's frame is the loop's
        if self.more:
            self._loop = loop_of(sys._getframe(1)) if self.retries else None
        return self._next()

    async def _next(self) -> Attempt[S]:
        if not self.more:
            raise StopAsyncIteration
        return self.next()

    def will_go_on(self, frame: FrameType) -> bool:
        """Say whether the end of the block leads back to the loop; if not, nothing may be swallowed."""
        return leads_back(frame, self._loop)
