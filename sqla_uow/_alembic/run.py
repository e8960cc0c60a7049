"""What an async ``env.py`` does online, in one call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import event

from alembic import context
from sqla_uow._alembic.lock import migration_lock
from sqla_uow._databases.driver_state import family_of
from sqla_uow._databases.sqlite import begin as begin_sqlite

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection
    from sqlalchemy.ext.asyncio import AsyncEngine

__all__ = ["run_migrations"]


async def run_migrations(engine: AsyncEngine, /, *, timeout: float | None = 60.0, **options: Any) -> None:
    """Run what the ``alembic`` command asks for, one runner at a time; to be awaited by ``env.py`` when it is online.

    Each migration is a transaction of its own (``transaction_per_migration``), so that its locks are gone before the next
    one begins; on SQLite too, where Alembic alone would leave half a migration behind.

    Args:
        engine: that leads to the database; dispose of it afterwards.
        timeout: seconds to wait for another runner; None runs without the lock.
        options: handed to ``context.configure()``: ``target_metadata=Base.metadata``, say.

    Raises:
        TimeoutError: another runner held the lock for longer than `timeout`.
        CommandError: as `migration_lock` says.
    """
    async with engine.connect() as connection:
        await connection.run_sync(_run, timeout, options)


def _run(connection: Connection, timeout: float | None, options: dict[str, Any]) -> None:
    options = {"transaction_per_migration": True} | options
    if family_of(connection.dialect) == "sqlite":
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
        begin_sqlite(connection)
