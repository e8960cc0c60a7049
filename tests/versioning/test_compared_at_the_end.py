"""Versions that the body has not written are compared at the end: what comes of that is done before COMMIT, too."""

from __future__ import annotations

import asyncio

import pytest
from sqlalchemy import event

from sqla_uow import RetryPolicy, Status, UnitOfWorkManager, current_session, errors, transactional
from sqla_uow.mixins import expect_version
from sqla_uow.testing import FaultPlan
from tests.versioning.tables import Plain


@pytest.mark.parametrize("work", ["hook", "object"])
async def test_work_that_comes_while_versions_are_compared(db, versioned, work):
    """A listener of the statement that compares makes more of it."""
    ran = []
    async with versioned.begin() as unit:
        unit.session.add_all([Plain(id=1, value=0), Plain(id=2, value=0)])
    async with versioned.begin() as unit:
        row, other = [await unit.session.get_one(Plain, key) for key in (1, 2)]
        expect_version(row, 1)

        def more(*_):
            if work == "hook":
                unit.before_commit(ran.append, "hook")
            else:
                other.value = 7

        connection = await unit.session.connection()
        event.listen(connection.sync_connection, "before_cursor_execute", more, once=True)
    assert unit.status is Status.COMMITTED
    assert ran == (["hook"] if work == "hook" else [])
    assert await db.scalar("SELECT value FROM plain WHERE id = 2") == (0 if work == "hook" else 7)


async def test_the_look_for_a_stale_row_ends_with_the_deadline(db, versioned):
    """It waits for a connection, behind a conflict, no longer than the call may take."""
    async with versioned.begin() as unit:
        unit.session.add(Plain(id=1, value=0))
    manager = UnitOfWorkManager(
        db.engine(pool_size=1, max_overflow=0, pool_timeout=10), retry=RetryPolicy(base=0, cap=0)
    )
    ended = asyncio.Event()

    async def hold():
        async with manager.engine.connect():
            await ended.wait()

    @transactional(using=manager, retries=1, timeout=1)
    async def work():
        row = await current_session().get_one(Plain, 1)
        expect_version(row, 1)
        row.value = 1
        holders.append(asyncio.create_task(hold()))
        await asyncio.sleep(0)  # in line for our connection

    holders = []
    async with asyncio.timeout(5):
        with pytest.raises(errors.UnitOfWorkError), FaultPlan(manager, "conflict", at="commit"):
            await work()
    ended.set()
    await asyncio.gather(*holders)
    assert await db.scalar("SELECT value FROM plain WHERE id = 1") == 0
