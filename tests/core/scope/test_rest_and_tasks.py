"""`scope.rest()` ends the reading of tasks that are done with it, and leaves it to one that is not."""

from __future__ import annotations

import asyncio

import anyio
import pytest
from sqlalchemy import event, text
from sqlalchemy.util import await_only

from sqla_uow import UnitOfWorkManager, current_session
from tests.kit.models import Account


@pytest.fixture
async def manager(db):
    """A manager with one connection, activated, over one account."""
    await db.run("INSERT INTO account (id, balance) VALUES (1, 10)")
    manager = UnitOfWorkManager(db.engine(pool_size=1, max_overflow=0))
    with manager.activate():
        yield manager


async def read():
    """Return the balance."""
    return (await current_session().get_one(Account, 1)).balance


async def test_what_a_child_has_read_that_is_done(manager):
    """Nobody uses the session any more."""
    async with manager.scope() as scope:
        await read()
        await asyncio.create_task(read())
        await scope.rest()
        assert manager.engine.pool.checkedout() == 0
        assert await read() == 10


async def test_by_a_child_of_whom_has_read(manager):
    """The parent waits for it, so uses nothing meanwhile."""
    async with manager.scope() as scope:
        await read()
        await asyncio.create_task(scope.rest())
        assert manager.engine.pool.checkedout() == 0
        assert await read() == 10


async def test_by_a_child_of_anyio_that_was_started_before_its_parent_has_read(manager):
    """It has inherited nothing that tells of its parent; anyio knows."""
    turn = asyncio.Event()

    async def child(scope):
        await turn.wait()
        await scope.rest()
        assert manager.engine.pool.checkedout() == 0

    async def parent(scope):
        async with anyio.create_task_group() as group:
            group.start_soon(child, scope)
            await asyncio.sleep(0)
            await read()
            turn.set()

    async with manager.scope() as scope:
        await asyncio.create_task(parent(scope))


async def test_under_a_statement_of_a_child(manager):
    """It gets its rows."""
    sent, go_on = asyncio.Event(), asyncio.Event()

    def wait(*_):
        sent.set()
        await_only(go_on.wait())

    async def ask():
        session = current_session()
        connection = await session.connection()
        event.listen(connection.sync_connection, "before_cursor_execute", wait, once=True)
        return await session.scalar(text("SELECT balance FROM account"))

    async with manager.scope() as scope:
        child = asyncio.create_task(ask())
        await sent.wait()
        await scope.rest()
        go_on.set()
        assert await child == 10
        await scope.rest()
        assert manager.engine.pool.checkedout() == 0


async def test_by_a_child_under_a_statement_of_its_parent(manager):
    """The parent gets its rows, though the child could use the session at any other time."""
    sent, rested = asyncio.Event(), asyncio.Event()

    def wait(*_):
        sent.set()
        await_only(rested.wait())

    async def rest(scope):
        await sent.wait()
        try:
            await scope.rest()
        finally:
            rested.set()

    async with manager.scope() as scope:
        session = current_session()
        connection = await session.connection()
        event.listen(connection.sync_connection, "before_cursor_execute", wait, once=True)
        child = asyncio.create_task(rest(scope))
        assert await session.scalar(text("SELECT balance FROM account")) == 10
        await child
        await scope.rest()
        assert manager.engine.pool.checkedout() == 0
