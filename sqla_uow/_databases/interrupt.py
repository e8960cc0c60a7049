"""Stop what the server still does for a statement that was cancelled here.

Measured (driver table in the docs): an anyio scope cancels again in every turn of the loop and so interrupts the
cancel request of asyncpg and psycopg; asyncmy and aiomysql only close the socket and the query goes on with its locks;
aiosqlite leaves a cursor behind that keeps the database write-locked until it is garbage-collected.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from typing import TYPE_CHECKING, Any

from sqlalchemy.util import await_only, greenlet_spawn

from sqla_uow._databases.driver import raw_connection
from sqla_uow._log import record
from sqla_uow._tasks.shield import shielded

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection

__all__ = ["cut", "identity_of", "is_server_of", "remember", "settle"]


SETTLE_SECONDS = 5.0
"""How long a cancellation may be held up by stopping its statement on the server."""
INTERRUPT_SECONDS = 0.05
"""How often SQLite is told to stop."""


_CANCEL = "sqla_uow.cancel"
_IDENTITY = "sqla_uow.server"
_WHO_ARE_YOU = "SELECT @@hostname, @@port, @@server_id, @@datadir, @@pid_file"
BALANCER_TRIES = 4
"""Connections made to find the server that a statement runs on, where one address leads to several."""


def remember(connection: Connection) -> None:
    """Keep what a cancel request needs: psycopg 3.3 forgets it when it is interrupted again, as anyio does."""
    if connection.dialect.driver == "psycopg" and _CANCEL not in connection.info:
        raw: Any = raw_connection(connection)
        try:
            connection.info[_CANCEL] = raw.pgconn.cancel_conn()
        except raw.NotSupportedError:  # libpq before 17; its way to cancel would block the loop
            connection.info[_CANCEL] = None
    elif connection.dialect.driver in _KILLED and _IDENTITY not in connection.info:
        try:
            connection.info[_IDENTITY] = await_only(_ask_identity(raw_connection(connection)))
        except Exception as error:  # as those of a cursor are handled; there is no public way
            connection._handle_dbapi_exception(error, _WHO_ARE_YOU, None, None, None)


async def _ask_identity(raw: Any) -> tuple[Any, ...]:
    """Ask a server of MariaDB who it is: a connection's number is its own, and means another one elsewhere.

    Once for each connection, as a balancer may lead the next one to another server.  It begins no transaction.  A cancel
    request of PostgreSQL needs no such proof: it carries a secret, and another server takes no notice of it.
    """
    async with raw.cursor() as cursor:
        await cursor.execute(_WHO_ARE_YOU)
        found: tuple[Any, ...] = tuple(await cursor.fetchone())
    return found


def identity_of(connection: Connection) -> tuple[Any, ...] | None:
    """Return what is known of the server behind a connection; None where that is no matter."""
    identity: tuple[Any, ...] | None = connection.info.get(_IDENTITY)
    return identity


def is_server_of(connection: Connection, identity: tuple[Any, ...] | None) -> bool:
    """Say whether this connection leads to the server of that identity."""
    if identity is None:
        return True
    raw: Any = raw_connection(connection)
    return await_only(_ask_identity(raw)) == identity


def settle(connection: Connection, cursor: Any) -> None:
    """Stop what is in flight on `connection`; called in SQLAlchemy's greenlet, the connection is lost anyway.

    Args:
        connection: the one that was interrupted.
        cursor: what the statement was sent with, None where there was no cursor yet.
    """
    driver = connection.dialect.driver
    work = _STOP.get(driver)
    if work is None:
        return
    raw: Any = raw_connection(connection)
    outcome = await_only(shielded(lambda: work(raw, connection, cursor), limit=SETTLE_SECONDS))
    if outcome.stop():
        record(
            logging.WARNING,
            "a cancelled statement could not be stopped on the server within %s s; its locks last until it ends",
            SETTLE_SECONDS,
        )
    elif (trouble := outcome.trouble) is not None:
        record(
            logging.DEBUG, "stopping a cancelled statement failed (%s); the connection is discarded",
            type(trouble).__name__, error=trouble,
        )  # fmt: skip


def cut(connection: Connection | None) -> bool:
    """Break the link of a connection that will be discarded while an operation waits on it, and say whether that was done.

    The operation then fails by itself.  asyncpg would first wait for an answer, and be left unclosed by who does not wait;
    psycopg must not be closed under an operation: its C code reads freed memory when that wakes up (SIGSEGV with 3.3.9).
    The other drivers may be closed.
    """
    if connection is None or connection.closed or connection.invalidated:
        return False
    raw: Any = raw_connection(connection)
    if connection.dialect.driver == "asyncpg":
        raw.terminate()
        return True
    if connection.dialect.driver != "psycopg" or raw.closed:
        return False
    with socket.socket(fileno=os.dup(raw.fileno())) as link, contextlib.suppress(OSError):  # gone already
        link.shutdown(socket.SHUT_RDWR)
    return True


async def _asyncpg(raw: Any, _connection: Connection, _cursor: Any) -> None:
    await raw.close(timeout=SETTLE_SECONDS / 2)  # waits for its own cancel request, then says goodbye


async def _psycopg(raw: Any, connection: Connection, _cursor: Any) -> None:
    request = connection.info[_CANCEL]
    if not raw.closed:
        await raw.cancel_safe(timeout=SETTLE_SECONDS / 2)
    elif request is not None:
        from psycopg import generators, waiting  # noqa: PLC0415  # loaded, as this is its connection

        request.start()
        await waiting.wait_conn_async(generators.cancel(request), interval=0.1)


async def _aiosqlite(raw: Any, _connection: Connection, cursor: Any) -> None:
    over = asyncio.ensure_future(_end_of_statement(raw, cursor))
    # Interrupt what is still running, and nothing else: SQLite goes on interrupting, ROLLBACK too, until every SELECT that
    # has begun is reset, and SQLAlchemy 2.0 gives us no way to its cursor.  A ROLLBACK that fails leaves the lock behind.
    while not (await asyncio.wait({over}, timeout=INTERRUPT_SECONDS))[0]:
        await raw.interrupt()
    try:
        await over
        await raw.rollback()
    finally:
        await raw.close()  # here, where nothing cancels it: aiosqlite cannot finish a close that was cut off


async def _end_of_statement(raw: Any, cursor: Any) -> None:
    """Wait in the driver's queue, with what runs nothing, for the statement to end."""
    if cursor is not None:
        await greenlet_spawn(cursor.close)
    await raw.execute("")


async def _mysql(raw: Any, connection: Connection, _cursor: Any) -> None:
    pool, thread_id, identity = connection.engine.pool, raw.thread_id(), identity_of(connection)

    def kill() -> bool:
        # The pool may be exhausted by this very connection, so not from it; its twin connects in the same way.
        twin = pool.recreate()
        try:
            spare = twin.connect()
            try:
                if await_only(_ask_identity(spare.driver_connection)) != identity:
                    spare.invalidate()
                    return False
                cursor = spare.cursor()
                cursor.execute(f"KILL {int(thread_id)}")
                cursor.close()
            finally:
                spare.close()
        finally:
            twin.dispose()
        return True

    for _ in range(BALANCER_TRIES):
        if await greenlet_spawn(kill):
            break
    else:
        record(
            logging.WARNING,
            "a cancelled statement goes on: KILL reached other servers than the one it runs on, behind a balancer say, and "
            "was not sent there; its locks last until it ends",
        )
    await asyncio.sleep(0)


_KILLED = ("asyncmy", "aiomysql")
_STOP = {
    "asyncpg": _asyncpg,
    "psycopg": _psycopg,
    "aiosqlite": _aiosqlite,
    "asyncmy": _mysql,
    "aiomysql": _mysql,
}
