"""Units that are left where nobody expects it: in another task, by a generator that is closed, behind a savepoint that hangs."""

from __future__ import annotations

import asyncio

import pytest
from sqlalchemy import text

from sqla_uow import Status, UnitOfWorkManager, current_session, current_unit, errors, transactional
from tests.kit.logged import logged
from tests.kit.models import Note
from tests.servers import Proxy


@pytest.mark.parametrize("late", [False, True], ids=["in time", "late"])
async def test_a_fixture_with_a_deadline(db, late):
    """It enters in one task, which ends, and leaves in another: the deadline holds, and nobody else is cancelled by it."""
    manager = UnitOfWorkManager(db.engine(pool_size=1, max_overflow=0, pool_timeout=5))
    block = manager.begin(timeout=0.5 if late else 30)
    units = []

    async def enter():
        units.append(await block.__aenter__())
        units[0].session.add(Note(text="written"))
        await units[0].session.flush()

    async def leave():
        if late:
            await asyncio.sleep(0.6)  # no statement: only the clock can tell
        await block.__aexit__(None, None, None)

    await asyncio.create_task(enter())
    leaving = asyncio.create_task(leave())
    if late:
        with pytest.raises(errors.TransactionTimeoutError, match=r"^begin\(\) did not finish within 0.5 s"):
            await leaving
    else:
        await leaving
    assert leaving.cancelling() == 0
    assert units[0].status is (Status.ROLLED_BACK if late else Status.COMMITTED)
    assert await db.scalar("SELECT count(*) FROM note") == (0 if late else 1)
    assert manager.engine.pool.checkedout() == 0


@transactional
async def save(item):
    """Be the consumer's own work."""
    current_session().add(Note(text=item))


async def items(manager):
    """Hold a unit open while somebody else has the word."""
    async with manager.begin():
        yield "a"
        yield "b"


async def test_a_generator_that_is_left_in_the_middle(db, caplog):
    """The consumer's calls have joined its unit: they are rolled back with it, and that is told."""
    manager = UnitOfWorkManager(db.engine())
    with manager.activate():
        generator = items(manager)
        async for item in generator:
            await save(item)
            break
        await generator.aclose()
    assert await db.scalar("SELECT count(*) FROM note") == 0
    [(level, message, fields)] = logged(caplog)
    assert (level, fields) == ("WARNING", {"function": "begin()"})
    assert message == (
        "begin() was left because the async generator around it was closed; what was written in it is rolled back, "
        "also what the code that took its items wrote; let that code begin the unit, or pass a list"
    )


async def test_a_generator_that_comes_to_its_end(db, caplog):
    """Then all is committed, and there is nothing to tell; nor where nothing was written."""
    manager = UnitOfWorkManager(db.engine())
    with manager.activate():
        async for item in items(manager):
            await save(item)
        generator = items(manager)
        async for _item in generator:
            break
        await generator.aclose()
    assert await db.scalar("SELECT count(*) FROM note") == 2
    assert caplog.messages == []


@pytest.mark.drivers("asyncpg", "psycopg", "asyncmy", "aiomysql")
async def test_a_savepoint_whose_rollback_hangs(db, monkeypatch):
    """The unit is doomed at once: whoever catches the error can neither go on nor commit."""
    monkeypatch.setattr("sqla_uow._unit.join.SAVEPOINT_SECONDS", 0.2)
    with Proxy("127.0.0.1", db.port) as proxy:
        engine = db.engine(port=proxy.port, pool_size=1, max_overflow=0, pool_timeout=5)
        manager = UnitOfWorkManager(engine)
        seen, units = [], []

        @transactional(propagation="nested")
        async def part():
            current_session().add(Note(text="undone"))
            await current_session().flush()
            proxy.on_client_bytes(b"ROLLBACK TO", "hold")
            raise KeyError

        @transactional
        async def work():
            units.append(current_unit())
            current_session().add(Note(text="lost"))
            await current_session().flush()
            with pytest.raises(KeyError):
                await part()
            proxy.forward_all()
            seen.append(current_unit().status)
            with pytest.raises(errors.RollbackOnlyError, match=r"rolling back a savepoint in it took more than 0.2 s"):
                await current_session().execute(text("SELECT 1"))

        async with asyncio.timeout(30):
            with manager.activate(), pytest.raises(errors.RollbackOnlyError):
                await work()
        assert seen == [Status.DOOMED]
        assert units[0].status is Status.ROLLED_BACK
        assert await db.scalar("SELECT count(*) FROM note") == 0
        async with manager.begin() as unit:
            assert await unit.session.scalar(text("SELECT 7")) == 7
        await engine.dispose()
