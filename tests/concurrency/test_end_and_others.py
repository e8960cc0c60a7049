"""What other tasks may still do to a unit that has come to its end: nothing."""

from __future__ import annotations

import asyncio
import gc
import weakref

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
    assert str(refused) == (
        "begin() is ending and takes no more SQL; open a new unit for more SQL, or call current_session() again"
    )
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


async def test_a_cancellation_that_comes_under_the_rollback_of_a_failed_end(db):
    """Likewise where the body was done: the cancellation says what it came upon."""
    manager = UnitOfWorkManager(db.engine(pool_size=1, max_overflow=0))

    def fail():
        task.cancel()
        raise KeyError("of the hook")

    async def work():
        async with manager.begin() as unit:
            await unit.session.execute(insert(Note).values(text="undone"))
            unit.before_commit(fail)

    task = asyncio.create_task(work())
    with pytest.raises(asyncio.CancelledError) as cancelled:
        await task
    assert type(cancelled.value.__context__) is KeyError
    assert await db.rows("SELECT text FROM note") == []
    assert manager.engine.pool.checkedout() == 0


@pytest.mark.parametrize("fails", [False, True], ids=["committed", "rolled back"])
async def test_a_unit_that_is_kept_keeps_no_task(db, fails):
    """Not the one that has used it: statuses may be collected for long."""
    manager = UnitOfWorkManager(db.engine(pool_size=1, max_overflow=0))
    units = []

    async def work():
        async with manager.begin() as unit:
            units.append(unit)
            await unit.session.execute(insert(Note).values(text="kept"))
            if fails:
                unit.doom()

    task = asyncio.create_task(work())
    await task
    seen = weakref.ref(task)
    del task
    await asyncio.sleep(0)  # the loop lets go of whom it has just woken us for
    gc.collect()
    assert seen() is None
    assert [unit.status for unit in units] == [Status.ROLLED_BACK if fails else Status.COMMITTED]


async def test_a_cancellation_that_comes_under_the_commit(db):
    """There is no hook that could bring it: it is told when the work is committed, and says so."""
    manager = UnitOfWorkManager(db.engine(pool_size=1, max_overflow=0))

    async def work():
        async with manager.begin() as unit:
            await unit.session.execute(insert(Note).values(text="kept"))
            unit.before_commit(task.cancel)  # reaches it at its next wait, which is for the answer to COMMIT

    task = asyncio.create_task(work())
    with pytest.raises(asyncio.CancelledError) as cancelled:
        await task
    assert len(cancelled.value.__notes__) == 1
    assert cancelled.value.__notes__[0].startswith("sqla_uow: cancelled; the outcome of ")
    assert cancelled.value.__notes__[0].endswith(" is: committed")
    assert await db.rows("SELECT text FROM note") == [("kept",)]
    assert manager.engine.pool.checkedout() == 0
