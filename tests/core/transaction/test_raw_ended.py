"""Who ends the unit's transaction on the driver's own connection, or leaves that in another state, is told, and nobody later."""

from __future__ import annotations

import asyncio
import contextlib
import logging

import pytest
from sqlalchemy import event, select, text

from sqla_uow import Status, UnitOfWorkManager, current_session, errors, transactional
from tests.kit.models import Account
from tests.kit.raw import raw_of, send
from tests.kit.waiting import until

FIRST, SECOND = (f"INSERT INTO account (id, balance) VALUES ({number}, 10)" for number in (1, 2))
MARIADB = ("asyncmy", "aiomysql")


@pytest.fixture
def manager(db):
    """A manager with a pool of one connection."""
    return UnitOfWorkManager(db.engine(pool_size=1, max_overflow=0))


async def is_sound(db, manager):
    """Say whether the pool's one connection rolls back for somebody who knows no units."""
    async with asyncio.timeout(10), manager.engine.connect() as connection:
        await connection.execute(text("INSERT INTO account (id, balance) VALUES (99, 0)"))
        await connection.rollback()
    return await db.rows("SELECT id FROM account WHERE id = 99") == []


@pytest.fixture
def ended():
    """Statements that end the transaction and begin another, by driver."""
    return {
        "sqlite": ["ROLLBACK", "BEGIN"],
        "asyncpg": ["ROLLBACK; BEGIN"],
        "psycopg": ["ROLLBACK"],
        "asyncmy": ["ROLLBACK AND CHAIN"],
        "aiomysql": ["ROLLBACK AND CHAIN"],
    }


async def test_ended_and_begun_again_by_text(db, manager, ended):
    """What was written before is gone, though the driver says that a transaction is open."""
    ran = []
    with pytest.raises(errors.RollbackOnlyError, match="ended on the driver's own connection"):
        async with manager.begin() as unit:
            unit.after_commit(ran.append, 1)
            await unit.session.execute(text(FIRST))
            raw = await raw_of(unit.session)
            for statement in ended[db.driver]:
                await send(raw, statement)
            await send(raw, SECOND)
    assert unit.status is Status.ROLLED_BACK
    assert ran == []
    assert await db.rows("SELECT id FROM account") == []
    assert await is_sound(db, manager)


@pytest.mark.drivers("sqlite", "psycopg", "asyncmy", "aiomysql")
@pytest.mark.parametrize("call", ["rollback", "commit"])
async def test_ended_and_begun_again_by_a_call(db, manager, call):
    """Likewise by the driver's own methods."""
    with pytest.raises(errors.RollbackOnlyError, match="ended on the driver's own connection"):
        async with manager.begin() as unit:
            raw = await raw_of(unit.session)
            await unit.session.execute(text(FIRST))
            await getattr(raw, call)()
            await send(raw, SECOND)
    assert await db.rows("SELECT id FROM account") == ([(1,)] if call == "commit" else [])


@pytest.mark.drivers(*MARIADB)
async def test_begun_again_by_a_call(db, manager):
    """MariaDB's BEGIN commits first."""
    with pytest.raises(errors.RollbackOnlyError, match="ended on the driver's own connection"):
        async with manager.begin() as unit:
            await unit.session.execute(text(FIRST))
            await (await raw_of(unit.session)).begin()
    assert await db.rows("SELECT id FROM account") == [(1,)]


async def test_words_are_no_statements(db, manager):
    """What looks like the end of a transaction in a value, in a comment or in a body ends nothing."""
    async with manager.begin() as unit:
        raw = await raw_of(unit.session)
        await send(raw, "INSERT INTO note (id, text) VALUES (1, 'first; COMMIT; end of it')")
        await send(raw, "INSERT INTO note (id, text) VALUES (2, 'it''s; ROLLBACK') /* ; COMMIT */")
        await send(raw, "SAVEPOINT here")
        await send(raw, "INSERT INTO note (id, text) VALUES (3, '')")
        await send(raw, "ROLLBACK TO SAVEPOINT here")
    assert await db.rows("SELECT id FROM note ORDER BY id") == [(1,), (2,)]


@pytest.mark.drivers("sqlite")
async def test_the_body_of_a_trigger_is_no_end(db, manager):
    """Its BEGIN and END are its own."""
    async with manager.begin() as unit:
        raw = await raw_of(unit.session)
        await send(raw, "CREATE TRIGGER idle AFTER INSERT ON account BEGIN SELECT 1; END")
        await send(raw, FIRST)
    assert await db.rows("SELECT id FROM account") == [(1,)]


@pytest.mark.drivers(*MARIADB)
async def test_a_block_is_no_end(db, manager):
    """Likewise MariaDB's."""
    async with manager.begin() as unit:
        await send(await raw_of(unit.session), f"BEGIN NOT ATOMIC {FIRST}; END")
    assert await db.rows("SELECT id FROM account") == [(1,)]


@pytest.mark.drivers("psycopg", "asyncmy", "aiomysql")
async def test_autocommit_is_not_handed_on(db, manager, caplog):
    """The next user of the connection could roll nothing back."""
    with caplog.at_level(logging.WARNING, "sqla_uow"):
        with pytest.raises(ValueError, match="leave"):
            async with manager.begin() as unit:
                raw = await raw_of(unit.session)
                await raw.rollback()
                await (raw.set_autocommit if db.driver == "psycopg" else raw.autocommit)(True)
                raise ValueError("leave")
        assert await is_sound(db, manager)
    assert "came back to the pool in autocommit" in caplog.text


@pytest.mark.drivers("asyncpg", "sqlite")
async def test_closed_is_not_handed_on(db, manager):
    """Nor would the next user have asked for a closed one; nothing was committed on it."""
    with pytest.raises(errors.RollbackOnlyError, match="closed"):
        async with manager.begin() as unit:
            await unit.session.execute(text(FIRST))
            event.listen(unit.session.sync_session, "before_commit", _close)
    assert unit.status is Status.ROLLED_BACK
    assert await db.rows("SELECT id FROM account") == []
    assert await is_sound(db, manager)


def _close(session):
    session.connection().connection.dbapi_connection.close()


@pytest.mark.filterwarnings("ignore:transaction already deassociated")  # SQLAlchemy's word on such a listener
async def test_a_commit_listener_that_rolls_back(db, manager):
    """A veto by ROLLBACK is no success."""
    ran, armed = [], [True]

    def veto(connection):
        if armed:
            armed.clear()
            connection.rollback()

    event.listen(manager.engine.sync_engine, "commit", veto)
    with pytest.raises(errors.RollbackOnlyError, match="rolled back inside"):
        async with manager.begin() as unit:
            unit.after_commit(ran.append, 1)
            await unit.session.execute(text(FIRST))
    assert unit.status is Status.ROLLED_BACK
    assert ran == []
    assert await db.rows("SELECT id FROM account") == []
    assert await is_sound(db, manager)


@pytest.mark.drivers(*MARIADB)
@pytest.mark.parametrize("statement", ["CALL halfway()", f"{SECOND}; {FIRST}"])
async def test_a_further_result_that_fails(db, manager, statement):
    """SQLAlchemy reads it while it closes the cursor: swallowed by the body, or by SQLAlchemy itself."""
    await db.run(f"CREATE PROCEDURE halfway() BEGIN SELECT 1; {SECOND}; SIGNAL SQLSTATE '45000'; END")
    with pytest.raises(errors.RollbackOnlyError):
        async with manager.begin() as unit:
            await unit.session.execute(text(FIRST))
            with contextlib.suppress(Exception):
                await unit.session.execute(text(statement))
    assert await db.rows("SELECT id FROM account") == []
    assert await is_sound(db, manager)


@pytest.mark.drivers(*MARIADB)
@pytest.mark.parametrize("taken", ["before", "meanwhile"])
async def test_a_stream_is_not_cut_off(db, manager, taken):
    """The driver would drop the rows that are left, without an error."""
    await db.run(*(f"INSERT INTO account (id, balance) VALUES ({number}, 0)" for number in range(1, 41)))
    rows = []
    with pytest.raises(errors.PropagationError, match="still being read"):
        async with manager.begin() as unit:
            raw = await raw_of(unit.session) if taken == "before" else None
            stream = await unit.session.stream_scalars(select(Account.id).execution_options(yield_per=5))
            async for row in stream:
                rows.append(row)
                if len(rows) == 10:
                    await send(raw or await raw_of(unit.session), "INSERT INTO account (id, balance) VALUES (41, 0)")
    assert len(rows) == 10
    assert await db.scalar("SELECT count(*) FROM account") == 40
    assert await is_sound(db, manager)


@pytest.mark.drivers(*MARIADB)
async def test_rows_that_are_read_one_by_one(db, manager):
    """Their flags come behind the last of them: until then nothing says that the transaction has ended."""
    if db.driver == "asyncmy":
        from asyncmy.cursors import SSCursor  # noqa: PLC0415  # of one driver
    else:
        from aiomysql import SSCursor  # noqa: PLC0415  # likewise
    async with manager.begin() as unit:
        await unit.session.execute(text(FIRST))
        raw = await raw_of(unit.session)
        async with raw.cursor(SSCursor) as cursor:
            await cursor.execute("SELECT seq FROM seq_1_to_100")
            assert await cursor.fetchone() == (1,)
    assert await db.rows("SELECT id FROM account") == [(1,)]


@pytest.mark.drivers("sqlite")
async def test_a_cancelled_statement_leaves_no_lock(db, manager):
    """Also where the driver's own connection was taken, and SQLAlchemy waits for its cursor."""

    async def work():
        async with manager.begin() as unit:
            raw = await raw_of(unit.session)
            await send(raw, FIRST)
            task, make = asyncio.current_task(), raw.cursor

            def cursor(*args, **kwargs):
                task.cancel()
                return make(*args, **kwargs)

            raw.cursor = cursor
            try:
                unit.session.add(Account(id=2))
                await unit.session.flush()
            finally:
                del raw.cursor

    with pytest.raises(asyncio.CancelledError):
        await asyncio.create_task(work())
    assert await db.rows("SELECT id FROM account") == []
    async with asyncio.timeout(4):
        await db.run(FIRST)


@pytest.mark.drivers("psycopg")
async def test_a_copy_that_is_still_under_way(db, manager):
    """COMMIT would wait for it, for ever."""
    begun = asyncio.Event()

    async def load(raw):
        async with raw.cursor() as cursor, cursor.copy("COPY account (id, balance) FROM STDIN") as rows:
            await rows.write_row((2, 0))
            begun.set()
            await asyncio.Event().wait()

    async with asyncio.timeout(8):
        with pytest.raises(errors.RollbackOnlyError, match="under way"):
            async with manager.begin() as unit:
                await unit.session.execute(text(FIRST))
                task = asyncio.create_task(load(await raw_of(unit.session)))
                await begun.wait()
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError, Exception):
        await task
    assert await db.rows("SELECT id FROM account") == []
    assert await is_sound(db, manager)
    await until(db.is_idle)


@pytest.mark.drivers("psycopg")
async def test_a_pipeline_that_is_left_on(db, manager):
    """The next user of the connection would get answers to somebody else's questions."""
    with pytest.raises(errors.RollbackOnlyError, match="under way"):
        async with manager.begin() as unit:
            raw = await raw_of(unit.session)
            pipeline = raw.pipeline()
            await pipeline.__aenter__()
            await raw.execute("SELECT nonsense")
    assert await is_sound(db, manager)
    with contextlib.suppress(Exception):
        await pipeline.__aexit__(None, None, None)


@pytest.mark.parametrize("swallowed", [False, True])
@pytest.mark.drivers("psycopg")
async def test_a_connection_that_is_lost_under_it_is_retried(db, swallowed):
    """As under a statement of the session."""
    manager = UnitOfWorkManager(db.engine(), retries=1)
    runs = []

    @transactional(using=manager)
    async def work():
        session = current_session()
        runs.append(1)
        raw = await raw_of(session)
        await send(raw, FIRST)
        try:
            if len(runs) == 1:
                await send(raw, "SELECT pg_terminate_backend(pg_backend_pid())")
            await send(raw, SECOND)
        except Exception:
            if not swallowed:
                raise

    await work()
    assert len(runs) == 2
    assert await db.rows("SELECT id FROM account ORDER BY id") == [(1,), (2,)]


@pytest.mark.parametrize("savepoint", [False, True])
@pytest.mark.parametrize("swallowed", [False, True])
@pytest.mark.drivers("asyncpg", "psycopg")
async def test_a_conflict_under_it_is_retried(db, manager, swallowed, savepoint):
    """Also one that a savepoint there has brought back, and one of which the driver tells when the body has ended."""
    await db.run(FIRST)
    runs = []

    @transactional(using=manager, retries=1, isolation="SERIALIZABLE")
    async def work():
        session = current_session()
        runs.append(await session.scalar(text("SELECT balance FROM account")))
        raw = await raw_of(session)
        if len(runs) == 1:
            await db.run("UPDATE account SET balance = 20")
        try:
            async with raw.transaction() if savepoint else contextlib.nullcontext():
                await raw.execute("UPDATE account SET balance = balance + 1")
        except Exception:
            if not swallowed:
                raise

    await work()
    assert runs == [10, 20]
    assert await db.scalar("SELECT balance FROM account") == 21


@pytest.mark.drivers("psycopg")
async def test_ended_past_the_drivers_calls(db, manager):
    """By libpq, which the driver's connection shows: seen before COMMIT, which has nothing to commit."""
    with pytest.raises(errors.RollbackOnlyError, match="its transaction was ended on the driver's own connection"):
        async with manager.begin() as unit:
            raw = await raw_of(unit.session)
            unit.session.add(Account(id=1))
            await unit.session.flush()
            raw.pgconn.exec_(b"ROLLBACK")
    assert unit.status is Status.ROLLED_BACK
    assert await db.rows("SELECT id FROM account") == []
