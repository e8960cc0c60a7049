"""How the read session of a scope gives way, and what it does not give way to."""

from __future__ import annotations

import asyncio

import pytest
from sqlalchemy import select, text

from sqla_uow import UnitOfWorkManager, current_session
from tests.kit.models import Note
from tests.kit.queueing import a_turn_that_does_not_come
from tests.kit.waiting import until


@pytest.fixture
def manager(db):
    """The manager of a fresh database."""
    return UnitOfWorkManager(db.engine())


async def notes(db):
    """Return what is committed."""
    return [note for (note,) in await db.rows("SELECT text FROM note ORDER BY id")]


async def write_one(manager):
    """Commit a note."""
    async with manager.begin() as unit:
        unit.session.add(Note(text="one"))


@pytest.mark.drivers("asyncpg", "psycopg", "asyncmy", "aiomysql")
async def test_a_read_session_whose_connection_is_lost(db, manager, caplog):
    """S7: what cannot give way is closed, the log says so, and the unit begins on another connection."""
    caplog.set_level("INFO", "sqla_uow")
    with manager.activate():
        async with manager.scope():
            await current_session().execute(select(Note))
            await db.kill(current_session())
            await write_one(manager)
    assert caplog.messages[-1].startswith("the read session could not end its transaction (")
    assert await notes(db) == ["one"]
    assert manager.engine.pool.checkedout() == 0


@pytest.mark.drivers("asyncpg", "psycopg", "asyncmy", "aiomysql")
async def test_a_scope_does_not_rest_under_a_statement(db, manager):
    """S3: another task reads; nothing is ended under it."""
    sleep = text("SELECT pg_sleep(0.2)" if db.family == "postgresql" else "SELECT sleep(0.2)")
    with manager.activate():
        async with manager.scope() as scope:
            session = current_session()
            reading = asyncio.create_task(session.execute(sleep))
            await until(lambda: scope.reading.transaction.owner.in_flight is reading, pause=0)
            await scope.rest()
            assert scope.reading.transaction is not None
            await reading


@pytest.mark.drivers("sqlite")
async def test_a_read_session_that_is_closed_twice(manager):
    """S7: who gives way may find it closed by another task after its wait."""
    with manager.activate():
        async with manager.scope() as scope:
            await current_session().execute(select(Note))
            await asyncio.gather(scope.reading.end(), scope.reading.end())
            assert manager.engine.pool.checkedout() == 0
            assert (await current_session().execute(select(Note))).all() == []


@pytest.mark.drivers("sqlite")
async def test_a_stream_that_is_closed_inside_somebody_elses_scope(manager):
    """S3: the scope there is left as it is."""

    async def stream():
        async with manager.scope():
            yield

    begun = stream()
    await asyncio.create_task(anext(begun))
    with manager.activate():
        async with manager.scope():
            session = current_session()
            await begun.aclose()
            assert current_session() is session


async def test_a_turn_that_does_not_come_in_a_scope(db, manager):
    """R10, S7: the read session had given way for a unit that never began; it is closed, and the next use begins anew."""
    with manager.activate():
        async with manager.scope() as scope:
            await current_session().execute(select(Note))
            async with a_turn_that_does_not_come(manager):
                assert scope.reading.transaction is None
            await current_session().execute(select(Note))
    assert manager.engine.pool.checkedout() == 0


async def test_a_siblings_reading_beside_a_unit_inside_another(manager):
    """S7: only the outermost unit has it give way; one inside that ends nobody's reading."""
    begun, read, go_on = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def sibling():
        await begun.wait()
        session = current_session()
        await session.execute(select(Note))
        read.set()
        await go_on.wait()
        await session.execute(select(Note))

    with manager.activate():
        async with manager.scope():
            task = asyncio.create_task(sibling())
            async with manager.begin():
                begun.set()
                await read.wait()
                async with manager.begin(propagation="requires_new") as unit:
                    assert await unit.session.scalar(text("SELECT 1")) == 1
                go_on.set()
                await task
