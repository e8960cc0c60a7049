"""P4, P5: what SERIALIZABLE forbids does not happen, and happens without it."""

from __future__ import annotations

import asyncio
import logging

import pytest
from sqlalchemy import func, select, text
from sqlalchemy.ext.asyncio import AsyncSession

from sqla_uow import RetryPolicy, UnitOfWorkManager, current_session, current_unit, transactional
from tests.kit.models import Doctor

WORKERS = 16
PATIENT = RetryPolicy(base=0.002, cap=0.2)
READ = text("SELECT balance FROM account WHERE id = 1")
WRITE = text("UPDATE account SET balance = :balance WHERE id = 1")
SERVERS = pytest.mark.drivers("asyncpg", "psycopg", "asyncmy", "aiomysql")


class Start:
    """Lets nobody write before everybody has read, in the first attempt; later ones come through."""

    def __init__(self, db, parties):
        # On SQLite a writer is alone from its BEGIN on: the others cannot read before it has written.
        self._barrier = None if db.family == "sqlite" else asyncio.Barrier(parties)

    async def wait(self, attempt):
        if self._barrier is not None and attempt == 1:
            async with asyncio.timeout(20):
                await self._barrier.wait()


async def go_off_call(session, key):
    """Let a doctor go if another one stays; return whether there was one."""
    on_call = await session.scalar(select(func.count()).where(Doctor.on_call))
    yield
    if on_call > 1:
        (await session.get_one(Doctor, key)).on_call = False
    yield on_call > 1


async def increment(session):
    """Read the balance, and add one to what was read."""
    balance = await session.scalar(READ)
    yield
    await session.execute(WRITE, {"balance": balance + 1})
    yield True


async def in_unit(db, work, **options):
    """Run `work(session, worker)` in a unit of each of sixteen workers; return the results and the attempts."""
    manager = UnitOfWorkManager(db.engine(pool_size=WORKERS), retry=PATIENT)
    start = Start(db, WORKERS)
    attempts = []

    @transactional(using=manager, retries=100, **options)
    async def worker(number):
        unit = current_unit(manager)
        attempts.append(unit.attempt)
        steps = work(current_session(manager), number)
        await anext(steps)
        await start.wait(unit.attempt)
        return await anext(steps)

    return await asyncio.gather(*(worker(number) for number in range(WORKERS))), attempts


async def by_hand(db, work, parties=2):
    """Run the same by hand, at the database's default level."""
    start = Start(db, parties)
    engine = db.engine()

    async def worker(number):
        async with AsyncSession(engine) as session, session.begin():
            steps = work(session, number)
            await anext(steps)
            await start.wait(1)
            return await anext(steps)

    return await asyncio.gather(*(worker(number) for number in range(parties)))


async def doctors(db, count):
    """Put so many doctors on call."""
    for key in range(count):
        await db.run("INSERT INTO doctor (id, shift, on_call) VALUES (:key, 1, true)", key=key)


async def on_call(db):
    """Return how many are on call."""
    return await db.scalar("SELECT count(*) FROM doctor WHERE on_call")


async def test_write_skew_is_never_committed(db, caplog):
    """P4: sixteen doctors want to go at once, and one of them stays; the database really had to refuse."""
    caplog.set_level(logging.INFO, "sqla_uow")
    await doctors(db, WORKERS)
    went, attempts = await in_unit(db, go_off_call, isolation="SERIALIZABLE")
    assert await on_call(db) == 1
    assert went.count(True) == WORKERS - 1
    if db.family != "sqlite":  # whose writers queue: there is nothing to retry
        retries = [record for record in caplog.records if "again in" in record.message]
        assert len(retries) == len(attempts) - WORKERS >= 1
        assert max(attempts) > 1


async def test_no_increment_is_lost(db):
    """P4, T25: sixteen workers read the same number and add one; it rises by sixteen."""
    await db.run("INSERT INTO account (id, balance) VALUES (1, 0)")
    _results, attempts = await in_unit(db, lambda session, _: increment(session), isolation="SERIALIZABLE")
    assert await db.scalar("SELECT balance FROM account") == WORKERS
    assert (max(attempts) > 1) == (db.family != "sqlite")


@SERVERS
async def test_write_skew_is_committed_at_the_default_level(db):
    """The control: the same code by hand leaves nobody on call, on PostgreSQL and MariaDB alike."""
    await doctors(db, 2)
    assert await by_hand(db, go_off_call) == [True, True]
    assert await on_call(db) == 0


async def test_an_increment_is_lost_at_the_default_level(db):
    """The control: two increments by hand make one; on SQLite too, as SQLAlchemy ships it, with more of them."""
    await db.run("INSERT INTO account (id, balance) VALUES (1, 0)")
    count = 10 if db.family == "sqlite" else 2
    await by_hand(db, lambda session, _: increment(session), parties=count)
    assert await db.scalar("SELECT balance FROM account") < count


@SERVERS
async def test_the_library_does_not_hide_a_level_that_is_too_weak(db):
    """The control of the retries: units at the default level lose the update without a word; nothing is to be retried."""
    await db.run("INSERT INTO account (id, balance) VALUES (1, 0)")
    # No contention control: on PostgreSQL an attempt that waits long for a lock would be run again, and lose nothing.
    policy = RetryPolicy(contention="off")
    _results, attempts = await in_unit(db, lambda session, _: increment(session), retry=policy)
    assert await db.scalar("SELECT balance FROM account") == 1
    assert attempts == [1] * WORKERS


@SERVERS
async def test_a_read_modify_write_is_exact_with_a_lock_at_the_default_level(db):
    """The other cure: FOR UPDATE waits where SERIALIZABLE retries."""
    await db.run("INSERT INTO account (id, balance) VALUES (1, 0)")
    manager = UnitOfWorkManager(db.engine(pool_size=WORKERS))

    @transactional(using=manager)
    async def once():
        balance = await current_session(manager).scalar(text(READ.text + " FOR UPDATE"))
        await current_session(manager).execute(WRITE, {"balance": balance + 1})

    await asyncio.gather(*(once() for _ in range(WORKERS)))
    assert await db.scalar("SELECT balance FROM account") == WORKERS
