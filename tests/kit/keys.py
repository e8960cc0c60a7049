"""Idempotency keys in the database of a test."""

from __future__ import annotations

from sqlalchemy import MetaData

from sqla_uow.idempotency import IdempotencyKeys


async def keys_in(db):
    """Return keys whose table is there."""
    metadata = MetaData()
    keys = IdempotencyKeys(metadata)
    async with db.outside() as connection:
        await connection.run_sync(metadata.create_all)
        await connection.commit()
    return keys
