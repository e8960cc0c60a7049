"""What every end of a unit has to let go of: its connection, its objects, those who wait for it."""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from sqla_uow._databases.interrupt import break_link, stop_statement
from sqla_uow._log import log
from sqla_uow._session.session import has_changes
from sqla_uow._tasks.shield import shielded
from sqla_uow._transaction.phase import Phase
from sqla_uow.typing import Status

if TYPE_CHECKING:
    from sqlalchemy import Connection
    from sqlalchemy.orm import Session

    from sqla_uow._databases.failures import Failure
    from sqla_uow._transaction.transaction import Transaction

__all__ = [
    "COMMITTED",
    "Ended",
    "close_unused",
    "discard_connection",
    "failure_of",
    "noted",
    "release",
    "remember_objects",
    "roll_back_and_close",
    "wait_briefly",
]


DISCARD_SECONDS = 10.0
"""How long it may take to discard a connection."""
IDLE_SECONDS = 5.0
"""How long the end of a unit waits for a statement that another task has in flight."""


class Ended(NamedTuple):
    """How a unit ended: the error to raise, if any, and what the database said, if that is why."""

    error: BaseException | None = None
    failure: Failure | None = None


COMMITTED = Ended()
"""With nothing to raise, as nearly all."""


async def wait_briefly(future: asyncio.Future[Any]) -> asyncio.CancelledError | None:
    """Wait for what should be over soon; return the cancellation meanwhile."""
    waited = await shielded(lambda: asyncio.wait({future}), limit=IDLE_SECONDS)
    waited.stop()
    return waited.cancelled


async def failure_of(task: asyncio.Task[None], transaction: Transaction) -> BaseException | None:
    """Return what the task raised; stop it first if its time was up."""
    if task.cancelled():  # somebody cancels every task, as at the end of a loop
        return asyncio.CancelledError()
    if task.done():
        return task.exception()
    if not break_link(transaction.connection):
        task.cancel("the time for COMMIT is up")
    await wait_briefly(task)
    if not task.done():
        return TimeoutError("COMMIT was not answered in time, and could not be stopped either")
    if not task.cancelled() and task.exception() is None:
        return None
    return TimeoutError("COMMIT was not answered in time")


def roll_back_and_close(session: Session, transaction: Transaction, *, discard: bool) -> None:
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
        log(
            logging.WARNING, "ROLLBACK of %s failed (%s); its connection is discarded",
            transaction.name, type(error).__name__, function=transaction.name, error=error,
        )  # fmt: skip
        discard = True
    try:
        if discard and connection is not None and not connection.closed:
            if transaction.owner.busy() is not None:  # it would go on without us, with its locks
                stop_statement(connection, None)
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


async def discard_connection(transaction: Transaction) -> None:
    """Give up the connection of an unknown COMMIT: whatever arrives on it later must reach nobody else."""
    work = partial(transaction.session.run_sync, roll_back_and_close, transaction, discard=True)
    outcome = await shielded(work, limit=DISCARD_SECONDS)
    if not outcome.stop() and (trouble := outcome.trouble) is not None:
        log(
            logging.WARNING, "discarding a connection failed (%s)", type(trouble).__name__,
            function=transaction.name, error=trouble,
        )  # fmt: skip


def remember_objects(transaction: Transaction) -> None:
    """Let the call look at the session's objects; a rollback, and closing, let go of them."""
    on_rollback, transaction.on_rollback = transaction.on_rollback, None
    if on_rollback is not None and transaction.session is not None:
        on_rollback(transaction, transaction.session.sync_session)


def close_unused(transaction: Transaction) -> None:
    """Close a session that holds no connection: nothing is sent, so nothing has to be awaited."""
    transaction.end_here(Phase.ENDING)
    if transaction.session is not None:
        transaction.session.sync_session.close()


def release(transaction: Transaction, *, committed: bool = False) -> None:
    """Let others run, and keep nothing alive by a unit that has ended."""
    if transaction.turn is not None:  # before the hooks: one may call the same function
        transaction.turn.free(committed=committed)
    transaction.give_back_turn()
    transaction.phase = Phase.ENDED
    if transaction.unwatch:
        transaction.unwatch_raw()
    transaction.closer = None
    transaction.session = None
    transaction.connection = None
    transaction.watch = None
    if transaction.lock_watch is not None:
        transaction.lock_watch.stop()
    transaction.engine = None
    transaction.enclosing = ()
    transaction.owner.forget_task()


def noted(error: BaseException, name: str, status: Status) -> BaseException:
    """Return a cancellation, or what a hook has raised to end the program, with the outcome as a note on it.

    Args:
        error: gets the note.
        name: of the transaction.
        status: what became of it.
    """
    outcome = "unknown" if status is Status.AMBIGUOUS else status.value
    why = "cancelled" if isinstance(error, asyncio.CancelledError) else "raised by a hook"
    error.add_note(f"sqla_uow: {why}; the outcome of {name} is: {outcome}")
    return error
