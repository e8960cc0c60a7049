"""Claims where something goes wrong: many at a time, cancellation, lost answers of COMMIT."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import pytest

from sqla_uow import UnitOfWorkManager, errors, transactional
from sqla_uow.testing import assert_no_leaks, cancel_at
from tests.idempotency.test_claim import add_one
from tests.kit.databases import ONE_OF_EACH
from tests.kit.losses import COMMIT
from tests.kit.waiting import until
from tests.servers import Proxy

LEVELS = {
    "sqlite": ["SERIALIZABLE"],
    "postgresql": ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"],
    "mysql": ["READ UNCOMMITTED", "READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"],
}
RECORDS = "SELECT count(*) FROM uow_idempotency"


@pytest.mark.drivers(*ONE_OF_EACH)
async def test_many_deliveries_of_one_message(db, keys, balance):
    """At every level: it is worked once, and all others hear so in the end."""
    await db.run("INSERT INTO account (id, balance) VALUES (1, 0)")
    manager = UnitOfWorkManager(db.engine(pool_size=20, max_overflow=0))
    for number, level in enumerate(LEVELS[db.family]):

        @transactional(retries=100, isolation=level)
        async def handle(key):
            if not await keys.claim("orders", key):
                return False
            await add_one()
            return True

        with manager.activate():
            told = await asyncio.gather(*(handle(level) for _ in range(200)))
        assert sum(told) == 1, level
        assert await balance() == number + 1, level


@pytest.mark.drivers("asyncpg", "asyncmy")
async def test_claims_of_different_keys_do_not_meet(db, keys):
    """New keys, and keys that have expired, are claimed in twenty transactions at a time, at every level: none is a conflict."""
    manager = UnitOfWorkManager(db.engine(pool_size=20, max_overflow=0))
    for level in LEVELS[db.family]:
        everybody = asyncio.Barrier(20)

        @transactional(isolation=level)
        async def handle(number, level=level, everybody=everybody):
            claimed = await keys.claim("orders", f"{level} {number}")
            await everybody.wait()
            return claimed

        with manager.activate():
            async with manager.begin():
                for number in range(0, 20, 2):
                    assert await keys.claim("orders", f"{level} {number}", keep=timedelta(microseconds=1))
            async with asyncio.timeout(20):
                assert await asyncio.gather(*map(handle, range(20))) == [True] * 20, level


async def test_cancelled_anywhere(db, manager, keys):
    """Wherever a consumer is cancelled, the record is there if the work is; delivered again, it is there once."""

    @transactional
    async def handle(key):
        if await keys.claim("orders", key):
            await add_one()

    await handle("warm")
    with assert_no_leaks(manager):
        for suspension in range(1, 100):
            await db.run("UPDATE account SET balance = 0")
            name = f"k{suspension}"
            if not await cancel_at(suspension, handle(name)):
                break
            await until(lambda: not manager.engine.pool.checkedout())
            assert await db.scalar(RECORDS) == suspension + await db.scalar("SELECT balance FROM account")
            for _ in range(2):
                await handle(name)
            assert await db.scalar("SELECT balance FROM account") == 1
    assert suspension >= 4


@pytest.mark.drivers("asyncpg", "psycopg", "asyncmy", "aiomysql")
@pytest.mark.parametrize("applied", [True, False])
async def test_an_answer_of_commit_that_is_lost(db, keys, balance, applied):
    """Delivered again, the message is worked if it was not."""
    await db.run("INSERT INTO account (id, balance) VALUES (1, 0)")
    with Proxy("127.0.0.1", db.port) as proxy:
        manager = UnitOfWorkManager(db.engine(port=proxy.port, pool_size=1, max_overflow=0))

        @transactional(retries=20)
        async def handle():
            if not await keys.claim("orders", "a"):
                return False
            await add_one()
            return True

        with manager.activate():
            proxy.on_client_bytes(COMMIT[db.driver], "cut", after_server=applied)
            with pytest.raises(errors.AmbiguousCommitError):
                await handle()
            assert await handle() == (not applied)
        await manager.engine.dispose()
    assert await balance() == 1


@pytest.mark.drivers("asyncpg", "psycopg", "asyncmy", "aiomysql")
@pytest.mark.parametrize("applied", [True, False])
async def test_an_answer_of_commit_that_is_held_back(db, keys, balance, applied):
    """While the server has yet to decide, the key is taken: whoever repeats is told to come again, and never runs beside it."""
    await db.run("INSERT INTO account (id, balance) VALUES (1, 0)")
    with Proxy("127.0.0.1", db.port) as proxy:
        manager = UnitOfWorkManager(db.engine(port=proxy.port, pool_size=1, max_overflow=0))
        other = UnitOfWorkManager(db.engine())

        @transactional
        async def handle():
            if not await keys.claim("orders", "a"):
                return False
            await add_one()
            return True

        with manager.activate():
            held = proxy.on_client_bytes(COMMIT[db.driver], "hold", after_server=applied)
            first = asyncio.create_task(handle())
            await until(lambda: held.fired)
        with other.activate():
            if applied:
                assert not await handle()
            else:
                with pytest.raises(errors.ConflictError):
                    await handle()
        held.release()
        assert await first
        with other.activate():
            assert not await handle()
        await manager.engine.dispose()
    assert await balance() == 1
