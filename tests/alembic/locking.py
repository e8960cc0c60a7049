"""The migration lock in the hands of a test."""

from __future__ import annotations

from sqla_uow.alembic import migration_lock


async def locked(db, body, *, seconds=1.0, **options):
    """Hold the lock on one connection while `body(connection)` runs."""
    engine = db.engine(**options)

    def run(connection):
        with migration_lock(connection, timeout=seconds):
            return body(connection)

    async with engine.connect() as connection:
        return await connection.run_sync(run)
