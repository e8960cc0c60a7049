"""C3: cancelled at any point, in any way, a unit's outcome is known and nothing of it is left behind."""

from __future__ import annotations

import asyncio
import gc
import sys
import threading
import time

import pytest
from sqlalchemy import event, text

from sqla_uow import Status, UnitOfWorkManager, current_unit, transactional
from sqla_uow._tasks.shield import shielded
from sqla_uow.testing import FaultPlan
from tests.kit.cancelling import WAYS, Suspensions
from tests.kit.models import Account, Note
from tests.kit.waiting import until

CAUGHT = {"asyncio.timeout", "TaskGroup", "anyio scope", "move_on_after", "fail_after", "anyio group"}
"""Ways that end the cancellation themselves: the task goes on, and no request to cancel it is left."""
LOCK_TIMEOUT = {
    "postgresql": "SET lock_timeout = '2s'",
    "mysql": "SET innodb_lock_wait_timeout = 2",
    "sqlite": "PRAGMA busy_timeout = 2000",
}


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


@pytest.fixture
async def complaints():
    """What the event loop complains of, such as a task that was destroyed while pending."""
    heard = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: heard.append(context))
    yield heard
    gc.collect()
    await asyncio.sleep(0)
    assert heard == []


@pytest.fixture
async def bank(db, complaints):
    """One account, a manager over a pool of one connection, and somebody who looks on from a connection of his own."""
    await db.run("INSERT INTO account (id, balance) VALUES (1, 0)")
    async with db.outside() as outside:
        await outside.execution_options(isolation_level="AUTOCOMMIT")
        await outside.execute(text(LOCK_TIMEOUT[db.family]))
        yield Bank(db, outside)


class Bank:
    def __init__(self, db, outside):
        # asyncpg 0.32 forgets a future when it is cancelled while it asks for TLS.
        connect_args = {"ssl": False} if db.driver == "asyncpg" else {}
        self.engine = db.engine(pool_size=1, max_overflow=0, pool_timeout=3, connect_args=connect_args)
        self.manager = UnitOfWorkManager(self.engine)
        self.balance = 0
        self.started = threading.Event()
        self.family = db.family
        self._outside = outside
        if db.family == "sqlite":
            event.listen(self.engine.sync_engine, "connect", self._define_started)

    def _define_started(self, dbapi_connection, _record):
        dbapi_connection.create_function("started", 0, lambda: self.started.set() or 1)

    async def check(self, call):
        """Assert that what the unit says is what the database says, and that nothing of it is left anywhere."""
        committed = call.unit is not None and call.unit.status is Status.COMMITTED
        self.balance += committed
        assert self.engine.pool.checkedout() == 0
        assert call.hooks == committed
        await self._outside.execute(text("UPDATE account SET balance = balance + 1"))  # no lock is left behind
        self.balance += 1
        assert await self._outside.scalar(text("SELECT balance FROM account")) == self.balance
        await until(self._is_quiet, seconds=2)

    async def long_statement(self):
        """Return when the database works on it."""

        async def works():
            return self.started.is_set() or await self._outside.scalar(text(WORKING[self.family]))

        await until(works, seconds=5)

    async def _is_quiet(self):
        states = await self._outside.execute(text(OTHERS[self.family]))
        return all(state == "idle" for (state,) in states)


OTHERS = {
    "postgresql": "SELECT state FROM pg_stat_activity WHERE datname = current_database() "
    "AND pid <> pg_backend_pid() AND backend_type = 'client backend'",
    "mysql": "SELECT coalesce(t.trx_state, if(p.command = 'Sleep', 'idle', p.command)) FROM information_schema.processlist p "
    "LEFT JOIN information_schema.innodb_trx t ON t.trx_mysql_thread_id = p.id "
    "WHERE p.db = database() AND p.id <> connection_id()",
    "sqlite": "SELECT 'idle'",
}


WORKING = {
    "postgresql": "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%pg\\_sleep(3%' AND state = 'active'",
    "mysql": "SELECT count(*) FROM information_schema.processlist WHERE info LIKE '%SELECT sleep%' AND id <> connection_id()",
    "sqlite": "SELECT 0",
}
LONG = {
    "postgresql": "SELECT pg_sleep(30)",
    "mysql": "SELECT sleep(30)",
    "sqlite": "WITH RECURSIVE n(i) AS (SELECT started() UNION ALL SELECT i + 1 FROM n WHERE i < 1e9) SELECT count(*) FROM n",
}


class AddOne:
    """A call that adds 1 to the account, and what became of it."""

    def __init__(self, manager, also=None):
        self._manager = manager
        self._also = also
        self.unit = None
        self.hooks = 0
        self.error = None

    async def __call__(self):
        try:
            await transactional(using=self._manager, retries=2)(self.add_one)()
        except BaseException as error:
            self.error = error
            raise

    async def add_one(self):
        self.unit = current_unit(self._manager)
        self.unit.after_commit(self.hook)
        account = await self.unit.session.get_one(Account, 1)
        async with self._manager.begin(propagation="nested"):
            account.balance += 1
        if self._also is not None:
            await self.unit.session.execute(text(self._also))

    async def hook(self):
        await asyncio.sleep(0)
        self.hooks += 1


async def sweep(bank, way, *, twice=False, cold=False):
    """Cancel a call at each suspension of it and of its helper tasks, in turn."""
    outcomes = set()
    for point in range(1, 200):
        await AddOne(bank.manager)()
        bank.balance += 1
        if cold:
            await bank.engine.dispose()
        points, call = Suspensions(point, *[point + 1] * twice), AddOne(bank.manager)
        with points.counted():
            task = asyncio.get_running_loop().create_task(WAYS[way](call, points))
            await asyncio.gather(task, return_exceptions=True)
        await bank.check(call)
        if not points.fired:
            return outcomes
        if isinstance(call.error, asyncio.CancelledError) and call.unit is not None:
            outcomes.add(call.unit.status)
            said = call.unit.status.value
            assert call.error.__notes__ == [f"sqla_uow: cancelled; the outcome of AddOne.add_one() is: {said}"]
        caught = way in CAUGHT
        assert task.cancelled() is (not caught and call.error is not None)
        assert task.cancelling() == (0 if caught else 1 + (twice and points.count > point))
    raise AssertionError("the call never came to its end")


EVERY_WAY = pytest.mark.parametrize("way", WAYS)


@EVERY_WAY
async def test_cancelled_anywhere(bank, way):
    """C3, T20, T21: status, row and hooks agree; no connection, transaction or lock is left; the pool of one works."""
    assert await sweep(bank, way) == {Status.ROLLED_BACK, Status.COMMITTED}


async def test_cancelled_twice(bank):
    """C3: a second cancellation changes nothing, and each request still counts."""
    assert await sweep(bank, "task", twice=True) == {Status.ROLLED_BACK, Status.COMMITTED}


async def test_cancelled_while_connecting(bank):
    """C3: the same when the pool has to make the connection first."""
    assert await sweep(bank, "task", cold=True) == {Status.ROLLED_BACK, Status.COMMITTED}


# Not on SQLite: aiosqlite 0.22 leaves a task that waits for ever when an anyio scope cuts off the close of a connection,
# and one that is still being made is SQLAlchemy's to close.
@pytest.mark.drivers("asyncpg", "psycopg", "asyncmy", "aiomysql")
async def test_cancelled_while_connecting_by_anyio(bank):
    """C3: the same under anyio, which cancels again and again."""
    assert await sweep(bank, "anyio scope", cold=True) == {Status.ROLLED_BACK, Status.COMMITTED}


@EVERY_WAY
async def test_a_cancelled_statement_is_stopped_in_the_database(bank, way):
    """C3, drivers D: the server stops working on it at once, and its locks are free."""
    points, call = Suspensions(), AddOne(bank.manager, LONG[bank.family])
    task = asyncio.create_task(WAYS[way](call, points))
    await bank.long_statement()
    began = time.monotonic()
    points.fire()
    await asyncio.gather(task, return_exceptions=True)
    assert isinstance(call.error, asyncio.CancelledError)
    assert call.unit.status is Status.ROLLED_BACK
    await bank.check(call)
    assert time.monotonic() - began < 2  # of 30 s
    await AddOne(bank.manager)()


async def test_without_anyio(db, manager, monkeypatch):
    """Nothing of it is needed: COMMIT is shielded from asyncio's cancellations all the same."""
    monkeypatch.delitem(sys.modules, "anyio", raising=False)
    with FaultPlan(manager, "cancel", at="commit"):
        task = asyncio.create_task(write_one(manager))
        with pytest.raises(asyncio.CancelledError):
            await task
    assert await notes(db) == ["one"]


@pytest.mark.drivers("sqlite")
async def test_a_shield_without_time(driver):
    """What may not wait is begun, and not waited for."""
    outcome = await shielded(asyncio.Event().wait, limit=0)
    assert outcome.stop()
