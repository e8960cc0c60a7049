"""`rolled_back` that is cut off wherever it waits: the engine is of use to the next test at once, and nothing is locked."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing

import pytest
from sqlalchemy import insert, text

from sqla_uow import UnitOfWorkManager
from sqla_uow.testing import cancel_at, rolled_back
from tests.kit.models import Note


async def work(engine):
    """Do what a test does: units, one after the other, and one that fails."""
    async with rolled_back(UnitOfWorkManager(engine)) as manager:
        for number in range(2):
            async with manager.begin() as unit:
                unit.session.add(Note(text=str(number)))
        with pytest.raises(ZeroDivisionError):
            async with manager.begin() as unit:
                await unit.session.execute(insert(Note).values(text="x"))
                raise ZeroDivisionError


async def work_with_the_engine(engine):
    """Likewise without a manager."""
    async with rolled_back(engine) as inside, inside.begin() as connection:
        await connection.execute(insert(Note).values(text="x"))


def is_free(db):
    """Say whether another program can write at once."""
    with closing(sqlite3.connect(db.url.partition("///")[2], timeout=0, isolation_level=None)) as other:
        try:
            other.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError:
            return False
        return True


@pytest.mark.parametrize("wal", [True, False])
@pytest.mark.parametrize("body", [work, work_with_the_engine])
async def test_cut_off_anywhere(db, body, wal):
    """W10: the connection is thrown away with its lock, and the next test gets a sound one."""
    engine = db.engine(pool_size=1, max_overflow=0, wal=wal)
    nth = 1
    while await cancel_at(nth, body(engine)):
        if db.family == "sqlite":
            assert is_free(db), nth
        async with engine.begin() as connection:
            assert await connection.scalar(text("SELECT count(*) FROM note")) == 0
            await connection.execute(insert(Note).values(text="y"))
            await connection.rollback()
        assert engine.pool.checkedout() == 0
        nth += 1
    assert nth > 5
    assert await db.scalar("SELECT count(*) FROM note") == 0


async def test_cut_off_from_outside(db):
    """W10: by a timeout at any time, as of pytest-timeout, in the middle of a statement too."""
    engine = db.engine(pool_size=1, max_overflow=0)
    for number in range(40):
        task = asyncio.create_task(work(engine))
        for _ in range(number):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait({task})
        if db.family == "sqlite":
            assert is_free(db), number
        async with engine.begin() as connection:
            assert await connection.scalar(text("SELECT count(*) FROM note")) == 0
