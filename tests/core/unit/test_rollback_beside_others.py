"""What the ROLLBACK of a unit does with a connection that somebody else uses, or has given up."""

from __future__ import annotations

import asyncio
import gc

import pytest
from sqlalchemy import event, literal_column, select, text
from sqlalchemy.util import await_only

from sqla_uow import Status, UnitOfWorkManager, errors
from tests.kit.models import Account
from tests.kit.raw import raw_of, send

SLEEP = {"postgresql": "SELECT pg_sleep({})", "mysql": "SELECT sleep({})"}
SERVERS = ("asyncpg", "psycopg", "asyncmy", "aiomysql")


@pytest.fixture
def manager(db):
    """The manager of a fresh database, with one connection."""
    return UnitOfWorkManager(db.engine(pool_size=1, max_overflow=0))


@pytest.fixture
def connected(manager):
    """Return the connections that were made."""
    made = []
    event.listen(manager.engine.sync_engine, "connect", lambda *_: made.append(1))
    return made


@pytest.mark.drivers(*SERVERS)
async def test_a_statement_of_a_child_that_comes_to_its_end(db, manager, connected):
    """The connection is as good as before, and is kept."""
    with pytest.raises(KeyError):
        async with manager.begin() as unit:
            unit.session.add(Account(id=1))
            await unit.session.flush()
            child = asyncio.create_task(unit.session.execute(text(SLEEP[db.family].format(0.3))))
            await asyncio.sleep(0)
            raise KeyError
    await asyncio.wait({child})
    async with manager.begin() as unit:
        unit.session.add(Account(id=2))
    assert connected == [1]
    assert await db.rows("SELECT id FROM account") == [(2,)]


@pytest.mark.drivers(*SERVERS)
async def test_a_cancellation_while_a_statement_of_a_child_is_waited_for(db, manager):
    """It is not lost for the error that rolls the unit back."""

    async def work():
        async with manager.begin() as unit:
            unit.session.add(Account(id=1))
            await unit.session.flush()
            children.append(asyncio.create_task(unit.session.execute(text(SLEEP[db.family].format(0.3)))))
            await asyncio.sleep(0)
            asyncio.get_running_loop().call_later(0.1, task.cancel)
            raise KeyError

    children = []
    task = asyncio.create_task(work())
    with pytest.raises(asyncio.CancelledError) as caught:
        await task
    assert isinstance(caught.value.__context__, KeyError)
    await asyncio.wait(children)
    assert manager.engine.pool.checkedout() == 0
    assert await db.rows("SELECT id FROM account") == []


@pytest.mark.drivers(*SERVERS)
async def test_a_flush_of_a_child_that_comes_to_its_end(db, manager, connected):
    """Likewise; the end goes on as soon as it can."""
    slow = text(SLEEP[db.family].format(0.3)).columns().subquery()
    with pytest.raises(KeyError):
        async with manager.begin() as unit:
            await unit.session.execute(text("SELECT 1"))
            unit.session.add(Account(id=1, balance=select(literal_column("1")).select_from(slow).scalar_subquery()))
            child = asyncio.create_task(unit.session.flush())
            await asyncio.sleep(0)
            raise KeyError
    await asyncio.wait({child})
    async with manager.begin() as unit:
        unit.session.add(Account(id=2))
    assert connected == [1]
    assert await db.rows("SELECT id FROM account") == [(2,)]


@pytest.mark.drivers("asyncmy", "aiomysql")  # PostgreSQL's tell only of calls that are over
async def test_a_short_call_on_the_drivers_connection(db, manager, connected):
    """Likewise, where it is the first that the child does."""
    with pytest.raises(KeyError):
        async with manager.begin() as unit:
            unit.session.add(Account(id=1))
            await unit.session.flush()
            child = asyncio.create_task(send(await raw_of(unit.session), SLEEP[db.family].format(0.3)))
            await asyncio.sleep(0)
            raise KeyError
    await child
    async with manager.begin() as unit:
        unit.session.add(Account(id=2))
    assert connected == [1]
    assert await db.rows("SELECT id FROM account") == [(2,)]


@pytest.mark.drivers(*SERVERS)
async def test_a_long_call_on_the_drivers_connection(db, manager, caplog):
    """It is cut off, not waited for; nothing goes wrong on the way."""
    async with asyncio.timeout(8):
        with pytest.raises(KeyError):
            async with manager.begin() as unit:
                unit.session.add(Account(id=1))
                await unit.session.flush()
                child = asyncio.create_task(send(await raw_of(unit.session), SLEEP[db.family].format(30)))
                await asyncio.sleep(0.1)  # it is under way on the server
                raise KeyError
        assert unit.status is Status.ROLLED_BACK
        await asyncio.wait({child})
    async with manager.begin() as unit:
        unit.session.add(Account(id=2))
    assert await db.rows("SELECT id FROM account") == [(2,)]
    gc.collect()  # asyncio tells of an error that nobody asks for
    assert [record for record in caplog.records if record.name == "asyncio"] == []


async def test_a_connection_that_the_body_has_given_up(db, manager, caplog):
    """The body's own error is what it ends with."""
    with pytest.raises(KeyError):
        async with manager.begin() as unit:
            unit.session.add(Account(id=1))
            await unit.session.flush()
            await (await unit.session.connection()).invalidate()
            raise KeyError
    assert unit.status is Status.ROLLED_BACK
    assert manager.engine.pool.checkedout() == 0
    assert not any("failed" in message for message in caplog.messages)
    async with manager.begin() as unit:
        unit.session.add(Account(id=2))
    assert await db.rows("SELECT id FROM account") == [(2,)]


async def test_a_statement_of_a_child_under_the_rollback(db, manager):
    """On the connection, past the session: refused, while the unit ends."""
    ending, tried = asyncio.Event(), asyncio.Event()

    def pause(_connection):
        ending.set()
        await_only(tried.wait())

    async def write(connection):
        await ending.wait()
        try:
            with pytest.raises(errors.NoUnitError):
                await connection.execute(text("INSERT INTO account (id, balance) VALUES (3, 0)"))
        finally:
            tried.set()

    event.listen(manager.engine.sync_engine, "rollback", pause, once=True)
    async with asyncio.timeout(8):
        with pytest.raises(KeyError):
            async with manager.begin() as unit:
                unit.session.add(Account(id=1))
                await unit.session.flush()
                child = asyncio.create_task(write(await unit.session.connection()))
                raise KeyError
        await child
    assert unit.status is Status.ROLLED_BACK
    assert await db.rows("SELECT id FROM account") == []
