"""What has expired is removed in batches, and nobody waits for that."""

from __future__ import annotations

import asyncio
import json
from datetime import timedelta

import pytest
from sqlalchemy import MetaData, text

from sqla_uow import UnitOfWorkManager
from sqla_uow.__main__ import main
from sqla_uow.idempotency import IdempotencyKeys
from tests.kit.losses import COMMIT
from tests.kit.waiting import until
from tests.servers import Proxy


async def expire(manager, keys, count):
    """Leave some records that have expired, and one that has not."""
    async with manager.begin():
        for number in range(count):
            await keys.claim("orders", f"old {number}", keep=timedelta(milliseconds=1))
        await keys.claim("orders", "new")
    await asyncio.sleep(0.01)


async def test_only_what_has_expired(db, manager, keys):
    """In as many transactions as there are batches."""
    await expire(manager, keys, 25)
    before = manager.statistics().committed
    assert await keys.purge(manager, limit=10) == 25
    assert manager.statistics().committed - before == 3
    assert await db.scalar("SELECT count(*) FROM uow_idempotency") == 1
    assert await keys.purge(manager) == 0


@pytest.mark.drivers("asyncpg", "psycopg", "asyncmy", "aiomysql")
async def test_a_row_that_somebody_has_is_left(manager, keys):
    """A claim takes over a row that has expired while others are removed: neither waits, and the claim stays."""
    await expire(manager, keys, 3)
    async with manager.begin():
        assert await keys.claim("orders", "old 1")
        assert await asyncio.wait_for(asyncio.create_task(keys.purge(manager)), 5) == 2
    async with manager.begin():
        assert not await keys.claim("orders", "old 1")


@pytest.mark.parametrize(
    ("limit", "error"), [(0, ValueError), (10_001, ValueError), (True, TypeError), ("5", TypeError)]
)
async def test_a_batch_of_what_cannot_be(manager, keys, limit, error):
    """It is refused before anything is sent."""
    with pytest.raises(error, match=r"^purge\(\) has limit="):
        await keys.purge(manager, limit=limit)


async def test_the_program(db, manager, keys, capsys):
    """`python -m sqla_uow purge`, as a timer runs it."""
    await expire(manager, keys, 5)
    command = ["purge", db.url, "--limit", "2"]
    assert await asyncio.to_thread(main, command) == 0
    assert capsys.readouterr().out == "removed 5 expired keys\n"
    assert await db.scalar("SELECT count(*) FROM uow_idempotency") == 1


async def test_the_program_in_vain(db, capsys):
    """It says that the table is not there, or nothing is, without the URL's password."""
    assert await asyncio.to_thread(main, ["purge", db.url, "--table", "nowhere"]) == 2
    assert await asyncio.to_thread(main, ["purge", "nonsense"]) == 2
    told = capsys.readouterr().err
    assert "did not do it" in told
    assert "this is not a database URL" in told
    assert ":secret@" not in told


async def test_a_table_of_another_name(db, manager, capsys):
    """With a schema, where there are such."""
    metadata = MetaData(schema=None if db.family == "sqlite" else "public" if db.family == "postgresql" else db.name)
    others = IdempotencyKeys(metadata, name="others")
    async with db.outside() as connection:
        await connection.run_sync(metadata.create_all)
        await connection.execute(text("SELECT 1"))
        await connection.commit()
    await expire(manager, others, 2)
    assert await asyncio.to_thread(main, ["purge", db.url, "--table", others.table.fullname]) == 0
    assert capsys.readouterr().out == "removed 2 expired keys\n"


@pytest.mark.parametrize("age", ["young", "old"])
async def test_the_doctor_sees_that_nobody_does_it(db, manager, keys, capsys, age):
    """It warns of a record that has been expired for more than twice as long as it counted, and of no other."""
    await expire(manager, keys, 1)
    if age == "young":
        await keys.purge(manager)
    status = await asyncio.to_thread(main, ["doctor", db.url, "--json", "--read-only"])
    told = {one["name"]: one for one in json.loads(capsys.readouterr().out)}["idempotency keys"]
    assert (told["level"], "purge" in told["advice"]) == (("warning", True) if age == "old" else ("fine", False))
    assert status == 1 or age == "young"


async def test_the_doctor_says_nothing_of_keys_that_are_not_used(db, capsys):
    """Where the table is not there."""
    await asyncio.to_thread(main, ["doctor", db.url, "--json", "--read-only"])
    assert "idempotency" not in capsys.readouterr().out


@pytest.mark.drivers("asyncpg", "psycopg", "asyncmy", "aiomysql")
async def test_nobody_waits_for_it(db, manager, keys):
    """While it is under way new keys are claimed, also where it has come to the end of the table."""
    async with manager.begin():
        for number in range(5):
            await keys.claim("orders", f"old {number}", keep=timedelta(milliseconds=1))
    await asyncio.sleep(0.01)
    with Proxy("127.0.0.1", db.port) as proxy:
        purging = UnitOfWorkManager(db.engine(port=proxy.port))
        held = proxy.on_client_bytes(COMMIT[db.driver], "hold")
        purge = asyncio.create_task(keys.purge(purging))
        await until(lambda: held.fired)
        async with manager.begin():
            for number in range(20):
                assert await keys.claim("orders", f"new {number}")
        held.release()
        assert await purge == 5
        await purging.engine.dispose()
