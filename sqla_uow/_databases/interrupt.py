"""Stop what the server still does for a statement that was cancelled here.

Measured (driver table in the docs): an anyio scope cancels again in every turn of the loop, and so interrupts the cancel
request of asyncpg and psycopg; asyncmy and aiomysql only close the socket, and the query goes on with its locks; aiosqlite
leaves a cursor behind that keeps the database write-locked until it is garbage-collected.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from sqlalchemy.util import await_only

from sqla_uow._databases.database import driver_of
from sqla_uow._databases.driver import raw_connection
from sqla_uow._log import log
from sqla_uow._tasks.shield import shielded

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection

__all__ = ["break_link", "stop_statement"]

STOP_SECONDS = 5.0
"""How long a cancellation may be held up by stopping its statement on the server."""


def stop_statement(connection: Connection, cursor: Any) -> None:
    """Stop what is in flight on `connection`; called in SQLAlchemy's greenlet, the connection is lost anyway.

    Args:
        connection: the one that was interrupted.
        cursor: what the statement was sent with, None where there was no cursor yet.
    """
    driver = driver_of(connection.dialect)
    if not driver.can_stop:
        return
    raw: Any = raw_connection(connection)
    stop = shielded(lambda: driver.stop(raw, connection, cursor, STOP_SECONDS), limit=STOP_SECONDS)
    outcome = await_only(stop)
    if outcome.stop() or isinstance(outcome.trouble, TimeoutError):
        log(
            logging.WARNING,
            "a cancelled statement could not be stopped on the server within %s s; its locks last until it ends",
            STOP_SECONDS,
        )
    elif (trouble := outcome.trouble) is not None:
        log(
            logging.DEBUG, "stopping a cancelled statement failed (%s); the connection is discarded",
            type(trouble).__name__, error=trouble,
        )  # fmt: skip


def break_link(connection: Connection | None) -> bool:
    """Break the link of a connection that will be discarded while an operation waits on it, and say whether that was done.

    The operation then fails by itself.
    """
    if connection is None or connection.closed or connection.invalidated:
        return False
    return driver_of(connection.dialect).break_link(raw_connection(connection))
