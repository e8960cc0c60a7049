"""``python -m sqla_uow purge``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import MetaData
from sqlalchemy.ext.asyncio import create_async_engine

from sqla_uow._api.manager import UnitOfWorkManager
from sqla_uow._idempotency.keys import IdempotencyKeys

if TYPE_CHECKING:
    from sqlalchemy import URL

__all__ = ["purge_at"]


async def purge_at(url: URL, table: str, limit: int) -> int:
    """Remove what has expired in a table of a database; return how many rows that were.

    Args:
        url: of the database.
        table: its name, with its schema before it where it has one.
        limit: rows in a batch.
    """
    schema, _, name = table.rpartition(".")
    keys = IdempotencyKeys(MetaData(schema=schema or None), name=name)
    engine = create_async_engine(url)
    try:
        return await keys.purge(UnitOfWorkManager(engine), limit=limit)
    finally:
        await engine.dispose()
