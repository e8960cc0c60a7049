"""The end of a unit that succeeds: prepare, COMMIT, close, hooks; and what an answer that never came means.

From the moment COMMIT is handed over until the connection is back, the work runs in a task of its own under a shield,
because a cancellation there would leave an outcome that nobody knows.
"""

from __future__ import annotations

import asyncio
import logging
import math
from functools import partial
from typing import TYPE_CHECKING, Any

from sqlalchemy.exc import DBAPIError

from sqla_uow._databases.failures import Failure, Kind, classify
from sqla_uow._log import log
from sqla_uow._session.session import has_changes, wait_for_locks
from sqla_uow._tasks.shield import Shielded, shielded
from sqla_uow._transaction.hooks import ROUNDS, Hook, HookOutcome, run_after_commit, run_after_rollback
from sqla_uow._transaction.phase import Phase
from sqla_uow._unit.ending import (
    COMMITTED,
    Ended,
    close_unused,
    discard_connection,
    failure_of,
    noted,
    release,
    remember_objects,
)
from sqla_uow._unit.rollback import roll_back
from sqla_uow.errors import AfterCommitError, AmbiguousCommitError, RollbackOnlyError
from sqla_uow.typing import Status

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy.ext.asyncio import AsyncSession
    from sqlalchemy.orm import Session

    from sqla_uow._transaction.transaction import Transaction
    from sqla_uow._unit.unit import UnitOfWork
    from sqla_uow._unit.verify import Verification

__all__ = ["COMMIT_SECONDS", "commit", "prepare"]


COMMIT_SECONDS = 10.0
"""How long a COMMIT may still take after its caller was cancelled; then its outcome is called ambiguous."""
# The server has ended these before COMMIT reached it: it was idle in the transaction (PostgreSQL).
_ENDED_BEFORE = frozenset({"25P03", "25P04"})


async def prepare(transaction: Transaction, guard: Callable[[], None] | None) -> None:
    """Do what may still fail before COMMIT: hooks, checks, flush; and again, for each may make work for the others.

    Args:
        transaction: not ended yet.
        guard: called with the other checks; None where there is nothing to guard.

    Raises:
        RollbackOnlyError: they never come to an end.
    """
    if transaction.stream is not None:
        transaction.stream.body_returned()
    hooks = transaction.hooks.before_commit
    for _ in range(ROUNDS):
        for _ in range(len(hooks)):
            await hooks.pop(0).run()
        if hooks:
            continue
        if transaction.raw_taken:
            await asyncio.sleep(
                0
            )  # in the next turn of the loop asyncpg tells of what has failed on its own connection
        if transaction.doom.marked is not None:
            transaction.check_sound()
        if guard is not None:
            guard()
        session = transaction.session
        if (
            session is not None  # asked here, so that most units need no coroutine for it
            and (has_changes(session.sync_session) or transaction.versions is not None or transaction.lifts_lock_wait)
            and not await _is_settled(session, transaction)
        ):
            continue
        transaction.owner.check()
        # In the same step of the loop: from here on another task's statement would run under COMMIT.
        transaction.seal(Phase.COMMITTING)
        return
    raise RollbackOnlyError(
        f"the end of {transaction.name} made more work {ROUNDS} times over: {_unfinished(hooks)}; let hooks and listeners "
        "come to an end, or do their work in the body"
    )


async def _is_settled(session: AsyncSession, transaction: Transaction) -> bool:
    """Flush and check; say whether no listener has made more work by that."""
    sync_session, hooks = session.sync_session, transaction.hooks.before_commit
    if has_changes(sync_session):
        await session.flush()
        if hooks or has_changes(sync_session):
            return False
    if transaction.versions is not None and not transaction.read_only:
        await session.run_sync(transaction.versions.check_unwritten)
        if hooks or has_changes(sync_session):
            return False
    if transaction.lifts_lock_wait:
        await session.run_sync(wait_for_locks)  # COMMIT may check constraints
    return True


def _unfinished(hooks: list[Hook]) -> str:
    return f"the before_commit hook {hooks[0].name} is due again" if hooks else "objects are changed in each flush"


async def commit(transaction: Transaction, unit: UnitOfWork[Any], verification: Verification | None) -> Ended:
    """Commit and close; never raises.

    Args:
        transaction: prepared; its place is closed.
        unit: what its user sees of it, for an error that names it.
        verification: learns an unknown outcome; None lets the caller do that.
    """
    session = transaction.session
    if session is None or transaction.connection is None:
        close_unused(transaction)
        return await _committed(transaction, None) if _note_committed(transaction) else COMMITTED
    # A read-only unit too: SQLAlchemy 2.0 loses a connection that is cut off on its way back into the pool.
    work = partial(session.run_sync, _commit_and_close, transaction, verification)
    limit = math.inf if transaction.deadline is None else transaction.deadline - transaction.clock()
    if limit <= 0:  # of a body that held up the loop, so that no timer came
        return await roll_back(transaction, TimeoutError("the deadline passed before COMMIT was sent"))
    outcome = await shielded(work, grace=COMMIT_SECONDS, limit=limit)
    error = await failure_of(outcome.task, transaction)
    if error is not None and transaction.phase is Phase.ENDING:  # COMMIT was answered; what was cut off is closing
        await discard_connection(transaction)
        error = None
    failure = None if error is None else _failure_at_commit(transaction, error)
    if error is not None and failure is not None and failure.kind is Kind.AMBIGUOUS:
        return await _ambiguous(transaction, unit, error, verification, outcome.cancelled)
    if error is None:
        if not _note_committed(transaction) and outcome.cancelled is None:
            return COMMITTED
        return await _committed(transaction, outcome.cancelled)
    return await roll_back(transaction, outcome.cancelled or error, failure)


def _commit_and_close(session: Session, transaction: Transaction, verification: Verification | None) -> None:
    transaction.end_here(Phase.COMMITTING)
    if verification is not None and transaction.wrote and transaction.connection is not None:
        verification.mark(transaction.connection)
    times = transaction.times
    if times is not None:
        times.commit_began = times.clock()
    try:
        session.commit()
    except Exception as error:
        if transaction.phase is not Phase.ENDING:
            raise
        # Committed: a listener of the user failed, as an after_commit hook may.
        transaction.hooks.after_commit.insert(0, Hook.of(_raise, (error,), {}))
    finally:
        if times is not None:
            times.commit_ended = times.clock()
    transaction.phase = Phase.ENDING
    try:
        session.close()
    except Exception as error:  # committed: trouble with the connection must not look like trouble with the data
        log(
            logging.WARNING, "closing a session after its COMMIT failed (%s); the work is committed", type(error).__name__,
            function=transaction.name, error=error,
        )  # fmt: skip


def _raise(error: Exception) -> None:
    raise error


def _failure_at_commit(transaction: Transaction, error: BaseException) -> Failure | None:
    """Say what an error of COMMIT means: answered with a refusal, or unknown; None where it was never sent."""
    if transaction.phase is not Phase.SENT:
        # Of a listener, it may be of another database: what our connection has reported is known by its mark.
        return None
    if isinstance(error, DBAPIError):
        failure = classify(error)
        unknown = failure is not None and failure.kind is Kind.LOST and failure.code not in _ENDED_BEFORE
    else:
        failure = classify(error) if isinstance(error, Exception) else None
        unknown = failure is None
    if not transaction.read_only and (unknown or (failure is not None and failure.kind is Kind.AMBIGUOUS)):
        return Failure(Kind.AMBIGUOUS, None, error)
    if failure is not None and failure.kind is Kind.AMBIGUOUS:
        return Failure(Kind.LOST, failure.code, error)
    return failure


async def _ambiguous(
    transaction: Transaction,
    unit: UnitOfWork[Any],
    error: BaseException,
    verification: Verification | None,
    cancelled: asyncio.CancelledError | None,
) -> Ended:
    committed: bool | None = None
    if transaction.last_write is not None:
        transaction.last_write.lose()
    remember_objects(transaction)
    await discard_connection(transaction)
    if verification is not None and verification.marked and cancelled is None:
        asked = await shielded(partial(verification.ask, transaction), grace=COMMIT_SECONDS)
        cancelled = asked.cancelled
        committed = _answer(asked, transaction.name)
    if committed is True:
        _note_committed(transaction)
        return await _committed(transaction, cancelled)
    if committed is False:
        ended = await roll_back(transaction, cancelled or error, Failure(Kind.LOST, None, error))
        return ended if cancelled is None else Ended(cancelled)
    transaction.final = Status.AMBIGUOUS
    release(transaction)
    log(
        logging.ERROR, "COMMIT of %s was sent and its answer is unknown", transaction.name,
        function=transaction.name, status=Status.AMBIGUOUS.value, attempt=unit.attempt, error=error,
    )  # fmt: skip
    if cancelled is not None:
        return Ended(noted(cancelled, transaction.name, Status.AMBIGUOUS))
    ambiguous = AmbiguousCommitError(
        f"COMMIT of {transaction.name} was sent and its answer is unknown; look in the database whether the work is there "
        "before doing it again, or let ambiguous_commit='verify' look",
        unit=unit,
    )
    ambiguous.__cause__ = error
    return Ended(ambiguous)


def _answer(asked: Shielded[bool | None], who: str) -> bool | None:
    asked.stop()
    if (trouble := asked.trouble) is not None:
        log(
            logging.WARNING, "the outcome of a COMMIT could not be verified (%s)", type(trouble).__name__,
            function=who, error=trouble,
        )  # fmt: skip
        return None
    return asked.task.result() if asked.finished else None


def _note_committed(transaction: Transaction) -> bool:
    """Note the outcome, and free everything; say whether there are hooks to run."""
    transaction.final = Status.COMMITTED
    release(transaction, committed=True)
    return bool(transaction.hooks.after_commit or transaction.hooks.undone)


async def _committed(transaction: Transaction, cancelled: asyncio.CancelledError | None) -> Ended:
    """Run the hooks of a unit that is committed."""
    failures: list[Exception] = []
    hooks = transaction.hooks
    ran = HookOutcome(None, cancelled)
    if hooks.after_commit:
        failures, ran = await run_after_commit(hooks, transaction.name, cancelled)
    ends = ran.fatal
    if hooks.undone:
        hooks.after_rollback.clear()
        ran = await run_after_rollback(hooks, transaction.name, ran.cancelled)
        ends = ends or ran.fatal
    ends = ends or ran.cancelled
    if ends is not None:
        for failure in failures:
            log(
                logging.ERROR, "after_commit hook of %s failed; it is committed", transaction.name, exc_info=failure,
                function=transaction.name, error=failure,
            )  # fmt: skip
        return Ended(noted(ends, transaction.name, Status.COMMITTED))
    if failures:
        plural = "hook" if len(failures) == 1 else "hooks"
        return Ended(
            AfterCommitError(
                f"{transaction.name} is committed, but {len(failures)} after_commit {plural} failed; "
                "repeat what they do, not the function",
                failures,
            )
        )
    return COMMITTED
