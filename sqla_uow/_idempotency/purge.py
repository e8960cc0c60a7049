"""Remove what has expired."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqla_uow._idempotency.statements import purging_level, statements_of

if TYPE_CHECKING:
    from sqlalchemy import Table
    from sqlalchemy.ext.asyncio import AsyncConnection

    from sqla_uow._api.manager import UnitOfWorkManager

__all__ = ["purge"]

_RETRIES = 5
_LIMIT = 10_000  # of what is named in one statement; SQLite takes 32,766 parameters


async def purge(manager: UnitOfWorkManager[Any], table: Table, limit: int) -> int:
    """Remove rows that have expired, batch by batch; return how many."""
    asked: object = limit
    if isinstance(asked, bool) or not isinstance(asked, int):
        raise TypeError(f"purge() has limit={limit!r}; use a number of rows")
    if not 1 <= limit <= _LIMIT:
        raise ValueError(f"purge() has limit={limit!r}; use 1 to {_LIMIT}")
    level = purging_level(manager.engine.dialect.name)
    total = 0
    while True:
        removed = 0
        async for attempt in manager.attempts(retries=_RETRIES, isolation=level, name="purge()"):
            async with attempt as unit:
                removed = await _batch(await unit.session.connection(), table, limit)
        total += removed
        if removed < limit:
            return total


async def _batch(connection: AsyncConnection, table: Table, limit: int) -> int:
    sync = connection.sync_connection
    assert sync is not None
    statements = statements_of(table, sync)
    digests = [row.digest for row in await connection.execute(statements.expired, {"limit": limit})]
    if digests:
        values = statements.parameters(**{f"d{index}": digest for index, digest in enumerate(digests)})
        await connection.execute(statements.remove(len(digests)), values)
    return len(digests)
