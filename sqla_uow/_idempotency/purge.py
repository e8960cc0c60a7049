"""Remove what has expired."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from sqla_uow._idempotency.statements import purging_level, statements_of

if TYPE_CHECKING:
    from sqlalchemy import Table
    from sqlalchemy.ext.asyncio import AsyncConnection

    from sqla_uow._api.manager import UnitOfWorkManager

__all__ = ["purge"]

_RETRIES = 5
_FIRST, _LEAST = 100, 10
_SHORT, _LONG = 0.01, 0.02  # s; a batch has its rows locked, and a claim that takes one of them over waits for it
_LIMIT = 10_000  # of what is named in one statement; SQLite takes 32,766 parameters


async def purge(manager: UnitOfWorkManager[Any], table: Table, limit: int) -> int:
    """Remove rows that have expired, batch by batch, each as large as it is quickly done; return how many."""
    asked: object = limit
    if isinstance(asked, bool) or not isinstance(asked, int):
        raise TypeError(f"purge() has limit={limit!r}; use a number of rows")
    if not 1 <= limit <= _LIMIT:
        raise ValueError(f"purge() has limit={limit!r}; use 1 to {_LIMIT}")
    level = purging_level(manager.engine.dialect.name)
    total, size = 0, min(limit, _FIRST)
    while True:
        removed, begun = 0, time.perf_counter()
        async for attempt in manager.attempts(retries=_RETRIES, isolation=level, name="purge()"):
            async with attempt as unit:
                removed = await _batch(await unit.session.connection(), table, size)
        total += removed
        if removed < size:
            return total
        took = time.perf_counter() - begun
        if took < _SHORT:
            size = min(limit, size * 2)
        elif took > _LONG:
            size = max(min(limit, _LEAST), size // 2)


async def _batch(connection: AsyncConnection, table: Table, limit: int) -> int:
    sync = connection.sync_connection
    assert sync is not None
    statements = statements_of(table, sync)
    digests = [row.digest for row in await connection.execute(statements.expired, {"limit": limit})]
    if digests:
        values = statements.parameters(**{f"d{index}": digest for index, digest in enumerate(digests)})
        await connection.execute(statements.remove(len(digests)), values)
    return len(digests)
