"""Permanent by its code, transient by its cause: what was prepared before a migration, or on another session of the server."""

from __future__ import annotations

import contextlib

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from sqla_uow import RetryPolicy, UnitOfWorkManager, current_session, errors, is_retryable, transactional

pytestmark = [
    pytest.mark.drivers("asyncpg", "psycopg"),
    pytest.mark.direct("behind a pooler the settings of our guide prepare nothing"),
]
AT_ONCE = RetryPolicy(base=0, cap=0)
POOL = 4
PARAMETERS = {"key": 1, "mood": "1"}
PREPARED = 8
"""Executions, after which psycopg has prepared a statement; asyncpg does at once."""


@pytest.fixture
def engine(db):
    """Provide a pool that is filled before the migration."""
    return db.engine(pool_size=POOL, max_overflow=0, pool_timeout=5)


@pytest.fixture
def manager(engine):
    """Provide an active manager."""
    with UnitOfWorkManager(engine, retry=AT_ONCE).activate() as manager:
        yield manager


async def warm(engine, *statements):
    """Have each connection of the pool prepare these statements."""
    async with contextlib.AsyncExitStack() as stack:
        connections = [await stack.enter_async_context(engine.connect()) for _ in range(POOL)]
        for connection in connections:
            for statement in statements:
                for _ in range(PREPARED):
                    await connection.execute(text(statement), PARAMETERS)
            await connection.commit()


async def pids(engine):
    """Return which sessions of the server the pool has."""
    async with contextlib.AsyncExitStack() as stack:
        connections = [await stack.enter_async_context(engine.connect()) for _ in range(POOL)]
        return {await connection.scalar(text("SELECT pg_backend_pid()")) for connection in connections}


COLUMN = (
    ["CREATE TABLE plan (id int PRIMARY KEY, a int)", "INSERT INTO plan VALUES (1, 1), (2, 2)"],
    ["ALTER TABLE plan ADD COLUMN b int"],
    "SELECT * FROM plan WHERE id = :key",
)
COLUMN_TYPE = (COLUMN[0], ["ALTER TABLE plan ALTER COLUMN a TYPE text"], COLUMN[2])
_MADE = ["CREATE TYPE mood AS ENUM ('1')", "CREATE TABLE plan (id int, m mood)", "INSERT INTO plan VALUES (1, '1')"]
TYPE = (_MADE, ["DROP TABLE plan", "DROP TYPE mood", *_MADE], "SELECT id FROM plan WHERE m = CAST(:mood AS mood)")
ATTRIBUTE = (
    [
        "CREATE TYPE pair AS (a int, b int)",
        "CREATE TABLE plan (id int, m pair)",
        "INSERT INTO plan VALUES (1, ROW(1, 2))",
    ],
    ["ALTER TYPE pair ADD ATTRIBUTE c int"],
    "SELECT id, m FROM plan WHERE id = :key",
)
MIGRATIONS = {
    "a column is added": COLUMN,
    "a column changes its type": COLUMN_TYPE,
    "a type is made anew": TYPE,
    "a composite type has one more": ATTRIBUTE,
}


@pytest.mark.parametrize("migration", MIGRATIONS.values(), ids=list(MIGRATIONS))
async def test_a_call_after_a_migration(db, engine, manager, migration):
    """It succeeds with a single retry, whichever connection it gets; so do all calls behind it, without any."""
    before, changes, statement = migration
    await db.run(*before)
    await warm(engine, statement, "INSERT INTO note (text) VALUES ('warm')")
    await db.run("DELETE FROM note", *changes)

    @transactional(retries=1)
    async def work():
        await current_session().execute(text("INSERT INTO note (text) VALUES ('written')"))
        return (await current_session().execute(text(statement), PARAMETERS)).all()

    for _ in range(2 * POOL):
        assert len(await work()) == 1
    assert await db.scalar("SELECT count(*) FROM note") == 2 * POOL
    retries = manager.statistics().retries
    assert sum(retries.values()) <= 1
    assert {reason for reason, _ in retries} <= {"stale plan"}
    assert engine.pool.checkedout() == 0


async def test_a_deploy_costs_functions_without_retries_one_error(db, engine, manager):
    """Not one for each connection of the pool; its reason is told, and the driver's error is behind it."""
    before, changes, statement = COLUMN
    await db.run(*before)
    await warm(engine, statement)
    await db.run(*changes)

    @transactional
    async def work():
        return (await current_session().execute(text(statement), PARAMETERS)).all()

    with pytest.raises(errors.ConflictError) as caught:
        await work()
    assert (caught.value.reason, caught.value.code) == ("stale plan", "0A000")
    assert is_retryable(caught.value)
    assert isinstance(caught.value.__cause__, DBAPIError)
    assert is_retryable(caught.value.__cause__)
    for _ in range(2 * POOL):
        assert len(await work()) == 1


async def test_the_error_is_swallowed(db, engine, manager):
    """Nothing has been committed, and the next attempt succeeds: as after a conflict."""
    before, changes, statement = COLUMN
    await db.run(*before)
    await warm(engine, statement)
    await db.run(*changes)
    runs = []

    @transactional(propagation="nested")
    async def look():
        await current_session().execute(text(statement), PARAMETERS)

    @transactional(retries=1)
    async def work():
        runs.append(1)
        with contextlib.suppress(DBAPIError):
            await look()
        await current_session().execute(text("INSERT INTO note (text) VALUES ('written')"))

    await work()
    assert len(runs) == 2
    assert await db.scalar("SELECT count(*) FROM note") == 1


async def test_other_features_that_are_not_supported_stay_permanent(db, manager):
    """0A000 as such, and an internal error as such."""
    runs = []

    @transactional(retries=3)
    async def work(statement):
        runs.append(1)
        await current_session().execute(text(statement))

    with pytest.raises(DBAPIError) as caught:
        await work("CREATE TABLE both (id int) PARTITION BY LIST (id), INHERITS (note)")
    runs.clear()
    for code in ("0A000", "XX000"):
        with pytest.raises(DBAPIError) as caught:
            await work(f"DO $$ BEGIN RAISE EXCEPTION 'no' USING ERRCODE = '{code}'; END $$")
        assert not is_retryable(caught.value)
    assert len(runs) == 2


async def test_a_prepared_statement_is_gone(db, engine, manager):
    """26000: only that connection is given up, for behind a pooler without settings it would be all of them, for ever."""
    await warm(engine, "SELECT id FROM note WHERE id = :key")
    known = await pids(engine)
    runs = []

    @transactional(retries=1)
    async def work():
        runs.append(1)
        connection = await current_session().connection()
        if len(runs) == 1:
            await connection.exec_driver_sql("DEALLOCATE ALL")
            raw = (await connection.get_raw_connection()).driver_connection
            if db.driver == "psycopg":  # which has seen it: let it prepare once more, and go behind its back
                for _ in range(PREPARED):
                    await connection.execute(text("SELECT id FROM note WHERE id = :key"), PARAMETERS)
                raw.pgconn.exec_(b"DEALLOCATE ALL")
        return (await connection.execute(text("SELECT id FROM note WHERE id = :key"), PARAMETERS)).all()

    assert await work() == []
    assert len(runs) == 2
    assert manager.statistics().retries == {("stale plan", "26000"): 1}
    assert len(known - await pids(engine)) == 1


@pytest.mark.drivers("psycopg")
async def test_a_prepared_statement_is_somebody_elses(engine, manager):
    """42P05: a session of the server that has seen another client of the pooler."""
    runs = []

    @transactional(retries=1)
    async def work():
        runs.append(1)
        connection = await current_session().connection()
        if len(runs) == 1:
            raw = (await connection.get_raw_connection()).driver_connection
            for number in range(20):
                raw.pgconn.prepare(f"_pg3_{number}".encode(), b"SELECT 1")
        for _ in range(PREPARED):
            await connection.execute(text("SELECT id FROM note WHERE id = :key"), PARAMETERS)

    await work()
    assert len(runs) == 2
    assert manager.statistics().retries == {("stale plan", "42P05"): 1}


async def test_a_read_session_meets_it_once(db, engine, manager):
    """It is not run again by itself; the pool is renewed, and the next use reads."""
    before, changes, statement = COLUMN
    await db.run(*before)
    await warm(engine, statement)
    await db.run(*changes)
    met = []
    for _ in range(2 * POOL):
        async with manager.scope():
            try:
                assert len((await current_session().execute(text(statement), PARAMETERS)).all()) == 1
            except DBAPIError as error:
                met.append(error)
    assert len(met) <= 1
    assert all(is_retryable(error) for error in met)
