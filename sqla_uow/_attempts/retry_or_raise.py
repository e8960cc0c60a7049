"""What a failed run becomes: another one, or the error of the call."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

from sqlalchemy.exc import SQLAlchemyError, StatementError
from sqlalchemy.orm.exc import StaleDataError

from sqla_uow._attempts.arguments import Called, renew
from sqla_uow._attempts.observers import tell_retry
from sqla_uow._databases.failures import Failure, Kind, chain, classify
from sqla_uow._log import log
from sqla_uow._retry.predicates import ask
from sqla_uow._transaction.failing import failure_behind
from sqla_uow._unit.options import LateName
from sqla_uow._unit.statistics import name_of
from sqla_uow.errors import (
    AfterCommitError,
    AmbiguousCommitError,
    ConflictError,
    InstanceReuseError,
    RollbackOnlyError,
    StaleVersionError,
    TransactionTimeoutError,
    UnitOfWorkError,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractAsyncContextManager
    from types import FrameType
    from typing import TypeAlias, TypeVar

    from sqlalchemy.ext.asyncio import AsyncSession

    from sqla_uow._attempts.call import Call
    from sqla_uow._retry.groups import Groups, Member
    from sqla_uow._transaction.transaction import Transaction, VersionGuard
    from sqla_uow._unit.ending import Ended
    from sqla_uow._unit.unit import UnitOfWork

    S = TypeVar("S", bound=AsyncSession)

    _Beside: TypeAlias = Callable[[Call[S], float | None], AbstractAsyncContextManager[UnitOfWork[S], bool | None]]

__all__ = ["retry_or_raise", "timed_out"]

_CONTENDED = (Kind.CONFLICT, Kind.LOCK_TIMEOUT, Kind.STALE, Kind.CHOSEN)


async def retry_or_raise(
    call: Call[S],
    transaction: Transaction,
    ended: Ended,
    frame: FrameType,
    *,
    is_last: bool,
    beside: _Beside[S],
) -> bool:
    """Wait for the next attempt if there is one; raise what a failure becomes if there is none.

    Args:
        call: whose run has failed.
        transaction: of that run.
        ended: how it ended, with an error.
        frame: leaves the attempt.
        is_last: somebody has said that it was the last attempt.
        beside: begins a unit that only reads, within so many seconds.

    Returns:
        whether there is another attempt; if not, the error of the run is that of the call.

    Raises:
        ConflictError: the failure could be retried, but there is no attempt left.
        InstanceReuseError: the next one would miss what this one has used up of the arguments.
        TransactionTimeoutError: the deadline has passed, or the wait would cross it.
    """
    error = ended.error
    if not isinstance(error, Exception) or isinstance(
        error, (AmbiguousCommitError, AfterCommitError, TransactionTimeoutError)
    ):
        return False
    if call.deadline is not None and _is_timeout(error) and call.policy.clock() >= call.deadline:
        raise timed_out(call, "the deadline passed", error)
    failure = ended.failure if ended.failure and ended.failure.retryable else _failure(call, transaction, error)
    groups = call.groups
    if groups is not None and failure is not None and failure.kind in _CONTENDED:
        groups.conflict(member_of(call, groups), _statement(error), call.policy.clock)
        if transaction.turn is not None:
            transaction.turn.conflicted()
    versions = transaction.versions
    if versions is not None and versions.expectations:
        await _check_expectations(call, versions, failure, error, beside)
    if failure is None:
        return False
    try:
        await _wait(call, transaction, failure, error, frame, is_last=is_last)
    except StaleVersionError as gave_up:
        named = failure.error
        if not isinstance(named, StaleVersionError):
            await _name(call, gave_up, versions, beside)
            raise
        named.attempts, named.elapsed = gave_up.attempts, gave_up.elapsed
        if named is error:
            return False
        raise named from error
    call.more = True
    return True


def member_of(call: Call[S], groups: Groups) -> Member:
    """Return what is known of a call's function, or of its request's route."""
    who = call.options.who
    return groups.member(str(who) if isinstance(who, LateName) else call.function, name_of)


def _statement(error: Exception) -> str | None:
    """Return the statement that has failed; None where it was COMMIT, or where SQLAlchemy has not sent it."""
    return next((link.statement for link in chain(error) if isinstance(link, StatementError) and link.statement), None)


def label(failure: Failure) -> str:
    """Return what messages call a failure: its kind, and the database's code where there is one."""
    return failure.kind.value if failure.code is None else f"{failure.kind.value} {failure.code}"


# -- what has failed


def _is_timeout(error: Exception) -> bool:
    """Say whether the server ended a statement for its time, or nothing answered in time."""
    failure = classify(error)
    return isinstance(error, TimeoutError) if failure is None else failure.kind is Kind.SERVER_TIMEOUT


def _failure(call: Call[S], transaction: Transaction, error: Exception) -> Failure | None:
    """Find the retryable failure of this unit's own connection, flush or COMMIT behind `error`."""
    options = call.options
    chained = list(chain(error))
    failure = failure_behind(transaction, chained)
    if failure is not None:
        return failure
    if _was_chosen(transaction, error, {id(link) for link in chained}):
        return Failure(Kind.CHOSEN, None, error)
    if options.retry_on is not None and ask(options.retry_on, f"retry_on of {options.who}", error):
        return Failure(Kind.CHOSEN, None, error)
    return None


def _was_chosen(transaction: Transaction, error: Exception, links: set[int]) -> bool:
    """Say whether a joined call has said to retry what this unit ends with."""
    chosen, mark = transaction.chosen, transaction.doom.marked
    if chosen is None or id(chosen) in links:
        return chosen is not None
    # The outer function has swallowed it; what dooms the unit may be what it came from.
    return isinstance(error, RollbackOnlyError) and mark is not None and any(one is mark.cause for one in chain(chosen))


# -- a version that is stale


async def _check_expectations(
    call: Call[S], versions: VersionGuard, failure: Failure | None, error: Exception, beside: _Beside[S]
) -> None:
    """Raise where a client's version is stale: running the body again cannot make it fresh.

    Under snapshot isolation the database reports the same race as a conflict (40001; MariaDB 1020), so then the
    versions are read afresh.
    """
    if isinstance(error, StaleVersionError):
        error.attempts, error.elapsed = call.attempt, call.elapsed
        raise error
    surely = any(isinstance(link, StaleDataError) for link in chain(error))
    if not surely and (failure is None or failure.kind not in (Kind.CONFLICT, Kind.LOCK_TIMEOUT)):
        return
    stale = await _find_stale(call, versions, beside)
    if stale is None and surely:
        stale = versions.stale(call.options.who)
    if stale is not None:
        stale.attempts, stale.elapsed = call.attempt, call.elapsed
        raise stale from error


async def _name(call: Call[S], gave_up: StaleVersionError, versions: VersionGuard | None, beside: _Beside[S]) -> None:
    """Put the row into the error, if it can be found."""
    if versions is not None and (stale := await _find_stale(call, versions, beside)) is not None:
        gave_up.model, gave_up.key = stale.model, stale.key
        gave_up.expected, gave_up.found = stale.expected, stale.found


async def _find_stale(call: Call[S], versions: VersionGuard, beside: _Beside[S]) -> StaleVersionError | None:
    """Find out which row has changed, in a unit of its own; None if none has, or if the rows cannot be read."""
    left = None if call.deadline is None else max(0.001, call.deadline - call.policy.clock())
    stale: StaleVersionError | None = None
    try:
        async with beside(call, left) as unit:
            stale = await unit.session.run_sync(lambda session: versions.find_stale(session.connection()))
    except (SQLAlchemyError, OSError, UnitOfWorkError) as trouble:
        log(
            logging.WARNING, "the versions of %s could not be read (%s)", call.options.who, type(trouble).__name__,
            function=call.options.who, manager=call.setup.name, error=trouble,
        )  # fmt: skip
    return stale


# -- another attempt, or none


async def _wait(
    call: Call[S], transaction: Transaction, failure: Failure, error: Exception, frame: FrameType, *, is_last: bool
) -> None:
    """Wait before the next attempt; raise if there is none."""
    is_last = is_last or call.attempt > call.retries
    if is_last or not call.will_go_on(frame):
        raise _gave_up(call, failure, is_last=is_last) from error
    if call.called is not None:
        try:
            await renew(Called._make(call.called), call.attempt)
        except InstanceReuseError as refused:
            raise refused from error
    wait = call.policy.delay(call.attempt - 1)
    if failure.kind in (Kind.NOT_STARTED, Kind.LOST):
        soonest = call.setup.budget.reserve(time.monotonic(), patience=call.policy.cap)
        if soonest is None:
            raise _gave_up(call, failure, spent=True) from error
        wait = max(wait, soonest)
    if call.deadline is not None and call.policy.clock() + wait >= call.deadline:
        raise timed_out(call, f"{label(failure)}, and the next wait would cross the deadline") from error
    log(
        logging.INFO, "%s: attempt %d of %d failed (%s); again in %.1f ms",
        call.options.who, call.attempt, call.retries + 1, label(failure), wait * 1000,
        **_fields(call, failure), wait=wait,
    )  # fmt: skip
    if call.observers:
        tell_retry(call, failure, error, wait)
    turn = transaction.turn
    if turn is None or turn.gate is None:
        await call.policy.sleep(wait)
    else:
        await turn.gate.back_off(call.policy.sleep, wait)
    call.setup.counts.retried(failure)


def _fields(call: Call[S], failure: Failure) -> dict[str, Any]:
    """Return what the log says of a failed run."""
    return {
        "function": call.options.who, "manager": call.setup.name, "attempt": call.attempt,
        "attempts": call.retries + 1, "reason": failure.kind.value, "code": failure.code,
    }  # fmt: skip


def _gave_up(call: Call[S], failure: Failure, *, is_last: bool = True, spent: bool = False) -> ConflictError:
    """Return the error for a failure that has outlived its retries, or the budget that all calls have for them."""
    who, runs, elapsed = call.options.who, call.attempt, call.elapsed
    plural = "attempt" if runs == 1 else "attempts"
    call.given_up = failure
    log(
        logging.WARNING, "%s: gave up after %d %s and %.3f s (%s)", who, runs, plural, elapsed, label(failure),
        **_fields(call, failure), elapsed=elapsed,
    )  # fmt: skip
    attempts = "its only attempt" if call.retries == 0 else f"each of {runs} attempts"
    remedy = "give it retries" if call.retries == 0 else "call it again later, or shorten the transaction"
    if is_last and runs <= call.retries:
        attempts = f"attempt {runs} of {call.retries + 1}, which was made the last,"
    elif runs <= call.retries:
        attempts = f"attempt {runs} of {call.retries + 1}, which leaves its loop,"
        remedy = "let the block come to its end, return or break behind the loop, or use @transactional"
    if spent:
        attempts = f"attempt {runs} of {call.retries + 1}, and too many calls wait to be run again,"
        remedy = "call it again later, when the database answers"
    error_class = StaleVersionError if failure.kind is Kind.STALE else ConflictError
    return error_class(
        f"{who} failed in {attempts} within {elapsed:.3f} s, last by {label(failure)}; {remedy}",
        attempts=runs, elapsed=elapsed, reason=failure.kind.value, code=failure.code,
    )  # fmt: skip


def timed_out(call: Call[S], why: str, cause: BaseException | None = None) -> TransactionTimeoutError:
    """Return the error for a deadline that has passed, or that the next wait would cross.

    Args:
        call: which has a deadline.
        why: what has met it.
        cause: what was raised instead, if anything.
    """
    assert call.timeout is not None
    error = TransactionTimeoutError(
        f"{call.options.who} did not finish within {call.timeout:g} s: {why} in attempt {call.attempt}; "
        "raise the timeout, or shorten the transaction",
        attempts=call.attempt, elapsed=call.elapsed, timeout=call.timeout,
    )  # fmt: skip
    error.__cause__ = cause
    return error
