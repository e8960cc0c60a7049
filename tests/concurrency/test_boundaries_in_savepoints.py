"""Two tasks in one unit: no savepoint makes good what may have gone between them."""

from __future__ import annotations

import asyncio
import contextlib

import pytest
from sqlalchemy import insert, text

from sqla_uow import Status, UnitOfWorkManager, current_session, errors, transactional
from tests.kit.models import Note


async def test_a_sibling_inside_a_savepoint_that_is_undone(db):
    """It was refused there, and swallowed: the rest is not committed either."""
    manager = UnitOfWorkManager(db.engine(pool_size=1, max_overflow=0))
    used, go_on = asyncio.Event(), asyncio.Event()

    async def use():
        await current_session().execute(text("SELECT 1"))
        used.set()
        await go_on.wait()

    @transactional(using=manager, propagation="nested")
    async def part():
        child = asyncio.create_task(use())
        await used.wait()
        with pytest.raises(errors.TaskBoundaryError):
            await asyncio.create_task(use())
        go_on.set()
        await child
        raise KeyError

    with manager.activate(), pytest.raises(errors.RollbackOnlyError):
        async with manager.begin() as unit:
            await unit.session.execute(insert(Note).values(text="around"))
            with contextlib.suppress(KeyError):
                await part()
    assert unit.status is Status.ROLLED_BACK
    assert await db.rows("SELECT text FROM note") == []


async def test_a_thread_inside_a_savepoint_that_is_undone(db):
    """Likewise."""
    manager = UnitOfWorkManager(db.engine(pool_size=1, max_overflow=0))

    async def use(session):
        await session.execute(text("SELECT 1"))

    @transactional(using=manager, propagation="nested")
    async def part():
        with pytest.raises(errors.TaskBoundaryError, match="from a thread"):
            await asyncio.to_thread(asyncio.run, use(current_session()))
        raise KeyError

    with manager.activate(), pytest.raises(errors.RollbackOnlyError):
        async with manager.begin() as unit:
            await unit.session.execute(insert(Note).values(text="around"))
            with contextlib.suppress(KeyError):
                await part()
    assert unit.status is Status.ROLLED_BACK
    assert await db.rows("SELECT text FROM note") == []
