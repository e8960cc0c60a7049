"""What `manager.statistics()` counts, and that it agrees with the database."""

from __future__ import annotations

import asyncio
import threading

import pytest
from sqlalchemy import text
from sqlalchemy.pool import NullPool

from sqla_uow import RetryPolicy, UnitOfWorkManager, current_session, errors, transactional
from sqla_uow.testing import rolled_back
from sqla_uow.typing import Contention, PoolState
from tests.kit.models import Note
from tests.kit.queueing import narrow

SELECT = text("SELECT 1")


async def test_a_new_manager_has_counted_nothing(db):
    """All zero; the pool says what it is."""
    seen = UnitOfWorkManager(db.engine(pool_size=3, max_overflow=2)).statistics()
    assert (seen.begun, seen.committed, seen.rolled_back, seen.ambiguous, seen.attempts, seen.open) == (0,) * 6
    assert (seen.gave_up, seen.doomed, seen.timed_out, seen.readings) == (0,) * 4
    assert (dict(seen.retries), seen.contention) == ({}, ())
    assert seen.pool == PoolState(size=3, checked_out=0, overflow=0, limit=5, idle=0)


async def test_what_a_unit_does_is_counted(db):
    """Open and its connection lent while it runs, committed or rolled back afterwards, as the database has it."""
    manager = UnitOfWorkManager(db.engine(pool_size=2, max_overflow=0))
    async with manager.begin() as unit:
        unit.session.add(Note(text="written"))
        await unit.session.flush()
        during = manager.statistics()
    with pytest.raises(ZeroDivisionError):
        async with manager.begin() as unit:
            unit.session.add(Note(text="written"))
            raise ZeroDivisionError
    async with manager.begin() as unit:
        unit.doom()
    async with manager.scope():
        await current_session(manager).execute(SELECT)
    after = manager.statistics()
    assert (during.begun, during.open, during.committed, during.pool.checked_out) == (1, 1, 0, 1)
    assert (after.begun, after.open, after.committed, after.rolled_back, after.doomed) == (3, 0, 1, 2, 1)
    assert (after.attempts, after.readings, after.pool.checked_out) == (3, 1, 0)
    assert await db.scalar("SELECT count(*) FROM note") == after.committed


async def test_retries_are_counted_by_reason_and_code(db, trouble):
    """Two conflicts and a success; then a call that gives up."""
    manager = UnitOfWorkManager(trouble.engine())
    struck = []

    @transactional(using=manager, retries=2, isolation=trouble.isolation)
    async def write(times):
        await trouble.settle()
        if len(struck) < times:
            struck.append(1)
            await trouble.strike(current_session(manager))
        await trouble.write(current_session(manager))

    await write(2)
    seen = manager.statistics()
    assert dict(seen.retries) == {(trouble.reason, trouble.code): 2}
    assert (seen.begun, seen.attempts, seen.committed, seen.gave_up) == (1, 3, 1, 0)
    with pytest.raises(errors.ConflictError):
        await write(10)
    seen = manager.statistics()
    assert dict(seen.retries) == {(trouble.reason, trouble.code): 4}
    assert (seen.begun, seen.attempts, seen.committed, seen.rolled_back, seen.gave_up, seen.open) == (2, 6, 1, 1, 1, 0)
    assert await db.scalar("SELECT count(*) FROM note") == 1


@pytest.mark.drivers("asyncpg", "psycopg", "asyncmy", "aiomysql")
async def test_an_unknown_commit_is_counted_apart(wire):
    """Neither committed nor rolled back."""
    manager = UnitOfWorkManager(wire.engine)
    wire.on_commit("cut", applied=True)
    with pytest.raises(errors.AmbiguousCommitError):
        async with manager.begin() as unit:
            await unit.session.execute(text("UPDATE account SET balance = balance + 1"))
    seen = manager.statistics()
    assert (seen.ambiguous, seen.committed, seen.rolled_back, seen.open) == (1, 0, 0, 0)
    assert await wire.balance() == 1


async def test_a_deadline_that_passed_is_counted(db):
    """As timed out, and rolled back."""
    manager = UnitOfWorkManager(db.engine())
    with pytest.raises(errors.TransactionTimeoutError):
        async with manager.begin(timeout=0.05) as unit:
            unit.session.add(Note(text="written"))
            await asyncio.Event().wait()
    seen = manager.statistics()
    assert (seen.timed_out, seen.rolled_back, seen.open) == (1, 1, 0)
    assert await db.scalar("SELECT count(*) FROM note") == 0


async def test_functions_whose_calls_take_turns_are_named(db):
    """A function and a loop, as `contention()` shows them."""
    manager = UnitOfWorkManager(db.engine())
    inside, leave = asyncio.Event(), asyncio.Event()

    @transactional(using=manager, retries=1, retry=RetryPolicy(contention="off"))
    async def apart():
        pass

    @transactional(using=manager, retries=1)
    async def hold():
        inside.set()
        await leave.wait()

    async def loop():
        async for attempt in manager.attempts(retries=1):
            async with attempt:
                pass

    await apart()
    await loop()
    assert manager.statistics().contention == ()  # nothing has conflicted
    narrow(manager, hold, width=2)
    running = asyncio.create_task(hold())
    await inside.wait()
    seen = dict(manager.statistics().contention)
    leave.set()
    await running
    assert seen == {"hold()": Contention(2, 1, 0, 0.0)}


async def test_a_pool_without_numbers_has_none(db):
    """`NullPool` keeps nothing and knows nothing."""
    manager = UnitOfWorkManager(db.engine(poolclass=NullPool))
    assert manager.statistics().pool == PoolState(None, None, None, None, None)


async def test_a_snapshot_does_not_change(db):
    """The difference of two is what happened between them."""
    manager = UnitOfWorkManager(db.engine())
    before = manager.statistics()
    async with manager.begin():
        pass
    assert (before.begun, manager.statistics().begun) == (0, 1)
    with pytest.raises(AttributeError):
        before.begun = 7
    with pytest.raises(TypeError):
        before.retries["conflict", None] = 1


@pytest.mark.drivers("sqlite")
async def test_calls_of_several_threads_are_counted(db):
    """Each thread with a loop of its own: no call is lost, though they raise the same numbers."""
    manager = UnitOfWorkManager(db.engine(poolclass=NullPool))
    calls = 500

    async def work():
        for _ in range(calls):
            async with manager.begin(read_only=True):
                pass

    threads = [threading.Thread(target=lambda: asyncio.run(work())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        await asyncio.to_thread(thread.join)
    seen = manager.statistics()
    assert (seen.begun, seen.committed, seen.open) == (4 * calls, 4 * calls, 0)


async def test_tests_that_are_rolled_back_count_for_the_manager(db):
    """Where the testing kit puts another manager in its place, the numbers are still asked of the one users have."""
    manager = UnitOfWorkManager(db.engine())
    async with rolled_back(manager) as inside, inside.begin() as unit:
        unit.session.add(Note(text="written"))
    assert manager.statistics().committed == 1
    assert await db.scalar("SELECT count(*) FROM note") == 0
