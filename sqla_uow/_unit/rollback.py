"""The end of a unit that fails, and what each end has to let go of.

Nothing here replaces the error that a unit fails with: trouble in ROLLBACK is logged, and costs the connection.
"""

from __future__ import annotations

import asyncio
import logging
import math
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from sqla_uow._databases.driver import raw_connection
from sqla_uow._databases.driver_state import State, state_of
from sqla_uow._databases.interrupt import cut, settle
from sqla_uow._log import record
from sqla_uow._session.session import has_changes
from sqla_uow._tasks.shield import shielded
from sqla_uow._transaction.hooks import run_after_rollback
from sqla_uow._transaction.phase import Phase
from sqla_uow.typing import Status

if TYPE_CHECKING:
    from sqlalchemy import Connection
    from sqlalchemy.orm import Session

    from sqla_uow._databases.failures import Failure
    from sqla_uow._transaction.transaction import Transaction
    from sqla_uow._unit.unit import UnitOfWork

__all__ = [
    "Ended",
    "close_unused",
    "discard_connection",
    "noted",
    "release",
    "remember_objects",
    "roll_back",
    "wait_briefly",
]


ROLLBACK_SECONDS = 10.0
"""How long a ROLLBACK may take; then the connection is discarded, which rolls back too."""
IDLE_SECONDS = 5.0
"""How long the end of a unit waits for a statement that another task has in flight."""


class Ended(NamedTuple):
    """How a unit ended: the error to raise, if any, and what the database said, if that is why."""

    error: BaseException | None = None
    failure: Failure | None = None


async def roll_back(unit: UnitOfWork[Any], error: BaseException | None, failure: Failure | None = None) -> Ended:
    """Roll back and close; never raises, and never replaces `error` by trouble of its own.

    Args:
        unit: its place is closed.
        error: why; None where the owner asked for it.
        failure: what the database said at COMMIT.
    """
    transaction, session = unit._transaction, unit._session
    transaction.seal(Phase.ENDING)  # before the wait, or a sibling would send its next statement
    remember_objects(unit)
    cancelled: asyncio.CancelledError | None = None
    if session is None or (transaction.connection is None and transaction.owner.busy() is None):
        close_unused(unit)
    else:
        cancelled = await _stop_and_roll_back(unit)
    unit._final = Status.ROLLED_BACK
    release(transaction)
    if isinstance(error, asyncio.CancelledError):
        cancelled = error
    fatal, cancelled = await run_after_rollback(transaction.hooks, transaction.name, cancelled)
    if fatal is not None:
        fatal.__context__ = fatal.__context__ or error
        return Ended(fatal)
    if cancelled is not None and cancelled is not error:
        if error is not None:
            cancelled.__context__ = error
        error, failure = cancelled, None
    if cancelled is not None and not transaction.scope_read:  # a read session has no outcome
        noted(cancelled, unit)
    return Ended(error, failure)


async def _stop_and_roll_back(unit: UnitOfWork[Any]) -> asyncio.CancelledError | None:
    transaction, session = unit._transaction, unit._session
    assert session is not None
    cancelled: asyncio.CancelledError | None = None
    idle = transaction.owner.busy_elsewhere()
    discard = False
    if idle is not None:
        # Closing under a sibling's statement leaks the connection on asyncpg and aiomysql.
        cancelled = await wait_briefly(idle)
        if not idle.done():
            cut(transaction.connection)
            await wait_briefly(idle)
            discard = True
    if _is_busy(transaction.connection):
        cut(transaction.connection)
        discard = True
    work = partial(session.run_sync, _roll_back_and_close, transaction, discard=discard)
    # The end of a mere reading has only the patience of who waits for it: a timer costs a twentieth of one SELECT.
    limit = math.inf if transaction.scope_read and transaction.doom.marked is None else ROLLBACK_SECONDS
    outcome = await shielded(work, grace=ROLLBACK_SECONDS, limit=limit)
    if outcome.stop():
        await wait_briefly(outcome.task)
        record(
            logging.WARNING, "ROLLBACK of %s took more than %s s; its connection is discarded",
            transaction.name, ROLLBACK_SECONDS, function=transaction.name,
        )  # fmt: skip
    elif (trouble := outcome.trouble) is not None:
        record(
            logging.WARNING, "closing %s failed (%s)", transaction.name, type(trouble).__name__,
            function=transaction.name, error=trouble,
        )  # fmt: skip
    return cancelled or outcome.cancelled


def _is_busy(connection: Connection | None) -> bool:
    """Say whether something is under way on the driver's own connection, for which a ROLLBACK would wait."""
    if connection is None or connection.closed or connection.invalidated:
        return False
    return state_of(connection.dialect.driver, raw_connection(connection)) is State.BUSY


async def wait_briefly(future: asyncio.Future[Any]) -> asyncio.CancelledError | None:
    """Wait for what should be over soon; return the cancellation meanwhile."""
    waited = await shielded(lambda: asyncio.wait({future}), limit=IDLE_SECONDS)
    waited.stop()
    return waited.cancelled


def _roll_back_and_close(session: Session, transaction: Transaction, *, discard: bool) -> None:
    # A read session has nothing to undo, and a rollback would expire what was read in it.
    keeps = transaction.scope_read and transaction.doom.marked is None and not has_changes(session)
    transaction.end_here(Phase.COMMITTING if keeps else Phase.ENDING)
    if transaction.stream is not None:
        transaction.stream.end()
    connection = transaction.connection
    try:
        if keeps and not discard:
            session.commit()
        elif not discard:
            if connection is not None:
                _undo_refused(connection)
            session.rollback()
    except Exception as error:
        record(
            logging.WARNING, "ROLLBACK of %s failed (%s); its connection is discarded",
            transaction.name, type(error).__name__, function=transaction.name, error=error,
        )  # fmt: skip
        discard = True
    try:
        if discard and connection is not None and not connection.closed:
            if transaction.owner.busy() is not None:  # it would go on without us, with its locks
                settle(connection, None)
            connection.invalidate()
    finally:
        if transaction.stream is not None:
            transaction.stream.close_if_left()
        session.close()


def _undo_refused(connection: Connection) -> None:
    """Roll back where SQLAlchemy takes a transaction for ended though its COMMIT failed: SQLite keeps it open.

    Nobody else would: not every pool rolls back what it gets.
    """
    transaction = None if connection.closed or connection.invalidated else connection.get_transaction()
    if transaction is None or transaction.is_active:
        return
    lent: Any = connection._dbapi_connection
    try:
        connection.dialect.do_rollback(lent)
    except BaseException:  # also cut off at its time limit
        connection.invalidate()
        raise


async def discard_connection(unit: UnitOfWork[Any]) -> None:
    """Give up the connection of an unknown COMMIT: whatever arrives on it later must reach nobody else."""
    session = unit._session
    assert session is not None
    work = partial(session.run_sync, _roll_back_and_close, unit._transaction, discard=True)
    outcome = await shielded(work, limit=ROLLBACK_SECONDS)
    if not outcome.stop() and (trouble := outcome.trouble) is not None:
        record(
            logging.WARNING, "discarding a connection failed (%s)", type(trouble).__name__,
            function=unit._transaction.name, error=trouble,
        )  # fmt: skip


def remember_objects(unit: UnitOfWork[Any]) -> None:
    """Let the attempts look at the session's objects; a rollback, and closing, let go of them."""
    transaction, session = unit._transaction, unit._session
    on_rollback, transaction.on_rollback = transaction.on_rollback, None
    if on_rollback is not None and session is not None:
        on_rollback(transaction, session.sync_session)


def close_unused(unit: UnitOfWork[Any]) -> None:
    """Close a session that holds no connection: nothing is sent, so nothing has to be awaited."""
    unit._transaction.end_here(Phase.ENDING)
    if unit._session is not None:
        unit._session.sync_session.close()


def release(transaction: Transaction, *, committed: bool = False) -> None:
    """Let others run, and keep nothing alive by a unit that has ended."""
    if transaction.slot is not None:  # before the hooks: one may call the same function
        transaction.slot.free(committed=committed)
    transaction.give_back_turn()
    transaction.phase = Phase.ENDED
    if transaction.unwatch:
        transaction.unwatch_raw()
    transaction.closer = None
    transaction.connection = None
    transaction.watch = None
    if transaction.lock_watch is not None:
        transaction.lock_watch.stop()
    transaction.engine = None
    transaction.enclosing = ()
    transaction.owner.forget_task()


def noted(error: BaseException, unit: UnitOfWork[Any]) -> BaseException:
    """Return a cancellation, or what a hook has raised to end the program, with the outcome as a note on it."""
    status = "unknown" if unit.status is Status.AMBIGUOUS else unit.status.value
    why = "cancelled" if isinstance(error, asyncio.CancelledError) else "raised by a hook"
    error.add_note(f"sqla_uow: {why}; the outcome of {unit._transaction.name} is: {status}")
    return error
