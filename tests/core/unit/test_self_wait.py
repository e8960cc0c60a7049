"""S11: a task that waits for itself gets an error that names both units, within a bounded wait; who waits for others waits."""

from __future__ import annotations

import asyncio
import gc
import time
import weakref

import pytest
from sqlalchemy import event, text
from sqlalchemy.exc import DBAPIError

from sqla_uow import Status, UnitOfWorkManager, current_session, errors, transactional

pytestmark = pytest.mark.drivers("asyncpg", "psycopg", "asyncmy", "aiomysql")
ADD = text("INSERT INTO account (id, balance) VALUES (:id, 0)")
WRITE = text("UPDATE account SET balance = balance + 1 WHERE id = :id")
LOCK = text("SELECT * FROM account WHERE id = 1 FOR UPDATE")


@pytest.fixture
async def manager(db):
    """Over two accounts."""
    await db.run("INSERT INTO account (id, balance) VALUES (1, 0), (2, 0)")
    return UnitOfWorkManager(db.engine())


async def test_nothing_looks_after_a_unit_that_has_ended(manager):
    """And so nothing keeps it, however long the one around it goes on."""
    async with manager.begin() as outer:
        await outer.session.execute(text("SELECT 1"))
        async with manager.begin(propagation="requires_new") as inner:
            await inner.session.execute(text("SELECT 1"))
        seen = weakref.ref(inner._transaction)
        del inner
        gc.collect()
        assert seen() is None


OUTER = {
    "row": "UPDATE account SET balance = 1 WHERE id = 1",
    "read": "SELECT * FROM account WHERE id = 1 FOR UPDATE",
    "unique": "INSERT INTO uniq (id, name) VALUES (1, 'taken')",
    "table": "INSERT INTO account (id, balance) VALUES (7, 0)",
    "advisory": "SELECT pg_advisory_xact_lock(5)",
}
INNER = {
    "row": "UPDATE account SET balance = 2 WHERE id = 1",
    "read": "UPDATE account SET balance = 2 WHERE id = 1",
    "unique": "INSERT INTO uniq (id, name) VALUES (2, 'taken')",
    "table": "ALTER TABLE account ADD COLUMN more INT",
    "advisory": "SELECT pg_advisory_xact_lock(5)",
}


@pytest.mark.parametrize("what", OUTER)
@pytest.mark.parametrize("swallowed", [False, True])
async def test_an_inner_unit_that_needs_a_lock_of_its_outer_one_is_refused(db, manager, what, swallowed):
    """S11: nothing else would end it: the database sees no deadlock, and retries would not help."""
    if what == "advisory" and db.family == "mysql":
        pytest.skip("PostgreSQL's")
    runs = []

    @transactional(propagation="requires_new", retries=5)
    async def inner():
        runs.append(1)
        await current_session().execute(text(INNER[what]))

    @transactional
    async def outer():
        await current_session().execute(text(OUTER[what]))
        if swallowed:
            with pytest.raises(errors.PropagationError):
                await inner()
        else:
            await inner()

    started = time.monotonic()
    with manager.activate():
        if swallowed:
            await outer()
        else:
            with pytest.raises(
                errors.PropagationError, match=r"inner\(\) waits for a lock that outer\(\) around it holds"
            ):
                await outer()
    assert time.monotonic() - started < 8
    assert len(runs) == 1
    assert manager.engine.pool.checkedout() == 0
    async with manager.begin() as unit:
        await unit.session.execute(WRITE, {"id": 2})
    assert unit.status is Status.COMMITTED


async def test_a_strangers_lock_is_waited_for(db, manager):
    """S11: by an inner unit too, longer than it takes to find out about its own."""
    async with db.outside() as stranger, manager.begin() as outer:
        await stranger.execute(LOCK)
        await outer.session.execute(WRITE, {"id": 2})
        async with manager.begin(propagation="requires_new") as inner:
            asyncio.get_running_loop().call_later(3.5, lambda: asyncio.ensure_future(stranger.rollback()))
            await inner.session.execute(WRITE, {"id": 1})
    assert (inner.status, outer.status) == (Status.COMMITTED, Status.COMMITTED)


async def test_a_wait_for_oneself_over_a_third_party_is_seen(db, manager):
    """S11: the inner unit waits for somebody who waits for the outer one."""

    async def third():
        async with db.outside() as stranger:
            await stranger.execute(WRITE, {"id": 2})
            await stranger.execute(WRITE, {"id": 1})
            await stranger.rollback()

    started = time.monotonic()
    with pytest.raises(errors.PropagationError, match="around it holds"):
        async with manager.begin() as outer:
            await outer.session.execute(WRITE, {"id": 1})
            waiter = asyncio.create_task(third())
            await db.until_waiting()
            async with manager.begin(propagation="requires_new") as inner:
                await inner.session.execute(WRITE, {"id": 2})
    await waiter
    assert time.monotonic() - started < 8


async def test_a_slow_statement_of_an_inner_unit_is_left_alone(db, manager):
    """S11: one that computes waits for nobody."""
    slow = text("SELECT pg_sleep(3)" if db.family == "postgresql" else "SELECT sleep(3)")
    async with manager.begin() as outer:
        await outer.session.execute(WRITE, {"id": 1})
        async with manager.begin(propagation="requires_new") as inner:
            await inner.session.execute(slow)
            await inner.session.execute(WRITE, {"id": 2})
    assert (inner.status, outer.status) == (Status.COMMITTED, Status.COMMITTED)


async def test_an_inner_unit_in_a_child_task_is_given_more_time(db, manager):
    """S11: the outer unit may end without waiting for it."""
    child = None

    async def inner():
        async with manager.begin(propagation="requires_new") as unit:
            await unit.session.execute(WRITE, {"id": 1})

    async with manager.begin() as outer:
        await outer.session.execute(WRITE, {"id": 1})
        child = asyncio.create_task(inner())
        await asyncio.sleep(3)
    await child
    assert await db.scalar("SELECT balance FROM account WHERE id = 1") == 2


async def test_a_unit_alone_sends_nothing_more(db, manager):
    """S11: neither does one inside another whose statements are quick."""
    sent = []
    event.listen(manager.engine.sync_engine, "before_cursor_execute", lambda *args: sent.append(args[2]))
    async with manager.begin() as outer:
        await outer.session.execute(WRITE, {"id": 1})
        async with manager.begin(propagation="requires_new") as inner:
            await inner.session.execute(WRITE, {"id": 2})
    assert len(sent) == 2


# -- the pool


@pytest.mark.parametrize("in_children", [False, True])
async def test_a_pool_that_is_held_by_its_own_kind_is_told(db, in_children):
    """S11: not after the pool's 30 s, and not as an error of the pool; the rest get through."""
    engine = db.engine(pool_size=3, max_overflow=0)
    manager = UnitOfWorkManager(engine)

    @transactional(using=manager, propagation="requires_new")
    async def inner(key):
        await current_session(manager).execute(ADD, {"id": key})

    @transactional(using=manager)
    async def outer(key):
        await current_session(manager).execute(text("SELECT 1"))
        await asyncio.sleep(0.05)
        if in_children:
            await asyncio.gather(inner(key))
        else:
            await inner(key)

    started = time.monotonic()
    ended = await asyncio.gather(*(outer(key) for key in range(9)), return_exceptions=True)
    assert time.monotonic() - started < 12
    failed = [error for error in ended if error is not None]
    assert failed
    for error in failed:
        assert isinstance(error, errors.PropagationError)
        assert "inner() needs a connection beside that of outer() around it, but all 3 of the pool" in str(error)
    assert await db.scalar("SELECT count(*) FROM account") == 9 - len(failed)
    assert engine.pool.checkedout() == 0
    await outer(100)


async def test_an_inner_unit_waits_for_a_pool_that_others_hold(db):
    """S11: they will give it back."""
    engine = db.engine(pool_size=2, max_overflow=0)
    manager = UnitOfWorkManager(engine)
    async with manager.begin() as outer:
        await outer.session.execute(text("SELECT 1"))
        other = await engine.connect()
        asyncio.get_running_loop().call_later(2.5, lambda: asyncio.ensure_future(other.close()))
        async with manager.begin(propagation="requires_new") as inner:
            await inner.session.execute(ADD, {"id": 1})
    assert inner.status is Status.COMMITTED


@pytest.mark.drivers("asyncmy", "aiomysql")
async def test_an_account_that_may_not_look_is_told_so(db, manager, caplog):
    """S11: MariaDB tells whose lock it is to accounts with the privilege PROCESS; the wait then ends as before."""
    await db.run("CREATE OR REPLACE USER modest@'%' IDENTIFIED BY 'modest'", f"GRANT ALL ON {db.name}.* TO modest@'%'")
    url = manager.engine.url.set(username="modest", password="modest")  # noqa: S106  # of a server that lives for a test
    modest = UnitOfWorkManager(db.engine(url=url, connect_args={"init_command": "SET innodb_lock_wait_timeout=4"}))
    with pytest.raises((errors.ConflictError, DBAPIError)):
        async with modest.begin() as outer:
            await outer.session.execute(WRITE, {"id": 1})
            async with modest.begin(propagation="requires_new") as inner:
                await inner.session.execute(WRITE, {"id": 1})
    assert "did not tell whether for a lock of begin() around it" in caplog.text
