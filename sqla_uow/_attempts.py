"""The attempts of one call: run, classify, wait, run again."""

from __future__ import annotations

import asyncio
import logging
import sys
from typing import TYPE_CHECKING, Any, Generic
from weakref import WeakKeyDictionary

from sqlalchemy.exc import PendingRollbackError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm.exc import StaleDataError
from typing_extensions import TypeVar

from sqla_uow._classify import Failure, Kind, chain, classify
from sqla_uow._context import UnitPlace, surroundings
from sqla_uow._ending import Ended, commit, prepare, roll_back
from sqla_uow._loops import Loop, leads_back, loop_of
from sqla_uow._tasks import pop, push
from sqla_uow._unit import UnitOfWork
from sqla_uow.errors import (
    AfterCommitError,
    AmbiguousCommitError,
    ConflictError,
    PropagationError,
    StaleVersionError,
    TransactionTimeoutError,
)

if TYPE_CHECKING:
    from collections.abc import Coroutine
    from types import FrameType, TracebackType

    from sqlalchemy.orm import InstanceState, Session

    from sqla_uow._context import Scope
    from sqla_uow._manager import UnitOfWorkManager
    from sqla_uow._options import Options
    from sqla_uow._transaction import Transaction
    from sqla_uow._verify import Witness
    from sqla_uow._versions import Versions

__all__ = ["Attempt", "Attempts", "LoopedAttempts"]

logger = logging.getLogger("sqla_uow")
S = TypeVar("S", bound=AsyncSession, default=AsyncSession)


class Attempts(Generic[S]):
    """``async for attempt in ...: async with attempt as unit``: as many runs as the retries allow, or one that commits."""

    __slots__ = (
        "attempt", "deadline", "enclosing",
        "manager", "more", "options", "policy", "reading", "retries", "scope", "started", "tainted", "timeout",
    )  # fmt: skip

    def __init__(self, manager: UnitOfWorkManager[S], options: Options) -> None:
        self.manager = manager
        self.options = options
        self.policy = options.retry or manager.retry
        self.retries = manager.retries if options.retries is None else options.retries
        self.timeout = manager.timeout if options.timeout is None else options.timeout
        # The clock is read once per call, and again only on trouble.
        self.started = self.policy.clock()
        self.deadline = None if self.timeout is None else self.started + self.timeout
        self.attempt = 0
        self.scope: Scope | None
        self.scope, inside, self.enclosing = surroundings(manager)
        # Only an outermost call ends the scope's reading; around an inner one the outer unit still guards its objects.
        self.reading = None if inside else self.scope
        self.tainted: WeakKeyDictionary[InstanceState[Any], str] | None = self.scope.tainted if self.scope else None
        self.more = True

    def __aiter__(self) -> Attempts[S]:
        return self

    def __anext__(self) -> Coroutine[Any, Any, Attempt[S]]:
        return self._next()

    async def _next(self) -> Attempt[S]:
        if not self.more:
            raise StopAsyncIteration
        return self.next()

    def next(self) -> Attempt[S]:
        """Return the next attempt; the caller knows that there is one."""
        self.more = False
        self.attempt += 1
        return Attempt(self)

    @property
    def elapsed(self) -> float:
        return self.policy.clock() - self.started

    def will_go_on(self, frame: FrameType | None) -> bool:  # noqa: ARG002  # the decorator's own loop always does
        """Say whether the frame that leaves the attempt will ask for the next one."""
        return True

    async def go_on(self, failure: Failure, error: BaseException, frame: FrameType | None) -> None:
        """Wait before the next attempt.

        Raises:
            ConflictError: there is none.
            TransactionTimeoutError: the wait would cross the deadline.
        """
        if self.attempt > self.retries or not self.will_go_on(frame):
            raise self.gave_up(failure) from error
        wait = self.policy.delay(self.attempt - 1)
        if self.deadline is not None and self.policy.clock() + wait >= self.deadline:
            raise self.timed_out(f"{_of(failure)}, and the next wait would cross the deadline") from error
        logger.info(
            "%s: attempt %d of %d failed (%s); again in %.1f ms",
            self.options.who, self.attempt, self.retries + 1, _of(failure), wait * 1000,
        )  # fmt: skip
        await self.policy.sleep(wait)
        self.more = True

    def remember(self, transaction: Transaction, session: Session) -> None:
        """Remember the objects of a failed attempt: a new one keeps its key, a loaded one has lost its changes."""
        if self.tainted is None or self.tainted is (self.scope and self.scope.tainted):
            self.tainted = WeakKeyDictionary(self.tainted or {})
        transaction.taint(session, self.tainted, "attempt")

    def gave_up(self, failure: Failure) -> ConflictError:
        """Return the error for a failure that has outlived its retries."""
        who, runs, elapsed = self.options.who, self.attempt, self.elapsed
        plural = "attempt" if runs == 1 else "attempts"
        logger.warning("%s: gave up after %d %s and %.3f s (%s)", who, runs, plural, elapsed, _of(failure))
        attempts = "its only attempt" if runs == 1 else f"each of {runs} attempts"
        remedy = "give it retries" if self.retries == 0 else "call it again later, or shorten the transaction"
        if runs <= self.retries:
            attempts = f"attempt {runs} of {self.retries + 1}, which leaves its loop,"
            remedy = "let the block come to its end, return or break behind the loop, or use @transactional"
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
    """The attempts of a loop that somebody else wrote, and may leave by ``break`` or ``return``."""

    __slots__ = ("_loop",)

    def __init__(self, manager: UnitOfWorkManager[S], options: Options) -> None:
        super().__init__(manager, options)
        self._loop: Loop | None = None

    def __anext__(self) -> Coroutine[Any, Any, Attempt[S]]:  # no coroutine function: its caller's frame is the loop's
        self._loop = loop_of(sys._getframe(1)) if self.retries else None
        return super().__anext__()

    def will_go_on(self, frame: FrameType | None) -> bool:
        """Say whether the end of the block leads back to the loop; if not, nothing may be swallowed."""
        return leads_back(frame, self._loop)


def _is_timeout(error: Exception) -> bool:
    """Say whether the server ended a statement for its time, or nothing answered in time."""
    failure = classify(error)
    return isinstance(error, TimeoutError) if failure is None else failure.kind is Kind.SERVER_TIMEOUT


def _of(failure: Failure) -> str:
    return failure.kind.value if failure.code is None else f"{failure.kind.value} {failure.code}"


class Attempt(Generic[S]):
    """One run of the body in a unit of its own."""

    __slots__ = ("_attempts", "_place", "_timeout", "_witness", "unit")

    def __init__(self, attempts: Attempts[S]) -> None:
        self._attempts = attempts
        self._place: UnitPlace | None = None
        self._timeout: asyncio.Timeout | None = None
        self._witness: Witness | None = None
        self.unit: UnitOfWork[S] | None = None

    async def __aenter__(self) -> UnitOfWork[S]:
        attempts, options = self._attempts, self._attempts.options
        if self.unit is not None:
            raise PropagationError(f"a unit of {options.who} was entered twice; a unit is used once, begin a new one")
        if attempts.reading is not None:
            await attempts.reading.give_way()
        manager = attempts.manager
        transaction = manager._transaction(
            options.who,
            isolation=options.isolation or manager.isolation,
            read_only=options.read_only,
            deadline=attempts.deadline,
            clock=attempts.policy.clock,
            tainted=attempts.tainted,
            enclosing=attempts.enclosing,
        )
        is_last = attempts.attempt > attempts.retries
        if not is_last:
            transaction.on_rollback = attempts.remember
        unit = self.unit = UnitOfWork(transaction, attempt=attempts.attempt, is_last_attempt=is_last)
        self._witness = manager._witness(transaction)
        self._place = UnitPlace(manager, unit)
        push(self._place)
        if attempts.deadline is not None:
            # Its own timer, so that the deadline also ends what is no SQL.
            self._timeout = asyncio.timeout(attempts.deadline - attempts.policy.clock())
            await self._timeout.__aenter__()
        return unit

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        unit, place, attempts = self.unit, self._place, self._attempts
        if unit is None or place is None:
            raise PropagationError(f"a unit of {attempts.options.who} was left before it was entered")
        if place.closed:
            raise PropagationError(
                f"a unit of {attempts.options.who} was left twice; use each unit in one 'async with'"
            )
        final = True
        try:
            ended = await self._end(unit, place, error)
            if ended.error is None:
                return error is None
            final = not await self._retry(unit, ended, sys._getframe(1))
            if not final:
                return True
            if ended.error is error:
                return False
            raise ended.error
        finally:
            if final and attempts.reading is not None:
                await attempts.reading.end_what_gave_way()

    async def _end(self, unit: UnitOfWork[S], place: UnitPlace, error: BaseException | None) -> Ended:
        """Commit or roll back, whatever happens; never raises."""
        transaction, scope = unit._transaction, self._attempts.scope
        mark = transaction.damage.mark
        quiet = error is None and mark is not None and mark.quiet
        witness = self._witness
        if error is None and not quiet:
            try:
                await prepare(unit, scope.refuse_unsaved if scope is not None else None)
                if witness is not None and transaction.wrote:
                    await witness.get_ready()
            except BaseException as raised:
                error = raised
        if self._timeout is not None:
            error = await self._disarm(self._timeout, error)
        pop(place)
        place.empty()
        if error is None and not quiet:
            ended = await commit(unit, witness)
        else:
            ended = await roll_back(unit, error)
        if witness is not None:
            witness.settle(unit.status)
        return ended

    async def _disarm(self, timeout: asyncio.Timeout, error: BaseException | None) -> BaseException | None:
        """Stop the timer: COMMIT is not cut off by it.  Turn its cancellation into our error."""
        try:
            await timeout.__aexit__(type(error) if error is not None else None, error, None)
            if timeout.expired() and error is None:
                await asyncio.sleep(0)  # its cancellation is on the way; take it here, not in the middle of COMMIT
        except TimeoutError:
            return self._timed_out(error)
        except asyncio.CancelledError as cancelled:
            return self._timed_out(cancelled)
        # Cancelled by somebody else as well: asyncio leaves the task to them, and so do we.
        if not timeout.expired() or isinstance(error, asyncio.CancelledError):
            return error
        return self._timed_out(error)

    def _timed_out(self, error: BaseException | None) -> TransactionTimeoutError:
        timed_out = self._attempts.timed_out("the deadline passed")
        timed_out.__cause__ = error
        return timed_out

    async def _retry(self, unit: UnitOfWork[S], ended: Ended, frame: FrameType) -> bool:
        """Wait for the next attempt if there is one; raise what a failure becomes if there is none."""
        error = ended.error
        assert error is not None
        if not isinstance(error, Exception) or isinstance(error, (AmbiguousCommitError, AfterCommitError)):
            return False
        attempts = self._attempts
        if isinstance(error, TransactionTimeoutError):
            return False
        if attempts.deadline is not None and _is_timeout(error) and attempts.policy.clock() >= attempts.deadline:
            raise self._timed_out(error)
        failure = ended.failure if ended.failure and ended.failure.retryable else self._failure(unit, error)
        if unit._transaction.versions is not None and unit._transaction.versions.expectations:
            await self._check_expectations(unit._transaction.versions, failure, error)
        if failure is None:
            return False
        await attempts.go_on(failure, error, frame)
        return True

    async def _check_expectations(self, versions: Versions, failure: Failure | None, error: Exception) -> None:
        """Raise where a client's version is stale: running the body again cannot make it fresh.

        Under snapshot isolation the database reports the same race as a conflict (40001; MariaDB 1020), so then the
        versions are read afresh.
        """
        attempts = self._attempts
        if isinstance(error, StaleVersionError):
            error.attempts, error.elapsed = attempts.attempt, attempts.elapsed
            raise error
        surely = any(isinstance(link, StaleDataError) for link in chain(error))
        if not surely and (failure is None or failure.kind not in (Kind.CONFLICT, Kind.LOCK_TIMEOUT)):
            return
        stale: StaleVersionError | None = None
        try:
            stale = await versions.find_stale(attempts.manager.engine)
        except (SQLAlchemyError, OSError) as trouble:
            logger.warning(
                "the expected versions of %s could not be read (%s)", attempts.options.who, type(trouble).__name__
            )
        if stale is None and surely:
            stale = versions.stale(attempts.options.who)
        if stale is not None:
            stale.attempts, stale.elapsed = attempts.attempt, attempts.elapsed
            raise stale from error

    def _failure(self, unit: UnitOfWork[S], error: Exception) -> Failure | None:
        """Find the retryable failure of this unit's own connection, flush or COMMIT behind `error`."""
        transaction, options = unit._transaction, self._attempts.options
        chained = list(chain(error))
        links = {id(link) for link in chained}
        mark = transaction.damage.mark
        if mark is not None and mark.failure is not None and mark.failure.retryable:
            forced = mark.hard and mark.failure.kind in (Kind.CONFLICT, Kind.LOCK_TIMEOUT)
            # SQLAlchemy's answer to SQL, a RELEASE say, after a failure that was swallowed; it does not name that one.
            aftermath = any(isinstance(link, PendingRollbackError) for link in chained)
            if forced or aftermath or id(mark.cause) in links or id(mark.failure.error) in links:
                return mark.failure
        refused = transaction.connect_failure
        if refused is not None and refused.retryable and id(refused.error) in links:
            return refused
        if options.retry_on is not None and options.retry_on(error):
            return Failure(Kind.CHOSEN, None, error)
        return None
