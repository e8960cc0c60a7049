"""P5: SQLite is really serializable, and its writers queue."""

from __future__ import annotations

import asyncio
import contextvars
import random
import sqlite3
import sys
import time

import pytest
from sqlalchemy import event, text
from sqlalchemy.exc import IntegrityError, OperationalError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.pool import StaticPool
from sqlalchemy.util import await_only

from sqla_uow import Status, UnitOfWorkManager, current_session, errors, transactional
from sqla_uow._databases.writer_queue import WriterQueue
from sqla_uow.testing import assert_no_leaks
from tests.kit.models import Base
from tests.kit.slow import SLOW, sent
from tests.kit.statements import statements
from tests.kit.waiting import until

pytestmark = pytest.mark.drivers("sqlite")

ADD = text("INSERT INTO account (id, balance) VALUES (:id, 0)")
READ = text("SELECT balance FROM account WHERE id = 1")
WRITE = text("UPDATE account SET balance = :balance WHERE id = 1")


@pytest.fixture(params=["wal", "journal", "memory"])
async def engine(request, db):
    """An engine on a file in each journal mode, and on the one connection of an in-memory database."""
    if request.param != "memory":
        engine = db.engine(wal=request.param == "wal")
        async with engine.connect() as connection:
            mode = "wal" if request.param == "wal" else "delete"
            assert await connection.scalar(text(f"PRAGMA journal_mode={mode}")) == mode
    else:
        engine = create_async_engine("sqlite+aiosqlite://")
        assert isinstance(engine.pool, StaticPool)
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
    async with engine.begin() as connection:
        await connection.execute(text("INSERT INTO account (id, balance) VALUES (1, 0)"))
    yield engine
    await engine.dispose()


async def balance(engine):
    """Return what is committed."""
    async with engine.connect() as connection:
        return await connection.scalar(READ)


async def increment(session):
    """Read, let the others in, and write: what loses updates wherever it can."""
    value = await session.scalar(READ)
    await asyncio.sleep(0)
    await session.execute(WRITE, {"balance": value + 1})


def tries(path):
    """Return another connection to the file, as another process would have it."""
    return sqlite3.connect(path, timeout=0, isolation_level=None)


def path_of(db):
    """Return the database's file."""
    return db.url.partition(":///")[2]


# -- serializable


async def test_forty_increments_of_four_tasks_are_forty(engine):
    """P5, T25, T26: none is lost and no SQLITE_BUSY is seen, in a file of either journal mode and in memory."""
    manager = UnitOfWorkManager(engine)
    attempts = []

    @transactional(using=manager)
    async def once():
        attempts.append(1)
        await increment(current_session(manager))

    async def worker():
        for _ in range(10):
            await once()

    await asyncio.gather(*(worker() for _ in range(4)))
    assert await balance(engine) == 40
    assert len(attempts) == 40


async def test_as_sqlalchemy_ships_it_updates_are_lost(db):
    """The control of the test above: the same increments, without an error, without the library."""
    await db.run("INSERT INTO account (id, balance) VALUES (1, 0)")
    engine = db.engine()

    async def worker():
        for _ in range(10):
            async with AsyncSession(engine) as session, session.begin():
                await increment(session)

    await asyncio.gather(*(worker() for _ in range(4)))
    assert await balance(engine) < 40


PROCESS = """
import asyncio, sys
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine
from sqla_uow import UnitOfWorkManager, current_session, transactional

@transactional
async def once():
    value = await current_session().scalar(text(sys.argv[2]))
    await asyncio.sleep(0.001)
    await current_session().execute(text(sys.argv[3]), {"balance": value + 1})

async def main():
    engine = create_async_engine(sys.argv[1])
    async with engine.connect():
        print("ready", flush=True)
        input()
    with UnitOfWorkManager(engine).activate():
        for _ in range(20):
            await once()
    await engine.dispose()

asyncio.run(main())
"""


async def test_several_processes_lose_nothing(db):
    """P5: where no queue of ours can reach, SQLite's own lock does it, without a single retry."""
    await db.run("INSERT INTO account (id, balance) VALUES (1, 0)")
    pipe = asyncio.subprocess.PIPE
    start = [sys.executable, "-c", PROCESS, db.url, READ.text, WRITE.text]
    processes = [await asyncio.create_subprocess_exec(*start, stdin=pipe, stdout=pipe, stderr=pipe) for _ in range(3)]
    assert await asyncio.gather(*(process.stdout.readline() for process in processes)) == [b"ready\n"] * 3
    ends = await asyncio.gather(*(process.communicate(b"\n") for process in processes))
    assert [(process.returncode, end[1]) for process, end in zip(processes, ends, strict=True)] == [(0, b"")] * 3
    assert await db.scalar("SELECT balance FROM account") == 60


async def test_a_released_savepoint_is_not_durable(engine):
    """P5: RELEASE of the outermost savepoint commits, unless a BEGIN was sent before."""
    manager = UnitOfWorkManager(engine)
    with pytest.raises(KeyError):
        async with manager.begin() as unit:
            async with manager.begin(propagation="nested"):
                await unit.session.execute(WRITE, {"balance": 5})
            async with unit.session.begin_nested():
                await unit.session.execute(ADD, {"id": 2})
            raise KeyError
    assert await balance(engine) == 0


async def test_the_users_own_begin_recipe_is_respected(db):
    """P5, S8: where a BEGIN was sent already, no second one is."""
    engine = db.engine()
    event.listen(engine.sync_engine, "connect", lambda raw, _: setattr(raw, "isolation_level", None))
    event.listen(engine.sync_engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
    begins = statements(engine, lambda one: "BEGIN" in one)
    async with UnitOfWorkManager(engine).begin() as unit:
        await unit.session.execute(ADD, {"id": 1})
    assert begins == ["BEGIN IMMEDIATE"]
    assert await db.rows("SELECT id FROM account") == [(1,)]


# -- readers


async def test_a_reader_blocks_no_writer_in_wal(db):
    """P5: it takes no turn, sees one state as long as it lasts, and the next one sees the write."""
    manager = UnitOfWorkManager(db.engine())
    await db.run("INSERT INTO account (id, balance) VALUES (1, 0)")
    async with manager.begin(read_only=True) as reader:
        assert await reader.session.scalar(READ) == 0
        async with manager.begin(propagation="requires_new") as writer:
            await writer.session.execute(WRITE, {"balance": 7})
        assert writer.status is Status.COMMITTED
        assert await reader.session.scalar(READ) == 0
    async with manager.begin(read_only=True) as reader:
        assert await reader.session.scalar(READ) == 7


@pytest.mark.parametrize("read_only", [False, True])
async def test_the_settings_of_a_unit_do_not_outlive_it(db, read_only):
    """R6, P6: busy_timeout and query_only are as they were, after success, error and cancellation."""
    engine = db.engine(pool_size=1, max_overflow=0, connect_args={"timeout": 1.234})
    manager = UnitOfWorkManager(engine)
    pragmas = [text("PRAGMA busy_timeout"), text("PRAGMA query_only")]
    for end in (None, KeyError, asyncio.CancelledError):
        try:
            async with manager.begin(read_only=read_only, timeout=30) as unit:
                told = [await unit.session.scalar(pragma) for pragma in pragmas]
                if end is not None:
                    raise end
        except (KeyError, asyncio.CancelledError) as error:
            assert type(error) is end  # noqa: PT017  # of several ends each is its own
        assert 25_000 < told[0] <= 30_000
        assert told[1] == read_only
        async with engine.connect() as connection:
            assert [await connection.scalar(pragma) for pragma in pragmas] == [1234, 0]


async def test_a_lock_of_another_process_is_waited_for_within_the_deadline(db):
    """R6: longer than the driver's own timeout would, and no longer than the deadline."""
    engine = db.engine(connect_args={"timeout": 0})
    manager = UnitOfWorkManager(engine)
    async with manager.begin() as unit:
        await unit.session.execute(ADD, {"id": 0})
    other = tries(path_of(db))
    other.execute("BEGIN IMMEDIATE")

    async def write(key, seconds):
        async with manager.begin(timeout=seconds) as unit:
            await unit.session.execute(ADD, {"id": key})

    started = time.monotonic()
    with pytest.raises((errors.TransactionTimeoutError, errors.ConflictError)):
        await write(1, 0.3)
    assert 0.2 < time.monotonic() - started < 5
    waiter = asyncio.create_task(write(2, 30))
    await asyncio.sleep(0.05)
    assert not waiter.done()
    other.execute("COMMIT")
    await waiter
    other.close()
    assert await db.rows("SELECT id FROM account") == [(0,), (2,)]


async def test_requires_new_cannot_wait_for_the_lock_of_its_own_task(db):
    """P3: it fails at once, with the remedies, and the outer unit goes on."""
    manager = UnitOfWorkManager(db.engine())
    async with manager.begin() as outer:
        await outer.session.execute(ADD, {"id": 1})
        started = time.monotonic()
        with pytest.raises(errors.PropagationError) as caught:
            async with manager.begin(propagation="requires_new") as inner:
                await inner.session.execute(ADD, {"id": 2})
        assert time.monotonic() - started < 3
        async with manager.begin(propagation="requires_new", read_only=True) as reader:
            assert await reader.session.scalar(text("SELECT count(*) FROM account")) == 0
    assert str(caught.value) == (
        "begin() would wait for ever for this SQLite database's only write lock, which begin() around it holds; "
        "join the outer unit, end it first, or make the inner one read_only=True"
    )
    assert await db.rows("SELECT id FROM account") == [(1,)]


async def test_requires_new_cannot_wait_for_the_only_connection_of_its_own_task():
    """P3: in memory a reader has to wait too, so read_only is no remedy there."""
    engine = create_async_engine("sqlite+aiosqlite://")
    manager = UnitOfWorkManager(engine)
    async with manager.begin(read_only=True) as outer:
        await outer.session.scalar(text("SELECT 1"))
        with pytest.raises(errors.PropagationError) as caught:
            async with manager.begin(propagation="requires_new", read_only=True) as inner:
                await inner.session.scalar(text("SELECT 1"))
    await engine.dispose()
    assert str(caught.value) == (
        "begin() would wait for ever for this in-memory SQLite database's only connection, which begin() around it "
        "holds; join the outer unit, or end it first"
    )


# -- turns


class Queue:
    """Writers that say when they are in, and stay until they are let go."""

    def __init__(self, db, **options):
        self.engine = db.engine(**options)
        self.manager = UnitOfWorkManager(self.engine)
        self.order = []

    @property
    def turns(self):
        return self.manager._setup.database.writer_queue()

    async def writer(self, key, leave=None, seconds=None):
        async with self.manager.begin(timeout=seconds) as unit:
            await unit.session.execute(ADD, {"id": key})
            self.order.append(key)
            if leave is not None:
                await leave.wait()

    async def holder(self):
        """Start a writer, wait until it is in, and return it with the event that ends it."""
        leave = asyncio.Event()
        task = asyncio.create_task(self.writer(0, leave))
        await until(lambda: self.order == [0])
        return task, leave

    async def waiting(self, count):
        """Wait until so many writers stand in line."""
        await until(lambda: len(self.turns._lines.here().lock._waiters or ()) == count)


async def test_writers_are_let_in_first_come_first_served(db):
    """P5: in the order in which they asked, whoever asks again stands behind."""
    queue = Queue(db)
    holder, leave = await queue.holder()
    writers = []
    for key in range(1, 9):
        writers.append(asyncio.create_task(queue.writer(key)))
        await queue.waiting(key)
    leave.set()
    await holder
    writers.append(asyncio.create_task(queue.writer(9)))
    await asyncio.gather(*writers)
    assert queue.order == list(range(10))


async def test_a_cancelled_waiter_leaves_the_line(db, monkeypatch):
    """P5: before its turn, and in the very moment at which it gets it."""
    queue = Queue(db)
    holder, leave = await queue.holder()
    early, late, last = (asyncio.create_task(queue.writer(key)) for key in (1, 2, 3))
    await queue.waiting(3)
    early.cancel()
    await queue.waiting(2)
    give_back = WriterQueue.give_back

    def give_back_and_cancel(turns, unit):
        give_back(turns, unit)
        late.cancel()

    monkeypatch.setattr(WriterQueue, "give_back", give_back_and_cancel)
    leave.set()
    await holder
    await last
    assert (early.cancelled(), late.cancelled()) == (True, True)
    assert queue.order == [0, 3]
    assert not queue.turns.is_taken()


async def test_a_waiters_deadline_counts_in_the_line(db):
    """R6: it gets its error in time, holds no connection meanwhile, and whoever stands behind it gets in."""
    queue = Queue(db)
    holder, leave = await queue.holder()
    hurried = asyncio.create_task(queue.writer(1, seconds=0.2))
    patient = asyncio.create_task(queue.writer(2))
    await queue.waiting(2)
    assert queue.engine.pool.checkedout() == 1
    with pytest.raises(errors.TransactionTimeoutError):
        await asyncio.wait_for(hurried, 5)
    leave.set()
    await asyncio.gather(holder, patient)
    assert queue.order == [0, 2]


async def test_a_turn_that_does_not_come_is_not_waited_for_for_ever(db, monkeypatch):
    """P5: without a deadline there is a bound all the same; nothing was started, so it may be tried again."""
    monkeypatch.setattr("sqla_uow._databases.writer_queue.TURN_SECONDS", 0.1)
    queue = Queue(db)
    holder, leave = await queue.holder()
    with pytest.raises(errors.ConflictError) as caught:
        await asyncio.wait_for(asyncio.create_task(queue.writer(1)), 5)
    leave.set()
    await holder
    assert caught.value.reason == "not started"
    assert str(caught.value.__cause__) == (
        "begin() waited 0.1 s for its turn to write to SQLite; shorten the units before it"
    )
    assert queue.order == [0]


@pytest.mark.parametrize("trouble", ["busy", "connect", "pool", "body", "statement", "cancel"])
async def test_a_turn_is_never_lost(db, trouble):
    """P5: whatever a writer fails of, the next one gets in."""
    queue = Queue(db, connect_args={"timeout": 0}, pool_size=1, max_overflow=0, pool_timeout=0.05)
    other = tries(path_of(db))
    handed_over = sent(queue.engine, SLOW["sqlite"])

    async def fail():
        if trouble == "busy":
            other.execute("BEGIN IMMEDIATE")
        if trouble == "connect":
            event.listen(queue.engine.sync_engine, "do_connect", _refuse, once=True)
        blocker = await queue.engine.connect() if trouble == "pool" else None
        try:
            async with queue.manager.begin() as unit:
                if trouble == "cancel":
                    task = asyncio.current_task()
                    asyncio.create_task(handed_over.wait()).add_done_callback(lambda _: task.cancel())
                    await unit.session.execute(text(SLOW["sqlite"]))
                await unit.session.execute(text("nonsense") if trouble == "statement" else ADD, {"id": 1})
                raise KeyError
        finally:
            if blocker is not None:
                await blocker.close()

    with pytest.raises((Exception, asyncio.CancelledError)):
        await fail()
    if trouble == "busy":
        other.execute("ROLLBACK")
    assert not queue.turns.is_taken()
    await asyncio.wait_for(queue.writer(2), 5)
    assert await db.rows("SELECT id FROM account") == [(2,)]
    other.close()


def _refuse(*_args):
    raise sqlite3.OperationalError("unable to open database file")


async def test_a_unit_that_failed_to_connect_does_not_wait_for_itself(db):
    """P5: it has the turn already when its body tries again, which it may behind a nested call."""
    queue = Queue(db)
    event.listen(queue.engine.sync_engine, "do_connect", _refuse, once=True)

    async def stubborn():
        async with queue.manager.begin() as unit:
            with pytest.raises(OperationalError):
                async with queue.manager.begin(propagation="nested"):
                    await unit.session.execute(ADD, {"id": 1})
            await unit.session.execute(ADD, {"id": 2})

    await asyncio.wait_for(stubborn(), 5)
    await asyncio.wait_for(queue.writer(3), 5)
    assert await db.rows("SELECT id FROM account ORDER BY id") == [(2,), (3,)]


async def test_writers_cancelled_anywhere_leave_the_line_in_order(db):
    """P5: thirty writers, half of them cancelled at a moment drawn by lot; the rest are all in, and nobody is stuck."""
    queue = Queue(db)
    async with queue.manager.begin() as unit:  # switches to WAL, for which a connection needs the database alone
        await unit.session.execute(READ)
    draw = random.Random(5)  # a lot that is the same in each run
    writers = [asyncio.create_task(queue.writer(key)) for key in range(30)]
    doomed = draw.sample(writers, 15)
    for task in doomed:
        for _ in range(draw.randrange(30)):
            await asyncio.sleep(0)
        task.cancel()
    await asyncio.wait_for(asyncio.gather(*writers, return_exceptions=True), 20)
    through = [key for key, task in enumerate(writers) if not task.cancelled()]
    assert len(through) >= 15
    committed = [key for (key,) in await db.rows("SELECT id FROM account ORDER BY id")]
    assert set(through) <= set(committed) <= set(queue.order)
    assert queue.order == sorted(queue.order)
    assert not queue.turns.is_taken()
    assert queue.engine.pool.checkedout() == 0


@pytest.mark.parametrize("engine", ["memory"], indirect=True)
async def test_an_engine_may_go_from_one_loop_to_the_next(engine):
    """P5: a turn that a closed loop took with it blocks nobody in the next one."""
    manager = UnitOfWorkManager(engine)
    turns = manager._setup.database.writer_queue()
    await asyncio.to_thread(asyncio.run, asyncio.wait_for(turns.take(object(), ()), 5))
    await asyncio.wait_for(turns.take(object(), ()), 2)
    assert turns.is_taken()


@pytest.mark.parametrize("engine", ["memory"], indirect=True)
async def test_a_memory_database_has_one_user_at_a_time(engine):
    """P5: units of several tasks share a connection in memory, and never a transaction."""
    manager = UnitOfWorkManager(engine)
    seen = []

    async def reader():
        async with manager.begin(read_only=True) as unit:
            seen.append(await unit.session.scalar(READ))

    async with manager.begin() as writer:
        await writer.session.execute(WRITE, {"balance": 9})
        task = asyncio.create_task(reader(), context=contextvars.Context())
        await until(lambda: manager._setup.database.writer_queue()._lines.here().lock._waiters)
        assert seen == []
    await task
    assert seen == [9]


async def test_a_refused_commit_is_rolled_back(db):
    """D3: SQLite keeps a transaction open whose COMMIT it refuses, and not every pool rolls back what it gets."""
    engine = await _engine_that_refuses(db, pool_reset_on_return=None)
    manager = UnitOfWorkManager(engine)
    with assert_no_leaks(engine), pytest.raises(IntegrityError, match="FOREIGN KEY"):
        async with manager.begin() as unit:
            await unit.session.execute(text("INSERT INTO child VALUES (99)"))
    assert unit.status is Status.ROLLED_BACK
    async with engine.connect() as connection:  # the same one
        await connection.execute(ADD, {"id": 7})
        await connection.commit()
    assert (await db.rows("SELECT id FROM account"), await db.rows("SELECT * FROM child")) == ([(7,)], [])


async def test_a_refused_commit_whose_rollback_hangs(db, monkeypatch, caplog):
    """D3: its connection is discarded, and the pool is whole."""
    monkeypatch.setattr("sqla_uow._unit.rollback.ROLLBACK_SECONDS", 0.1)
    engine = await _engine_that_refuses(db, pool_timeout=1)
    manager, hangs = UnitOfWorkManager(engine), asyncio.Event()
    with pytest.raises(IntegrityError, match="FOREIGN KEY"):
        async with manager.begin() as unit:
            await unit.session.execute(text("INSERT INTO child VALUES (99)"))
            # replaced, because a file does not make SQLite's own ROLLBACK wait
            monkeypatch.setattr(engine.dialect, "do_rollback", lambda _connection: await_only(hangs.wait()))
    monkeypatch.undo()
    assert "its connection is discarded" in caplog.text
    assert engine.pool.checkedout() == 0
    async with manager.begin() as unit:
        assert await unit.session.scalar(text("SELECT count(*) FROM child")) == 0


async def _engine_that_refuses(db, **pool):
    """Return an engine on one connection: a `child` without its account is refused at COMMIT."""
    engine = db.engine(pool_size=1, max_overflow=0, **pool)
    event.listen(engine.sync_engine, "connect", _check_foreign_keys)
    await db.run("CREATE TABLE child (parent int REFERENCES account (id) DEFERRABLE INITIALLY DEFERRED)")
    return engine


def _check_foreign_keys(dbapi_connection, _record):
    dbapi_connection.cursor().execute("PRAGMA foreign_keys=ON")


async def test_who_uses_no_unit_may_detach_a_connection(db, caplog):
    """S8: our listener on the pool has no part in it; the connection is closed."""
    engine = db.engine()
    manager = UnitOfWorkManager(engine)
    async with manager.begin(read_only=True, timeout=5) as unit:
        await unit.session.execute(READ)
    async with engine.connect() as connection:
        await connection.execute(READ)
        raw = await connection.get_raw_connection()
        driver_connection = raw.driver_connection
        raw.detach()
    assert "Exception during reset" not in caplog.text
    with pytest.raises(ValueError, match=r"closed|no active connection"):
        await driver_connection.execute("SELECT 1")
