"""Stop what the server still does for a statement that was cancelled here.

Measured (driver table in the docs): an anyio scope cancels again in every turn of the loop and so interrupts the
cancel request of asyncpg and psycopg; asyncmy and aiomysql only close the socket and the query goes on with its locks;
aiosqlite leaves a cursor behind that keeps the database write-locked until it is garbage-collected.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

from sqlalchemy.util import await_only, greenlet_spawn

from sqla_uow._shield import shielded

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection
    from sqlalchemy.pool import Pool

__all__ = ["settle"]

logger = logging.getLogger("sqla_uow")

SETTLE_SECONDS = 5.0
"""How long a cancellation may be held up by stopping its statement on the server."""


def settle(connection: Connection) -> None:
    """Stop the statement in flight on `connection`; called in SQLAlchemy's greenlet, the connection is lost anyway."""
    driver = connection.dialect.driver
    raw: Any = connection.connection.driver_connection
    work = _STOP.get(driver)
    if work is None:
        return
    outcome = await_only(shielded(work(raw, connection.engine.pool), grace=SETTLE_SECONDS, limit=SETTLE_SECONDS))
    task = outcome.task
    if not task.done():
        task.cancel()
        logger.warning(
            "a cancelled statement could not be stopped on the server within %s s; its locks last until it ends",
            SETTLE_SECONDS,
        )
    elif not task.cancelled() and (error := task.exception()) is not None:
        logger.debug("stopping a cancelled statement failed (%s); the connection is discarded", type(error).__name__)


async def _asyncpg(raw: Any, _pool: Pool) -> None:
    await raw.close(timeout=SETTLE_SECONDS / 2)  # waits for its own cancel request, then says goodbye


async def _psycopg(raw: Any, _pool: Pool) -> None:
    await raw.cancel_safe(timeout=SETTLE_SECONDS / 2)


async def _aiosqlite(raw: Any, _pool: Pool) -> None:
    await raw.interrupt()
    await raw.rollback()  # queued behind the statement in the driver's thread; frees the write lock


async def _mysql(raw: Any, pool: Pool) -> None:
    thread_id = raw.thread_id()

    def kill() -> None:
        # The pool may be exhausted by this very connection, so not from it; its twin connects in the same way.
        twin = pool.recreate()
        try:
            spare = twin.connect()
            try:
                cursor = spare.cursor()
                cursor.execute(f"KILL {int(thread_id)}")
                cursor.close()
            finally:
                spare.close()
        finally:
            twin.dispose()

    await greenlet_spawn(kill)
    await asyncio.sleep(0)


_STOP = {
    "asyncpg": _asyncpg,
    "psycopg": _psycopg,
    "aiosqlite": _aiosqlite,
    "asyncmy": _mysql,
    "aiomysql": _mysql,
}
