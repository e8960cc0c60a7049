"""The end of a unit that fails: ROLLBACK, close, hooks.

Nothing here replaces the error that a unit fails with: trouble in ROLLBACK is logged, and costs the connection.
"""

from __future__ import annotations

import asyncio
import logging
import math
from functools import partial
from typing import TYPE_CHECKING

from sqla_uow._databases.database import driver_of
from sqla_uow._databases.driver import State, raw_connection
from sqla_uow._databases.interrupt import break_link
from sqla_uow._log import log
from sqla_uow._tasks.shield import shielded
from sqla_uow._transaction.hooks import run_after_rollback
from sqla_uow._transaction.phase import Phase
from sqla_uow._unit.ending import (
    Ended,
    close_unused,
    noted,
    release,
    remember_objects,
    roll_back_and_close,
    wait_briefly,
)
from sqla_uow.typing import Status

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from sqla_uow._databases.failures import Failure
    from sqla_uow._transaction.transaction import Transaction

__all__ = ["roll_back"]


ROLLBACK_SECONDS = 10.0
"""How long a ROLLBACK may take; then the connection is discarded, which rolls back too."""


async def roll_back(transaction: Transaction, error: BaseException | None, failure: Failure | None = None) -> Ended:
    """Roll back and close; never raises, and never replaces `error` by trouble of its own.

    Args:
        transaction: its place is closed.
        error: why; None where the owner asked for it.
        failure: what the database said at COMMIT.
    """
    transaction.seal(Phase.ENDING)  # before the wait, or a sibling would send its next statement
    remember_objects(transaction)
    cancelled: asyncio.CancelledError | None = None
    if transaction.session is None or (transaction.connection is None and transaction.owner.busy() is None):
        close_unused(transaction)
    else:
        cancelled = await _stop_and_roll_back(transaction)
    transaction.final = Status.ROLLED_BACK
    release(transaction)
    if isinstance(error, asyncio.CancelledError):
        cancelled = error
    fatal, cancelled = await run_after_rollback(transaction.hooks, transaction.name, cancelled)
    if fatal is not None:
        fatal.__context__ = fatal.__context__ or error
        return Ended(fatal)
    if cancelled is not None and cancelled is not error:
        cancelled.__context__ = error
        error, failure = cancelled, None
    if cancelled is not None and not transaction.scope_read:  # a read session has no outcome
        noted(cancelled, transaction.name, Status.ROLLED_BACK)
    return Ended(error, failure)


async def _stop_and_roll_back(transaction: Transaction) -> asyncio.CancelledError | None:
    cancelled: asyncio.CancelledError | None = None
    idle = transaction.owner.busy_elsewhere()
    discard = False
    if idle is not None:
        # Closing under a sibling's statement leaks the connection on asyncpg and aiomysql.
        cancelled = await wait_briefly(idle)
        if not idle.done():
            break_link(transaction.connection)
            await wait_briefly(idle)
            discard = True
    if _is_busy(transaction.connection):
        break_link(transaction.connection)
        discard = True
    work = partial(transaction.session.run_sync, roll_back_and_close, transaction, discard=discard)
    # The end of a mere reading has no limit of its own: a timer costs a twentieth of one SELECT.
    limit = math.inf if transaction.scope_read and transaction.doom.marked is None else ROLLBACK_SECONDS
    outcome = await shielded(work, grace=ROLLBACK_SECONDS, limit=limit)
    if outcome.stop():
        await wait_briefly(outcome.task)
        log(
            logging.WARNING, "ROLLBACK of %s took more than %s s; its connection is discarded",
            transaction.name, ROLLBACK_SECONDS, function=transaction.name,
        )  # fmt: skip
    elif (trouble := outcome.trouble) is not None:
        log(
            logging.WARNING, "closing %s failed (%s)", transaction.name, type(trouble).__name__,
            function=transaction.name, error=trouble,
        )  # fmt: skip
    return cancelled or outcome.cancelled


def _is_busy(connection: Connection | None) -> bool:
    """Say whether something is under way on the driver's own connection, for which a ROLLBACK would wait."""
    if connection is None or connection.closed or connection.invalidated:
        return False
    return driver_of(connection.dialect).state(raw_connection(connection)) is State.BUSY
