"""What other tasks may still do to a unit that has come to its end: nothing."""

from __future__ import annotations

import asyncio

import pytest
from sqlalchemy import insert, text

from sqla_uow import Status, UnitOfWorkManager, errors
from tests.kit.models import Note


async def test_a_task_that_was_waiting_for_the_end_of_the_body(db):
    """It comes to run between the last check and the COMMIT: refused, and the COMMIT is not disturbed."""
    manager = UnitOfWorkManager(db.engine(pool_size=1, max_overflow=0))
    hooks = []
    async with manager.begin() as unit:
        session = unit.session
        end = asyncio.Event()

        async def write():
            await end.wait()
            await session.execute(insert(Note).values(text="late"))

        await session.execute(insert(Note).values(text="in time"))
        unit.before_commit(end.set)  # the last of what the unit does before it is sealed, in the same step of the loop
        unit.after_commit(hooks.append, "committed")
        late = asyncio.create_task(write())
        await asyncio.sleep(0)
    (refused,) = await asyncio.gather(late, return_exceptions=True)
    assert type(refused) is errors.NoUnitError
    assert (unit.status, hooks) == (Status.COMMITTED, ["committed"])
    assert await db.rows("SELECT text FROM note") == [("in time",)]
    assert manager.engine.pool.checkedout() == 0
    async with manager.begin() as following:  # on the same connection
        assert await following.session.scalar(text("SELECT 1")) == 1


async def test_a_cancellation_that_comes_under_the_rollback(db):
    """It is not lost for the error that rolled the unit back, nor that for it; with no hook that could bring it."""
    manager = UnitOfWorkManager(db.engine(pool_size=1, max_overflow=0))

    async def work():
        async with manager.begin() as unit:
            await unit.session.execute(insert(Note).values(text="undone"))
            task.cancel()  # reaches it at its next wait, which is for the answer to ROLLBACK
            raise KeyError("mine")

    task = asyncio.create_task(work())
    with pytest.raises(asyncio.CancelledError) as cancelled:
        await task
    assert type(cancelled.value.__context__) is KeyError
    assert await db.rows("SELECT text FROM note") == []
    assert manager.engine.pool.checkedout() == 0
