"""A4: a connection's settings go back to what they were, stricter limits stay, and a deadline changes no result."""

from __future__ import annotations

import asyncio
import contextvars
import time

import pytest
from sqlalchemy import event, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession

from sqla_uow import Status, UnitOfWorkManager, errors

ADD = text("INSERT INTO account (id, balance) VALUES (:id, 0)")
POSTGRESQL = pytest.mark.drivers("asyncpg", "psycopg")
SERVERS = pytest.mark.drivers("asyncpg", "psycopg", "asyncmy", "aiomysql")


def with_settings(db, **settings):
    """Make an engine of one connection with settings of the session, as a role may have them."""
    if db.driver == "asyncpg":
        arguments = {"server_settings": settings}
    else:
        arguments = {
            "options": " ".join(f"-c {name}={value.replace(' ', chr(92) + ' ')}" for name, value in settings.items())
        }
    return db.engine(pool_size=1, max_overflow=0, connect_args=arguments)


@POSTGRESQL
async def test_a_role_that_only_reads_still_only_reads_after_a_read_only_unit(db):
    """A4: the next BEGIN says nothing again, instead of READ WRITE."""
    engine = with_settings(db, default_transaction_read_only="on")
    manager = UnitOfWorkManager(engine)
    async with manager.begin(read_only=True) as unit:
        await unit.session.execute(text("SELECT 1"))
    with pytest.raises(DBAPIError, match="read-only"):
        async with AsyncSession(engine) as session:
            await session.execute(ADD, {"id": 1})
            await session.commit()
    with pytest.raises(DBAPIError, match="read-only"):
        async with manager.begin() as unit:
            await unit.session.execute(ADD, {"id": 2})
    assert await db.rows("SELECT * FROM account") == []


@POSTGRESQL
async def test_a_role_with_a_level_of_its_own_has_it_again_after_a_unit_with_another(db):
    """A4: SQLAlchemy would set the level that it has found with the engine's first connection."""
    engine = db.engine(pool_size=1, max_overflow=0)

    def stricter(dbapi_connection, _record):
        cursor = dbapi_connection.cursor()
        cursor.execute("SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        cursor.close()
        dbapi_connection.commit()

    async with engine.connect():
        pass  # SQLAlchemy has found READ COMMITTED
    await engine.dispose()
    event.listen(engine.sync_engine, "connect", stricter)
    manager = UnitOfWorkManager(engine)
    async with manager.begin(isolation="SERIALIZABLE") as unit:
        assert await unit.session.scalar(text("SHOW transaction_isolation")) == "serializable"
    async with manager.begin() as unit:
        assert await unit.session.scalar(text("SHOW transaction_isolation")) == "repeatable read"
    async with engine.connect() as connection:
        assert await connection.scalar(text("SHOW transaction_isolation")) == "repeatable read"


@SERVERS
@pytest.mark.parametrize("isolation", [None, "REPEATABLE READ", "SERIALIZABLE"])
async def test_a_stricter_limit_of_the_server_stays(db, isolation):
    """A4: a deadline of 20 s does not lift a limit of 0.3 s; a deadline that is stricter than the server's rules."""
    if db.family == "postgresql":
        engine = with_settings(db, statement_timeout="300ms")
    else:
        engine = db.engine(
            pool_size=1, max_overflow=0, connect_args={"init_command": "SET SESSION max_statement_time=0.3"}
        )
    slow = text("SELECT pg_sleep(3)" if db.family == "postgresql" else "SELECT sleep(3), count(*) FROM account")
    await db.run("INSERT INTO account (id, balance) VALUES (1, 0)")
    manager = UnitOfWorkManager(engine)
    for _ in range(2):
        started = time.monotonic()
        with pytest.raises(DBAPIError):
            async with manager.begin(timeout=20, isolation=isolation) as unit:
                await unit.session.execute(slow)
        assert time.monotonic() - started < 2.5
        with pytest.raises(errors.TransactionTimeoutError):
            async with manager.begin(timeout=0.1, isolation=isolation) as unit:
                await unit.session.execute(slow)


@POSTGRESQL
@pytest.mark.parametrize("value", ["0", "3s", "2min", "1h", "10d", "500ms"])
@pytest.mark.parametrize("isolation", ["READ COMMITTED", "REPEATABLE READ"])
async def test_the_smaller_limit_holds_however_the_server_writes_it(db, isolation, value):
    """A4: for statements and for the whole transaction."""
    manager = UnitOfWorkManager(with_settings(db, statement_timeout=value))
    async with manager.begin(timeout=30, isolation=isolation) as unit:
        shown = await unit.session.scalar(text("SELECT setting FROM pg_settings WHERE name = 'statement_timeout'"))
    if value in ("3s", "500ms"):
        assert shown == {"3s": "3000", "500ms": "500"}[value]
    else:
        assert 29_000 < int(shown) <= 30_000
    async with manager.begin(isolation=isolation) as unit:
        shown = await unit.session.scalar(text("SHOW statement_timeout"))
    assert shown == value


@POSTGRESQL
async def test_the_end_waits_while_the_limits_are_set(wire):
    """A4: a child's first statement waits for them; they come to their end, and the connection is as good as before."""
    manager = UnitOfWorkManager(wire.engine, isolation="REPEATABLE READ")
    held = wire.proxy.on_client_bytes(b"SET LOCAL", "hold")
    with pytest.raises(KeyError):
        async with manager.begin(timeout=20) as unit:
            child = asyncio.create_task(unit.session.execute(text("SELECT 1")))
            assert await asyncio.to_thread(held.wait)
            asyncio.get_running_loop().call_later(0.3, held.release)
            raise KeyError
    await asyncio.wait({child})
    async with manager.begin(timeout=20) as unit:
        assert await unit.session.scalar(text("SELECT 1")) == 1
    assert wire.connected == 1


@POSTGRESQL
async def test_limits_that_cannot_be_set(wire):
    """A4: what the server says to that is the error, and not what comes of it."""
    manager = UnitOfWorkManager(wire.engine, isolation="REPEATABLE READ")
    others = "FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'"
    wire.proxy.on_client_bytes(
        b"SET LOCAL", lambda: wire.db.server.execute(f"SELECT pg_terminate_backend(pid, 5000) {others}")
    )
    with pytest.raises(errors.ConflictError) as caught:
        async with manager.begin(timeout=20) as unit:
            await unit.session.execute(text("SELECT 1"))
    assert caught.value.__cause__.statement.startswith("SET LOCAL")


@POSTGRESQL
@pytest.mark.parametrize("isolation", ["REPEATABLE READ", "SERIALIZABLE"])
@pytest.mark.parametrize("seconds", [None, 10])
async def test_a_deadline_takes_no_snapshot(db, isolation, seconds):
    """A4: LOCK TABLE before the first SELECT is PostgreSQL's way to a fresh snapshot, with a deadline as well."""
    manager = UnitOfWorkManager(db.engine(pool_size=2))
    for _ in range(2):  # on a new connection, and on a warm one
        async with manager.begin(isolation=isolation) as first:
            before = await first.session.scalar(text("SELECT count(*) FROM account"))
            await first.session.execute(text("LOCK TABLE account IN EXCLUSIVE MODE"))
            await first.session.execute(ADD, {"id": before})

            async def second():
                async with manager.begin(isolation=isolation, timeout=seconds) as unit:
                    await unit.session.execute(text("LOCK TABLE account IN EXCLUSIVE MODE"))
                    number = await unit.session.scalar(text("SELECT count(*) FROM account"))
                    await unit.session.execute(ADD, {"id": number})

            waiter = asyncio.create_task(second(), context=contextvars.Context())
            await db.until_waiting()
        await waiter
    assert await db.rows("SELECT id FROM account ORDER BY id") == [(0,), (1,), (2,), (3,)]


@POSTGRESQL
@pytest.mark.parametrize("where", ["checkout", "engine_connect"])
@pytest.mark.parametrize("isolation", [None, "SERIALIZABLE"])
async def test_a_unit_only_reads_also_where_a_listener_has_begun_its_transaction(db, where, isolation):
    """P6: by asyncpg's adapter BEGIN goes out with whatever is sent first."""
    if isolation is not None and db.driver == "psycopg":
        pytest.skip("psycopg refuses to change the level of a transaction that has begun")
    engine = db.engine(pool_size=1, max_overflow=0)

    def look(dbapi_connection):
        cursor = dbapi_connection.cursor()
        cursor.execute("SELECT 1")
        cursor.close()

    if where == "checkout":
        event.listen(engine.sync_engine, "checkout", lambda connection, *_: look(connection))
    else:
        event.listen(
            engine.sync_engine, "engine_connect", lambda connection: look(connection.connection.dbapi_connection)
        )
    manager = UnitOfWorkManager(engine)
    with pytest.raises(errors.ReadOnlyError):
        async with manager.begin(read_only=True, isolation=isolation) as unit:
            assert await unit.session.scalar(text("SHOW transaction_read_only")) == "on"
            await unit.session.execute(
                text("WITH new AS (INSERT INTO account (id, balance) VALUES (1, 0) RETURNING id) SELECT * FROM new")
            )
    assert await db.rows("SELECT * FROM account") == []
    async with manager.begin() as unit:
        await unit.session.execute(ADD, {"id": 2})
    assert unit.status is Status.COMMITTED


@pytest.mark.drivers("asyncpg", "psycopg")
async def test_an_older_postgresql_has_no_transaction_timeout(db):
    """R6: before 17 the server has statement_timeout alone; the one that runs here is newer, and taken for an older one."""
    engine = db.engine()
    async with engine.connect():
        engine.sync_engine.dialect.server_version_info = (16, 4)
    async with UnitOfWorkManager(engine).begin(timeout=20) as unit:
        late = await unit.session.scalar(text("SELECT current_setting('transaction_timeout')"))
        statement = await unit.session.scalar(text("SELECT current_setting('statement_timeout')"))
    assert (late, statement != "0") == ("0", True)
