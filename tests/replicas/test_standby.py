"""A4, D4: units on a hot standby itself, which refuses SERIALIZABLE and READ WRITE; its connections stay sound."""

from __future__ import annotations

import asyncio

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from sqla_uow import UnitOfWorkManager
from sqla_uow.errors import ConflictError

pytestmark = pytest.mark.drivers("asyncpg", "psycopg")
COUNT = text("SELECT count(*) FROM note")


@pytest.mark.parametrize("seconds", [None, 30])
async def test_a_begin_that_is_refused_poisons_nothing(pair, seconds):
    """D4: asyncpg believes in the transaction that never began, and refuses the next for ever."""
    engine = pair.engine(pair.replica, pool_size=1, max_overflow=0)
    manager = UnitOfWorkManager(engine)
    for _ in range(2):
        with pytest.raises(DBAPIError, match="hot standby"):
            async with manager.begin(isolation="SERIALIZABLE", timeout=seconds) as unit:
                await unit.session.scalar(COUNT)
        async with manager.begin() as unit:
            assert await unit.session.scalar(COUNT) == 0
        async with engine.connect() as connection:
            assert await connection.scalar(COUNT) == 0
    with pytest.raises(DBAPIError, match="hot standby"):
        async with manager.begin(isolation="SERIALIZABLE") as unit:
            await unit.session.scalar(COUNT)
    async with engine.connect() as connection:
        assert await connection.scalar(COUNT) == 0


async def test_a_read_only_unit_leaves_no_read_write_behind(pair):
    """A4: which a standby refuses, whoever gets the connection next."""
    engine = pair.engine(pair.replica, pool_size=1, max_overflow=0)
    manager = UnitOfWorkManager(engine)
    async with manager.begin(read_only=True) as unit:
        assert await unit.session.scalar(COUNT) == 0
    async with manager.begin() as unit:
        assert await unit.session.scalar(COUNT) == 0
    async with engine.connect() as connection:
        assert await connection.scalar(COUNT) == 0


async def test_a_begin_that_is_cut_off_poisons_nothing(pair):
    """D4: cancelled anywhere in it; the pool's only connection works afterwards."""
    engine = pair.engine(pair.replica, pool_size=1, max_overflow=0)
    manager = UnitOfWorkManager(engine)

    async def read():
        async with manager.begin(isolation="SERIALIZABLE") as unit:
            await unit.session.scalar(COUNT)

    for turns in range(12):
        task = asyncio.create_task(read())
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises((asyncio.CancelledError, DBAPIError, ConflictError)):
            await task
        async with manager.begin() as unit:
            assert await unit.session.scalar(COUNT) == 0
    assert engine.pool.checkedout() == 0
