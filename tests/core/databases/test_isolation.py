"""P2, P4 and P6: the level a unit has, the level a call may ask of it, and read-only; gone at the next checkout."""

from __future__ import annotations

import asyncio
import time

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession

from sqla_uow import Status, UnitOfWorkManager, current_session, errors, transactional
from sqla_uow._databases.system import System
from tests.kit.models import Account, Note
from tests.kit.slow import RUNNING, SLOW, sent
from tests.kit.waiting import until

DEFAULTS = {"postgresql": "READ COMMITTED", "mysql": "REPEATABLE READ", "sqlite": "SERIALIZABLE"}
INNODB = (
    "SELECT trx_isolation_level, trx_is_read_only FROM information_schema.innodb_trx "
    "WHERE trx_mysql_thread_id = connection_id()"
)
ADD = text("INSERT INTO account (id, balance) VALUES (:id, 0)")


@pytest.fixture
def manager(db):
    """The manager of a fresh database."""
    return UnitOfWorkManager(db.engine())


async def notes(db):
    """Return what is committed."""
    return [note for (note,) in await db.rows("SELECT text FROM note ORDER BY id")]


async def characteristics(db, session):
    """Return (level, read-only) of the session's transaction, as the server sees it."""
    if db.family == "postgresql":
        level = await session.scalar(text("SHOW transaction_isolation"))
        return level.upper(), await session.scalar(text("SHOW transaction_read_only")) == "on"
    if db.family == "sqlite":
        return "SERIALIZABLE", await session.scalar(text("PRAGMA query_only")) == 1
    await session.execute(text("SELECT * FROM account"))  # InnoDB's transaction begins here
    await asyncio.sleep(0.11)  # InnoDB renews innodb_trx only if nobody has read it for 0.1 s
    level, read_only = (await session.execute(text(INNODB))).one()
    return level, bool(read_only)


# -- in force from the first statement, gone with the unit


async def test_the_level_is_in_force_from_the_first_statement(db):
    """P4: as the server sees it, on a warm connection that had the default before."""
    engine = db.engine(pool_size=1, max_overflow=0)
    manager = UnitOfWorkManager(engine)
    async with manager.begin() as unit:
        assert await characteristics(db, unit.session) == (DEFAULTS[db.family], False)
    async with manager.begin(isolation="SERIALIZABLE", read_only=True) as unit:
        assert await characteristics(db, unit.session) == ("SERIALIZABLE", True)
    assert (unit.isolation, unit.read_only) == ("SERIALIZABLE", True)


@pytest.mark.drivers("asyncpg", "psycopg", "asyncmy", "aiomysql")
async def test_the_calls_level_wins_over_the_managers(db):
    """P4: a weaker level too; the manager's is for calls that do not say."""
    manager = UnitOfWorkManager(db.engine(), isolation="SERIALIZABLE")
    async with manager.begin(isolation="READ COMMITTED") as unit:
        assert await characteristics(db, unit.session) == ("READ COMMITTED", False)
    async with manager.begin() as unit:
        assert await characteristics(db, unit.session) == ("SERIALIZABLE", False)


async def test_a_level_and_a_savepoint_go_together(db):
    """T28: the level is not applied again in SAVEPOINT, neither before nor after the first statement."""
    manager = UnitOfWorkManager(db.engine(), isolation="SERIALIZABLE")
    async with manager.begin() as unit:
        async with manager.begin(isolation="SERIALIZABLE", propagation="nested"):
            await unit.session.execute(ADD, {"id": 1})
        async with unit.session.begin_nested():
            await unit.session.execute(ADD, {"id": 2})
        assert await characteristics(db, unit.session) == ("SERIALIZABLE", False)
    assert await db.rows("SELECT id FROM account ORDER BY id") == [(1,), (2,)]


async def success(db, unit):
    """End with COMMIT."""
    await unit.session.execute(text("SELECT * FROM account"))


async def error(db, unit):
    """End with an exception of the body."""
    await unit.session.execute(text("SELECT * FROM account"))
    raise KeyError


async def refused(db, unit):
    """End with an error of the database."""
    await unit.session.execute(ADD, {"id": 1})


async def cancel_in_statement(db, unit):
    """End with a cancellation that meets the driver waiting for the server."""
    handed_over = sent(unit.session.bind, SLOW[db.family])
    canceller = asyncio.create_task(handed_over.wait())
    task = asyncio.current_task()
    canceller.add_done_callback(lambda _: task.cancel())
    await unit.session.execute(text(SLOW[db.family]))


async def cancel_between_statements(db, unit):
    """End with a cancellation while the connection is idle."""
    await unit.session.execute(text("SELECT * FROM account"))
    asyncio.current_task().cancel()
    await asyncio.sleep(0)


async def kill(db, unit):
    """End with a killed backend; SQLite has none."""
    if db.server is None:
        await error(db, unit)
    await db.kill(unit.session)
    await unit.session.execute(text("SELECT * FROM account"))


@pytest.mark.parametrize("ending", [success, error, refused, cancel_in_statement, cancel_between_statements, kill])
async def test_nothing_leaks_to_the_next_checkout(db, ending):
    """P4, P6: after any end of a SERIALIZABLE READ ONLY unit the pool's only connection is as it was."""
    engine = db.engine(pool_size=1, max_overflow=0)
    manager = UnitOfWorkManager(engine)
    try:
        async with manager.begin(isolation="SERIALIZABLE", read_only=True, timeout=60) as unit:
            await ending(db, unit)
    except (KeyError, errors.ReadOnlyError, errors.ConflictError, asyncio.CancelledError):
        assert unit.status is Status.ROLLED_BACK
    else:
        assert ending is success
    async with AsyncSession(engine) as plain, plain.begin():
        assert await characteristics(db, plain) == (DEFAULTS[db.family], False)
        await plain.execute(ADD, {"id": 2})
    assert await db.rows("SELECT id FROM account") == [(2,)]
    assert engine.pool.checkedout() == 0


@pytest.mark.drivers("asyncmy", "aiomysql")
async def test_a_level_that_no_statement_used_does_not_wait_for_the_next_transaction(db):
    """P4: MariaDB's one-shot SET TRANSACTION is sent, and then the unit ends."""
    engine = db.engine(pool_size=1, max_overflow=0)
    with pytest.raises(KeyError):
        async with UnitOfWorkManager(engine).begin(isolation="SERIALIZABLE", read_only=True) as unit:
            await unit.session.connection()
            raise KeyError
    async with AsyncSession(engine) as plain, plain.begin():
        assert await characteristics(db, plain) == ("REPEATABLE READ", False)


@pytest.mark.drivers("sqlite")
def test_a_database_that_needs_nothing_at_its_begin(driver):
    """P4: what SQLAlchemy tells it is enough; nothing is sent, so there is no connection."""
    System("oracle").open(None, None, None)


# -- levels that cannot be


@pytest.mark.drivers("sqlite", "asyncpg")
async def test_a_level_that_the_database_lacks_is_refused_where_it_is_asked(db):
    """P4: when a manager, a unit, attempts or a bound function is made; at the call where the database is not known."""
    level, offered = {
        "postgresql": ("READ UNCOMMITTED", "'READ COMMITTED' or 'REPEATABLE READ' or 'SERIALIZABLE'"),
        "sqlite": ("READ COMMITTED", "'SERIALIZABLE'"),
    }[db.family]
    engine = db.engine()
    manager = UnitOfWorkManager(engine)
    called = []

    async def work():
        called.append(1)

    late = transactional(isolation=level)(work)
    refusals = {
        "UnitOfWorkManager 'default'": lambda: UnitOfWorkManager(engine, isolation=level),
        "begin()": lambda: manager.begin(isolation=level),
        "attempts()": lambda: manager.attempts(retries=1, isolation=level),
        "work()": lambda: transactional(using=manager, isolation=level)(work),
    }
    for who, ask in refusals.items():
        with pytest.raises(ValueError, match="isolation") as caught:
            ask()
        assert (
            str(caught.value) == f"{who} asks for isolation {level!r}, which {db.family} does not have; use {offered}"
        )
    with manager.activate():
        with pytest.raises(ValueError, match=rf"^work\(\) asks for isolation {level!r}, which {db.family}"):
            await late()
        async with manager.begin():
            with pytest.raises(ValueError, match=rf"^work\(\) asks for isolation {level!r}, which {db.family}"):
                await late()
    assert not called


@pytest.mark.drivers("sqlite")
async def test_a_level_that_nobody_has_is_refused_at_decoration(db):
    """P4: the whole message."""
    with pytest.raises(ValueError, match="isolation") as caught:
        transactional(isolation="SNAPSHOT")(until)
    assert str(caught.value) == (
        "until() asks for isolation 'SNAPSHOT', which is not an SQL level; "
        "use one of READ UNCOMMITTED, READ COMMITTED, REPEATABLE READ, SERIALIZABLE"
    )


# -- joining


@pytest.mark.drivers("asyncpg", "psycopg", "asyncmy", "aiomysql")
@pytest.mark.parametrize("propagation", ["required", "nested", "mandatory"])
async def test_a_stronger_level_is_not_joined(db, propagation):
    """P2: the whole message; the same and a weaker one are joined, and requires_new gets its own."""
    manager = UnitOfWorkManager(db.engine())

    @transactional(isolation="SERIALIZABLE", propagation=propagation)
    async def careful():
        await current_session().execute(ADD, {"id": 1})

    with manager.activate():
        async with manager.begin(isolation="REPEATABLE READ") as unit:
            with pytest.raises(errors.IsolationConflictError) as caught:
                await careful()
            for level in ("REPEATABLE READ", "READ COMMITTED"):
                async with manager.begin(isolation=level) as joined:
                    assert joined is unit
            async with manager.begin(isolation="SERIALIZABLE", propagation="requires_new") as new:
                assert await characteristics(db, new.session) == ("SERIALIZABLE", False)
        async with manager.begin(isolation="SERIALIZABLE"):
            await careful()
    assert str(caught.value) == (
        "careful() needs SERIALIZABLE but joins a unit begun at REPEATABLE READ; "
        "begin the outer one at SERIALIZABLE or use propagation='requires_new'"
    )
    assert await db.rows("SELECT id FROM account") == [(1,)]


@pytest.mark.drivers("asyncpg", "psycopg", "asyncmy", "aiomysql")
async def test_a_unit_without_a_level_is_joined_by_what_the_databases_default_gives(db):
    """P2: compared with the server's own default, whatever the unit was told."""
    manager = UnitOfWorkManager(db.engine())
    default = DEFAULTS[db.family]
    async with manager.begin() as unit:
        await unit.session.execute(ADD, {"id": 1})
        async with manager.begin(isolation=default) as joined:
            assert joined is unit
        with pytest.raises(errors.IsolationConflictError) as caught:
            async with manager.begin(isolation="SERIALIZABLE"):
                pass
    assert str(caught.value) == (
        f"begin() needs SERIALIZABLE but joins a unit begun at {default}, the default of the database; "
        "begin the outer one at SERIALIZABLE or use propagation='requires_new'"
    )
    assert unit.status is Status.COMMITTED
    assert await db.rows("SELECT id FROM account") == [(1,)]


@pytest.mark.drivers("asyncpg", "psycopg", "asyncmy", "aiomysql")
async def test_the_default_is_compared_before_the_first_connection_too(db):
    """P2: it is not known yet, so the first statement raises; swallowed, no later one runs at the weaker level."""
    manager = UnitOfWorkManager(db.engine())

    @transactional(isolation="SERIALIZABLE")
    async def careful():
        await current_session().execute(ADD, {"id": 1})

    @transactional
    async def outer():
        with pytest.raises(errors.IsolationConflictError) as caught:
            await careful()
        assert str(caught.value) == (
            f"careful() needs SERIALIZABLE but joins a unit begun at {DEFAULTS[db.family]}, the default of the database; "
            "begin the outer one at SERIALIZABLE or use propagation='requires_new'"
        )
        with pytest.raises(errors.RollbackOnlyError):
            await current_session().execute(ADD, {"id": 2})

    with manager.activate(), pytest.raises(errors.RollbackOnlyError):
        await outer()
    assert await db.rows("SELECT id FROM account") == []
    assert manager.engine.pool.checkedout() == 0


@pytest.mark.drivers("asyncpg", "psycopg", "asyncmy", "aiomysql")
@pytest.mark.parametrize("levels", [("SERIALIZABLE", "READ COMMITTED"), ("READ COMMITTED", "SERIALIZABLE")])
async def test_the_strongest_of_several_is_compared(db, levels):
    """P2: calls that send nothing before the first connection, in whichever order."""
    manager = UnitOfWorkManager(db.engine())
    with pytest.raises(errors.IsolationConflictError, match="needs SERIALIZABLE but joins"):
        async with manager.begin() as unit:
            for level in levels:
                async with manager.begin(isolation=level):
                    pass
            await unit.session.execute(ADD, {"id": 1})
    assert await db.rows("SELECT id FROM account") == []


@pytest.mark.drivers("asyncpg", "psycopg", "asyncmy", "aiomysql")
async def test_the_engines_own_level_is_the_default(db):
    """P2: create_engine(isolation_level=...) and execution_options() are what a unit without a level has."""
    configured = db.engine(isolation_level="SERIALIZABLE")
    optioned = db.engine().execution_options(isolation_level="SERIALIZABLE")
    for engine in (configured, optioned):
        manager = UnitOfWorkManager(engine)
        async with manager.begin() as unit, manager.begin(isolation="SERIALIZABLE") as joined:
            assert joined is unit
            assert await characteristics(db, unit.session) == ("SERIALIZABLE", False)


@pytest.mark.drivers("asyncpg", "psycopg", "asyncmy", "aiomysql")
async def test_a_default_found_too_weak_dooms_the_unit(db):
    """P2: also when the joined call has sent nothing itself, and the owner swallows the error of its own statement."""
    manager = UnitOfWorkManager(db.engine())
    with pytest.raises(errors.RollbackOnlyError) as caught:
        async with manager.begin() as unit:
            async with manager.begin(isolation="SERIALIZABLE"):
                pass
            with pytest.raises(errors.IsolationConflictError):
                await unit.session.execute(ADD, {"id": 1})
            with pytest.raises(errors.RollbackOnlyError):
                await unit.session.execute(ADD, {"id": 2})
    assert isinstance(caught.value.__cause__, errors.IsolationConflictError)
    assert await db.rows("SELECT id FROM account") == []


@pytest.mark.drivers("sqlite")
async def test_a_function_that_needs_what_sqlite_always_gives(db, manager):
    """P2: SERIALIZABLE joins a unit that asks for nothing."""

    @transactional(using=manager, isolation="SERIALIZABLE")
    async def inner():
        current_session(manager).add(Note(text="inner"))

    async with manager.begin():
        await inner()
    assert await notes(db) == ["inner"]


async def test_what_is_asked_for_before_the_first_sql(db, manager):
    """P2: the strongest level that was asked for is compared with the database's own, once that is known."""
    if db.family == "sqlite":
        pytest.skip("SQLite has one level, known without a connection")

    @transactional(using=manager, isolation="READ COMMITTED")
    async def asks():
        pass

    async with manager.begin() as unit:
        await asks()
        await asks()
        unit.session.add(Note(text="kept"))
    assert await notes(db) == ["kept"]


# -- read-only


async def test_the_database_refuses_a_write_it_is_not_warned_of(db):
    """P6: raw SQL in a read-only unit; the whole message, and nothing written."""
    manager = UnitOfWorkManager(db.engine())
    with pytest.raises(errors.ReadOnlyError) as caught:
        async with manager.begin(read_only=True) as unit:
            await unit.session.execute(ADD, {"id": 1})
    assert str(caught.value) == (
        "a write was sent in begin(), which is read-only; drop read_only=True or keep the write out of it"
    )
    assert isinstance(caught.value.__cause__, manager.engine.dialect.loaded_dbapi.Error)
    assert unit.status is Status.ROLLED_BACK
    assert await db.rows("SELECT id FROM account") == []


async def test_the_flush_guard_names_the_object(db):
    """P6: before anything is sent; new, changed and deleted objects alike, by class and key."""
    await db.run("INSERT INTO account (id, balance) VALUES (1, 5)")
    manager = UnitOfWorkManager(db.engine())

    async def add(session):
        session.add(Account(id=2))

    async def change(session):
        (await session.get_one(Account, 1)).balance = 6

    async def delete(session):
        await session.delete(await session.get_one(Account, 1))

    for body, name in ((add, "Account(new)"), (change, "Account(1)"), (delete, "Account(1)")):
        with pytest.raises(errors.ReadOnlyError) as caught:
            async with manager.begin(read_only=True) as unit:
                await body(unit.session)
        assert str(caught.value) == (
            f"{name} was changed in begin(), which is read-only; drop read_only=True or keep the write out of it"
        )
    assert await db.rows("SELECT id, balance FROM account") == [(1, 5)]


async def test_a_swallowed_refusal_is_not_forgotten(db):
    """P6, D3: the write did not happen, so the unit does not end as if it had."""
    manager = UnitOfWorkManager(db.engine())
    with pytest.raises(errors.RollbackOnlyError) as caught:
        async with manager.begin(read_only=True) as unit:
            with pytest.raises(errors.ReadOnlyError):
                await unit.session.execute(ADD, {"id": 1})
    assert caught.value.__cause__ is not None
    assert await db.rows("SELECT id FROM account") == []


# -- the deadline, told to the server


@pytest.mark.drivers("asyncpg", "psycopg")
async def test_postgresql_is_told_the_deadline_for_this_transaction_only(db):
    """R6: both limits are what is left, and gone with the transaction."""
    engine = db.engine(pool_size=1, max_overflow=0)
    limits = text(
        "SELECT name, setting::int FROM pg_settings WHERE name IN ('statement_timeout', 'transaction_timeout')"
    )
    async with UnitOfWorkManager(engine).begin(timeout=30) as unit:
        told = dict((await unit.session.execute(limits)).all())
    assert 25_000 < told["statement_timeout"] <= 30_000
    assert 26_000 < told["transaction_timeout"] <= 31_000
    async with AsyncSession(engine) as plain:
        assert dict((await plain.execute(limits)).all()) == {"statement_timeout": 0, "transaction_timeout": 0}


@pytest.mark.drivers("asyncmy", "aiomysql")
async def test_mariadb_is_told_the_deadline_with_each_statement(db):
    """R6: what is left, in front of the statement; nothing is set that would have to be set back."""
    engine = db.engine(pool_size=1, max_overflow=0)
    limit = text("SELECT @@max_statement_time")
    async with UnitOfWorkManager(engine).begin(timeout=30) as unit:
        assert 25 < await unit.session.scalar(limit) <= 30
        note = Note(text="%s %(a)s :b")
        unit.session.add(note)
        await unit.session.flush()
        assert note.id == 1
        note.text += "!"
    async with AsyncSession(engine) as plain:
        assert await plain.scalar(limit) == 0
    assert await db.rows("SELECT id, text FROM note") == [(1, "%s %(a)s :b!")]


@pytest.mark.drivers("asyncpg", "psycopg", "asyncmy", "aiomysql")
async def test_no_query_outlives_the_deadline(db):
    """R6: the caller gets the error in time, and the server has nothing of ours left running."""
    engine = db.engine()
    started = time.monotonic()
    with pytest.raises(errors.TransactionTimeoutError):
        async with UnitOfWorkManager(engine).begin(timeout=0.3) as unit:
            await unit.session.execute(text(SLOW[db.family]))
    assert time.monotonic() - started < 5
    await until(lambda: _idle(db), seconds=3)
    assert engine.pool.checkedout() == 0


async def _idle(db):
    return await db.scalar(RUNNING[db.family]) == 0


@pytest.mark.drivers("asyncpg", "psycopg", "asyncmy", "aiomysql")
async def test_the_server_keeps_the_deadline_alone(db):
    """R6: the client is frozen once its query runs, and cannot cancel it; the server ends it all the same."""
    seen = []
    running = RUNNING[db.family].replace("current_database()", f"'{db.name}'").replace("database()", f"'{db.name}'")

    def freeze():
        until = time.monotonic() + 5
        while sum(seen) == 0 or (seen[-1] and time.monotonic() < until):
            seen.append(int(db.server.execute(running)))

    engine = db.engine()
    loop = asyncio.get_running_loop()
    freezer = loop.create_task(sent(engine, SLOW[db.family]).wait())
    freezer.add_done_callback(lambda _: loop.call_later(0.05, freeze))
    with pytest.raises((errors.TransactionTimeoutError, DBAPIError)):
        async with UnitOfWorkManager(engine).begin(timeout=1) as unit:
            await unit.session.execute(text(SLOW[db.family]))
    assert 1 in seen
    assert seen[-1] == 0


@pytest.mark.drivers("psycopg")
async def test_cancelled_while_its_level_is_set(db, monkeypatch):
    """P4, C3: psycopg awaits for that inside SQLAlchemy's `Connection()` and pool; whoever is cut off returns what was lent."""
    # It lets the loop turn there when that has not turned for a while, as under load; here always.
    monkeypatch.setattr("psycopg.waiting.MAX_BUSY_TIME", -1.0)
    engine = db.engine(pool_size=1, max_overflow=0, pool_timeout=5)
    manager = UnitOfWorkManager(engine)

    async def read():
        async with manager.begin(isolation="SERIALIZABLE", read_only=True) as unit:
            await unit.session.execute(text("SELECT 1"))

    await read()
    cut = 0
    for turns in range(1, 40):
        task = asyncio.create_task(read())
        for _ in range(turns):
            await asyncio.sleep(0)
        cut += task.cancel()
        await asyncio.wait([task])
        assert engine.pool.checkedout() == 0
    assert cut > 5
