"""The first statement of a transaction, which tells it its settings: what it costs, and what is left when it is cut off."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal

import pytest
from sqlalchemy import event, select, text
from sqlalchemy.exc import DBAPIError

from sqla_uow import UnitOfWorkManager, current_session, transactional
from sqla_uow.errors import ConflictError, TransactionTimeoutError
from sqla_uow.testing import assert_no_leaks, cancel_at, rolled_back
from tests.kit.databases import POOLED
from tests.kit.tenants import PARCELS, ROLE, SEND, TOLD, USER, Parcel, tenant
from tests.kit.waiting import until
from tests.servers import Proxy

pytestmark = pytest.mark.drivers("asyncpg", "psycopg")

PID = text("SELECT pg_backend_pid()")


@pytest.mark.direct("a pooler has round trips of its own")
async def test_round_trips(db, engine, of_a):
    """None more where a `timeout` sends its limits anyway, one where nothing else is sent; with a role as without."""
    with Proxy("127.0.0.1", db.port) as proxy:
        behind = db.engine(url=engine.url.set(port=proxy.port), pool_size=1)
        plain = UnitOfWorkManager(behind)
        told = UnitOfWorkManager(behind, settings={"app.tenant": tenant.get, "app.user": "u"}, role=ROLE)

        async def cost(manager, **options):
            for _ in range(8):  # psycopg prepares a statement when it comes for the sixth time
                proxy.reset_counts()
                async with manager.begin(**options) as unit:
                    await unit.session.execute(PARCELS)
            return proxy.round_trips

        assert await cost(told) == await cost(plain) + 1
        for options in ({"timeout": 5}, {"timeout": 5, "isolation": "SERIALIZABLE"}, {"timeout": 5, "read_only": True}):
            assert await cost(told, **options) == await cost(plain, **options)
        proxy.reset_counts()
        async with told.begin(timeout=5):
            pass
        assert proxy.round_trips == 0  # a unit without SQL costs nothing
        await behind.dispose()


# -- cut off


async def write(manager):
    """Write as whoever the tenant is."""
    async with manager.begin(timeout=20) as unit:
        await unit.session.execute(SEND, {"tenant": tenant.get(), "body": "new"})


@pytest.mark.parametrize("isolation", [None, "SERIALIZABLE"])
async def test_cancelled_at_each_await(manager, engine, isolation, of_a):
    """Whatever is cut off: the next user of the pool has his own tenant, and nothing is left of the one before."""
    nth, cancelled = 1, True
    while cancelled:
        tenant.set("a")
        await write(manager)  # the pool is warm

        async def work():
            async with manager.begin(isolation=isolation) as unit:
                assert await unit.session.scalar(TOLD) == "a"

        with assert_no_leaks(manager):
            cancelled = await cancel_at(nth, work())
            await until(lambda: engine.pool.checkedout() == 0)
        nth += 1
        async with engine.connect() as connection:
            assert await connection.scalar(TOLD) in (None, "")
        tenant.set("b")
        async with manager.begin() as unit:
            assert (await unit.session.execute(select(Parcel.tenant).distinct())).all() == [("b",)]
    assert nth > 4


async def warm_pid(manager):
    """Return the server's process of the pool's connection."""
    async with manager.begin() as unit:
        return await unit.session.scalar(PID)


@contextlib.contextmanager
def before_telling(engine, act):
    """Do something once, just before the settings are sent."""
    left = [act]

    def before(connection, cursor, statement, *rest):
        if "set_config" in statement and left:
            left.pop()()

    event.listen(engine.sync_engine, "before_cursor_execute", before)
    try:
        yield
    finally:
        event.remove(engine.sync_engine, "before_cursor_execute", before)


async def test_killed_before_it_arrives(manager, engine, db, of_a):
    """A read session begins anew, a unit is retried, with its settings; without retries it is a `ConflictError`."""
    runs = []

    @transactional(using=manager, retries=1)
    async def work():
        runs.append((await current_session(manager).execute(PARCELS)).all())

    async def kill():
        pid = await warm_pid(manager)
        await db.rows(f"SELECT pg_terminate_backend({pid}, 10000)")

    await kill()
    await work()
    assert runs == [[("a", "of a")]]
    await kill()
    async with manager.scope():
        assert (await current_session(manager).execute(PARCELS)).all() == [("a", "of a")]
    await kill()
    with pytest.raises(ConflictError):
        async with manager.begin() as unit:
            await unit.session.execute(PARCELS)
    assert await warm_pid(manager) > 0
    assert engine.pool.checkedout() == 0


@pytest.mark.skipif(POOLED, reason="the process is the pooler's")
@pytest.mark.parametrize("how", ["timeout", "cancelled"])
async def test_stopped_in_the_middle(manager, engine, db, how, of_a):
    """SIGSTOP under the first statement: its connection is given up, and the pool's next one has another tenant only."""
    pid = await warm_pid(manager)
    tenant.set("a")
    limits = {"timeout": 0.5} if how == "timeout" else {}
    error = TransactionTimeoutError if how == "timeout" else TimeoutError
    try:
        with before_telling(engine, lambda: os.kill(pid, signal.SIGSTOP)), pytest.raises(error):
            async with asyncio.timeout(None if how == "timeout" else 0.5), manager.begin(**limits) as unit:
                await unit.session.execute(SEND, {"tenant": "a", "body": "never"})
        tenant.set("b")
        async with manager.begin() as unit:
            assert await unit.session.scalar(PID) != pid
            assert (await unit.session.execute(PARCELS)).all() == [("b", "of b")]
    finally:
        os.kill(pid, signal.SIGCONT)
    async with engine.connect() as connection:
        assert await connection.scalar(TOLD) in (None, "")
    assert await db.rows("SELECT body FROM parcel WHERE body = 'never'") == []
    assert engine.pool.checkedout() == 0


async def test_refused_by_the_server(manager, engine, of_a):
    """A first statement that fails leaves nothing, and no statement of the body runs."""
    ran = []
    with pytest.raises(DBAPIError):
        async with manager.begin(role="nobody") as unit:
            await unit.session.execute(PARCELS)
            ran.append(1)
    async with manager.begin() as unit:
        assert (await unit.session.execute(PARCELS)).all() == [("a", "of a")]
    assert (ran, engine.pool.checkedout()) == ([], 0)


# -- the testing kit


@pytest.mark.direct("the role of the login is the pooler's")
async def test_rolled_back(db, engine, of_a):
    """Each unit has its own in the outer transaction, and leaves nothing to the next; so have read sessions."""
    login = db.engine(pool_size=1, max_overflow=0)
    manager = UnitOfWorkManager(login, settings={"app.tenant": tenant.get, "app.user": "u"})
    async with rolled_back(manager) as inside:
        for whose in ("a", "b"):
            tenant.set(whose)
            async with inside.begin(role=ROLE, timeout=5) as unit:
                await unit.session.execute(SEND, {"tenant": whose, "body": "new"})
                assert {row.tenant for row in await unit.session.execute(PARCELS)} == {whose}
            async with inside.begin() as unit:
                assert await unit.session.scalar(USER) == "postgres"
            async with inside.engine.connect() as connection:
                assert await connection.scalar(TOLD) == ""
            with inside.activate():
                async with inside.scope(role=ROLE):
                    assert {row.tenant for row in await current_session().execute(PARCELS)} == {whose}
    assert await db.scalar("SELECT count(*) FROM parcel") == 2
