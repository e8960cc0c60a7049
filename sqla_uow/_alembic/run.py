"""Run migrations, one runner at a time: a lock of the database's that dies with its holder."""

from __future__ import annotations

import asyncio
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alembic.util import CommandError
from sqlalchemy import event
from sqlalchemy.util import await_only

from alembic import context
from sqla_uow._alembic.databases import schema_of
from sqla_uow._databases.sqlite import begin

if TYPE_CHECKING:
    from collections.abc import Generator

    from sqlalchemy.engine import Connection
    from sqlalchemy.ext.asyncio import AsyncEngine

    from sqla_uow._alembic.schema import Lock

__all__ = ["migration_lock", "run_migrations", "sleep"]

_POLL = 0.1  # s


async def run_migrations(engine: AsyncEngine, /, *, timeout: float | None = 60.0, **options: Any) -> None:
    """Run what the ``alembic`` command asks for, one runner at a time; ``env.py`` awaits it when it is online.

    Each migration is a transaction of its own (``transaction_per_migration``), so that its locks are gone before the next
    one begins; on SQLite too, where Alembic alone would leave half a migration behind.

    Args:
        engine: leads to the database; dispose of it afterwards.
        timeout: seconds to wait for another runner; None runs without the lock.
        options: handed to ``context.configure()``: for example ``target_metadata=Base.metadata``.

    Raises:
        TimeoutError: another runner held the lock for longer than `timeout`.
        CommandError: as `migration_lock` says.
    """
    async with engine.connect() as connection:
        await connection.run_sync(_run, timeout, options)


def _run(connection: Connection, timeout: float | None, options: dict[str, Any]) -> None:
    options = {"transaction_per_migration": True} | options
    if schema_of(connection).begins_late:
        event.listen(connection, "begin", _begin_immediate)
        options = {"transactional_ddl": True} | options
    context.configure(connection=connection, **options)
    if timeout is None:
        _migrate()
        return
    with migration_lock(connection, timeout=timeout):
        _migrate()


def _migrate() -> None:
    with context.begin_transaction():
        context.run_migrations()


def _begin_immediate(connection: Connection) -> None:
    if connection.get_execution_options().get("isolation_level") != "AUTOCOMMIT":  # autocommit_block()
        begin(connection, read_only=False)


@contextmanager
def migration_lock(connection: Connection, *, timeout: float = 60.0) -> Generator[None]:
    """Let one runner at a time run migrations on this database; the others wait, and then find nothing to do.

    Begin it before Alembic reads which revision the database is at: around ``context.begin_transaction()``.  The lock is an
    advisory lock (`GET_LOCK` on MariaDB, an exclusive transaction on ``<database file>.migration-lock`` on SQLite) on
    a connection of its own, outside the pool and outside every transaction: it survives ``autocommit_block()``, and the
    database frees it when its holder dies.  Another runner asks for it again and again.  It does not wait in the
    database, because the holder's ``CREATE INDEX CONCURRENTLY`` would then wait for the runner that waits.

    Args:
        connection: the migrations will run on it; the lock does not use it.
        timeout: seconds to wait for another runner.

    Raises:
        TimeoutError: another runner held it for longer.
        CommandError: the connection is in a transaction; PostgreSQL is reached through a transaction-mode pooler, which
            keeps no session to hold a lock; or the lock was lost while the migrations ran.
    """
    if connection.in_transaction():
        raise CommandError(
            "migration_lock() was begun inside a transaction of the connection, which would commit after the lock is free; "
            "begin it first, around context.begin_transaction()"
        )
    with schema_of(connection).lock(connection) as lock:
        _acquire(lock, connection, timeout)
        try:
            yield
        except BaseException:
            _give_up(lock)
            raise
        if not _give_up(lock):
            raise CommandError(
                "the migration lock was lost before the migrations ended, so another runner may have run beside this one; "
                "compare the schema with its revision"
            )


def sleep(connection: Connection, seconds: float) -> None:
    """Wait without holding up the event loop, where the driver has one."""
    if connection.dialect.is_async:
        await_only(asyncio.sleep(seconds))
    else:
        time.sleep(seconds)


def _acquire(lock: Lock, connection: Connection, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while not lock.try_acquire():
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError(
                f"another runner has held the migration lock of {_name(connection)!r} for all of {timeout:g} s; wait for "
                "it to end, or give migration_lock() a longer timeout"
            )
        sleep(connection, min(_POLL, left))


def _give_up(lock: Lock) -> bool:
    try:
        return lock.release()
    except Exception:  # its connection is gone, and the lock with it
        return False


def _name(connection: Connection) -> str:
    return Path(connection.engine.url.database or ":memory:").name
