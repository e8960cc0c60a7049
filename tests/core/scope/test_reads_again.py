"""A read session whose first statement meets a dead connection begins again on another one; a later statement never does."""

from __future__ import annotations

import contextlib
import gc
import logging

import pytest
from sqlalchemy import select, text
from sqlalchemy.exc import DBAPIError

from sqla_uow import UnitOfWorkManager, current_session, transactional
from sqla_uow.errors import ConflictError
from tests.kit.models import Account
from tests.servers import Proxy

pytestmark = [
    pytest.mark.drivers("asyncpg", "psycopg", "asyncmy", "aiomysql"),
    # aiomysql cannot close a dead connection of the pool, psycopg no cursor on one; both complain when they are collected.
    pytest.mark.filterwarnings(
        "ignore:Exception ignored in. <function Connection:pytest.PytestUnraisableExceptionWarning"
    ),
    pytest.mark.filterwarnings(
        "ignore:Exception ignored in. <function ServerCursorMixin:pytest.PytestUnraisableExceptionWarning"
    ),
]


@pytest.fixture
async def proxy(db):
    """Between the engines and the server; account 1 is there."""
    await db.run("INSERT INTO account (id, balance) VALUES (1, 10)")
    with Proxy("127.0.0.1", db.port) as proxy:
        yield proxy
        proxy.forward_all()
        await db.dispose()
    gc.collect()


async def warm(db, proxy, size=2):
    """Return a manager whose pool has connections that are dead by now."""
    engine = db.engine(port=proxy.port, pool_size=size, max_overflow=0, pool_timeout=2)
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(size):
            connection = await stack.enter_async_context(engine.connect())
            await connection.execute(text("SELECT 1"))
    proxy.cut()
    return UnitOfWorkManager(engine)


async def by_key():
    """Return the balance of account 1; the others do so by other roads."""
    return (await current_session().get_one(Account, 1)).balance


async def by_select():
    """Read by a query."""
    return (await current_session().scalars(select(Account))).one().balance


async def as_stream():
    """Read over a cursor of the server."""
    accounts = await current_session().stream_scalars(select(Account))
    return (await accounts.one()).balance


async def as_text():
    """Read past the ORM."""
    return await current_session().scalar(text("SELECT balance FROM account"))


async def in_run_sync():
    """Read in code that knows only a plain session."""
    return await current_session().run_sync(lambda session: session.scalar(select(Account.balance)))


@pytest.mark.parametrize("read", [by_key, by_select, as_stream, as_text, in_run_sync])
async def test_a_dead_pool(db, proxy, read, caplog):
    """All connections of the pool are dead: whoever reads does not notice, however the first statement is sent."""
    caplog.set_level(logging.INFO, "sqla_uow")
    manager = await warm(db, proxy)
    async with manager.scope():
        assert await read() == 10
        assert await read() == 10
    assert manager.engine.pool.checkedout() == 0
    told = [record.getMessage() for record in caplog.records if record.name == "sqla_uow"]
    assert len(told) <= 1
    assert all(message.startswith("the read session of this scope met a dead connection (") for message in told)


async def test_after_a_function(db, proxy):
    """The next read session of the scope may begin again as well."""

    @transactional
    async def work():
        await current_session().scalar(text("SELECT 1"))

    manager = UnitOfWorkManager(db.engine(port=proxy.port, pool_size=1, max_overflow=0))
    async with manager.scope():
        assert await by_key() == 10
        await work()
        proxy.cut()
        assert await by_key() == 10


async def test_what_has_been_read_is_never_read_twice(db, proxy):
    """Once there was an answer, a lost connection is an error: what was read and what would be read do not go together."""
    manager = UnitOfWorkManager(db.engine(port=proxy.port, pool_size=1, max_overflow=0))
    async with manager.scope() as scope:
        assert await current_session().scalar(text("SELECT balance FROM account")) == 10
        proxy.cut()
        with pytest.raises((DBAPIError, OSError)) as caught:
            await as_text()
        conflict = scope.conflict_behind(caught.value)
        assert conflict.reason == "lost connection"
        assert scope.conflict_behind(ValueError("of somebody else")) is None
    assert scope.conflict_behind(caught.value).reason == "lost connection"
    assert manager.engine.pool.checkedout() == 0
    async with manager.scope():
        assert await by_key() == 10


async def test_a_server_that_is_away(db, proxy):
    """It begins again once, and then tells what is the case."""
    manager = await warm(db, proxy)
    proxy.refuse()
    async with manager.scope() as scope:
        with pytest.raises((DBAPIError, OSError)) as caught:
            await by_key()
        conflict = scope.conflict_behind(caught.value)
        assert isinstance(conflict, ConflictError)
        assert conflict.reason in ("not started", "lost connection")
        assert conflict.__cause__ is caught.value
    assert manager.engine.pool.checkedout() == 0


@pytest.mark.parametrize("cuts", [1, 3])
async def test_a_statement_whose_connection_is_lost(db, proxy, cuts):
    """It is sent twice at most, so one that brings down its server does so no more often."""
    manager = UnitOfWorkManager(db.engine(port=proxy.port, pool_size=1, max_overflow=0, pool_timeout=2))
    lost = [proxy.on_client_bytes(b"FROM account", "cut") for _ in range(cuts)]
    async with manager.scope():
        if cuts == 1:
            assert await by_key() == 10
        else:
            with pytest.raises((DBAPIError, OSError)):
                await by_key()
    assert [trigger.fired for trigger in lost] == [True, True, False][:cuts]
    assert manager.engine.pool.checkedout() == 0
