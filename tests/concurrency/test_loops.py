"""S10: several event loops over one engine work or are refused; none waits for the other, and no pool is poisoned."""

from __future__ import annotations

import asyncio
import gc
import threading
import time

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from sqla_uow import UnitOfWorkManager, current_session, errors, transactional
from tests.kit.models import Base
from tests.kit.queueing import narrow

ADD = text("INSERT INTO account (id, balance) VALUES (:id, 0)")


def in_threads(*jobs):
    """Run each coroutine function in an event loop of a thread of its own; return what failed."""
    failures = []

    def run(job):
        try:
            asyncio.run(job())
        except BaseException as error:  # noqa: BLE001  # the test raises what it finds
            failures.append(error)

    threads = [threading.Thread(target=run, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    return failures


async def test_writers_of_several_loops_all_get_in(db):
    """S10: on SQLite as elsewhere nobody's place in the line is lost when another loop comes; no attempt is wasted."""
    manager = UnitOfWorkManager(db.engine(poolclass=NullPool))
    attempts = []

    @transactional(using=manager, retries=5)
    async def write(key):
        attempts.append(key)
        await current_session(manager).execute(ADD, {"id": key})

    def job(number):
        async def writers():
            for turn in range(4):
                await asyncio.gather(*(write(number * 100 + turn * 10 + key) for key in range(3)))

        return writers

    started = time.monotonic()
    failures = await asyncio.to_thread(in_threads, *(job(number) for number in range(4)))
    assert failures == []
    assert await db.scalar("SELECT count(*) FROM account") == 48
    assert manager.statistics().retries.get("not started", 0) == 0
    assert time.monotonic() - started < 20


@pytest.mark.drivers("sqlite")
async def test_loops_share_the_one_connection_of_a_database_in_memory_in_turn(driver):
    """S10: a unit of one loop never runs inside the transaction of another's."""
    engine = create_async_engine("sqlite+aiosqlite://")
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
        await connection.execute(ADD, {"id": 1})
    manager = UnitOfWorkManager(engine)

    @transactional(using=manager)
    async def increment():
        session = current_session(manager)
        value = await session.scalar(text("SELECT balance FROM account"))
        await asyncio.sleep(0.001)
        await session.execute(text("UPDATE account SET balance = :value"), {"value": value + 1})

    async def increments():
        for _ in range(10):
            await asyncio.gather(increment(), increment())

    started = time.monotonic()
    failures = await asyncio.to_thread(in_threads, increments, increments, increments)
    assert failures == []
    async with engine.connect() as connection:
        assert await connection.scalar(text("SELECT balance FROM account")) == 60
    assert time.monotonic() - started < 20
    await engine.dispose()


@pytest.mark.drivers("sqlite")
async def test_each_loop_learns_of_conflicts_by_itself(db):
    """S10: what one loop knows of a function is not thrown away by a call in another; statistics show both."""
    manager = UnitOfWorkManager(db.engine(poolclass=NullPool))

    @transactional(using=manager, retries=1)
    async def call():
        await current_session(manager).execute(text("SELECT 1"))

    narrow(manager, call)
    await asyncio.to_thread(in_threads, call)
    await call()
    assert manager.contention(call) == (1, 0, 0, 0.0)
    assert len(manager.statistics().contention) == 1


@pytest.mark.parametrize("reads", [False, True])
async def test_a_loop_in_a_thread_inside_a_scope(db, reads):
    """S10: it works where the pool keeps no connections, whatever the scope's read session is doing."""
    manager = UnitOfWorkManager(db.engine(poolclass=NullPool))

    @transactional(using=manager)
    async def write(key):
        await current_session(manager).execute(ADD, {"id": key})

    started = time.monotonic()
    async with manager.scope():
        if reads:
            await current_session(manager).execute(text("SELECT * FROM account"))
        await asyncio.to_thread(asyncio.run, write(1))
        if reads:
            await current_session(manager).execute(text("SELECT * FROM account"))
        await write(2)
    assert await db.rows("SELECT id FROM account ORDER BY id") == [(1,), (2,)]
    assert time.monotonic() - started < 5


async def test_a_pool_of_another_loop_is_refused_or_works(db):
    """S10: and it is as sound afterwards as it was; its own loop goes on."""
    engine = db.engine(pool_size=2, max_overflow=0)
    manager = UnitOfWorkManager(engine)

    @transactional(using=manager)
    async def write(key):
        await current_session(manager).execute(ADD, {"id": key})

    await write(1)
    started = time.monotonic()
    async with manager.scope():
        await current_session(manager).execute(text("SELECT * FROM account"))
        if db.driver in ("asyncpg", "asyncmy", "aiomysql"):
            with pytest.raises(errors.TaskBoundaryError, match=r"write\(\) runs in another event loop"):
                await asyncio.to_thread(asyncio.run, write(2))
        else:
            await asyncio.to_thread(asyncio.run, write(2))
    for key in (3, 4, 5):
        await write(key)
    async with engine.connect() as connection:
        assert await connection.scalar(text("SELECT count(*) FROM account WHERE id > 2")) == 3
    assert time.monotonic() - started < 5
    assert engine.pool.checkedout() == 0


@pytest.mark.filterwarnings(
    # Nobody closes what a closed loop has left in the pool: no loop could.
    "ignore::ResourceWarning",
    "ignore::pytest.PytestUnraisableExceptionWarning",
)
async def test_a_loop_after_another_gets_connections_of_its_own(db):
    """S10: those of a closed loop are of no use; without a unit they fail, and with asyncpg for ever."""
    engine = db.engine(pool_size=1, max_overflow=0)
    manager = UnitOfWorkManager(engine)

    @transactional(using=manager)
    async def write(key):
        await current_session(manager).execute(ADD, {"id": key})

    for key in (1, 2, 3):
        await asyncio.to_thread(asyncio.run, write(key))
    await write(4)
    assert await db.scalar("SELECT count(*) FROM account") == 4
    assert engine.pool.checkedout() == 0
    gc.collect()


@pytest.mark.drivers("sqlite")
async def test_a_unit_of_one_loop_is_not_waited_for_by_the_loop_it_waits_for(db):
    """S10: `requires_new` in a thread, of which the outer unit waits for the end: refused at once."""
    manager = UnitOfWorkManager(db.engine(poolclass=NullPool))

    @transactional(using=manager, propagation="requires_new")
    async def inner():
        await current_session(manager).execute(ADD, {"id": 2})

    started = time.monotonic()
    async with manager.begin() as unit:
        await unit.session.execute(ADD, {"id": 1})
        with pytest.raises((errors.PropagationError, DBAPIError)):
            await asyncio.to_thread(asyncio.run, inner())
    assert time.monotonic() - started < 5
    assert await db.rows("SELECT id FROM account") == [(1,)]
