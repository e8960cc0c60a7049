"""What is sent on the driver's own connection is in the unit's transaction, and the pool asks how it comes back."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import weakref

import pytest
from sqlalchemy import event, text

from sqla_uow import Status, UnitOfWorkManager, current_session, errors, transactional
from tests.kit.models import Account
from tests.kit.raw import raw_of, send

INSERT = "INSERT INTO account (id, balance) VALUES (1, 10)"


async def copy(raw):
    """Insert by COPY where there is one."""
    if hasattr(raw, "copy_records_to_table"):
        await raw.copy_records_to_table("account", records=[(1, 10)], columns=["id", "balance"])
    elif hasattr(raw, "pgconn"):
        async with raw.cursor() as cursor, cursor.copy("COPY account (id, balance) FROM STDIN") as rows:
            await rows.write_row((1, 10))
    else:
        await send(raw, INSERT)


@pytest.fixture
def manager(db):
    """A manager with a pool of one connection."""
    return UnitOfWorkManager(db.engine(pool_size=1, max_overflow=0))


@pytest.mark.parametrize("isolation", [None, "SERIALIZABLE"])
async def test_it_is_rolled_back(db, manager, isolation):
    """COPY as the first thing in a unit: asyncpg has not begun then, if nobody makes it."""
    with pytest.raises(ValueError, match="undo"):
        async with manager.begin(isolation=isolation) as unit:
            await copy(await raw_of(unit.session))
            raise ValueError("undo")
    assert await db.rows("SELECT id FROM account") == []
    async with manager.begin(isolation=isolation) as unit:
        await copy(await raw_of(unit.session))
    assert await db.rows("SELECT id, balance FROM account") == [(1, 10)]


async def test_a_failed_attempt_leaves_nothing(db, manager):
    """Its rows would stand beside those of the next."""
    runs = []

    @transactional(using=manager, retries=1, retry_on=lambda error: isinstance(error, ValueError))
    async def load():
        runs.append(1)
        await copy(await raw_of(current_session()))
        if len(runs) == 1:
            raise ValueError("once more")

    await load()
    assert len(runs) == 2
    assert await db.rows("SELECT id FROM account") == [(1,)]


async def test_a_read_only_unit_refuses_it(db, manager):
    """The database refuses, as COPY passes no guard of ours."""
    with pytest.raises(Exception, match=r"(?i)read.?only"):
        async with manager.begin(read_only=True) as unit:
            await copy(await raw_of(unit.session))
    assert await db.rows("SELECT id FROM account") == []


@pytest.mark.parametrize("how", ["commit", "rollback"])
async def test_a_transaction_that_was_ended_there(db, manager, how):
    """Nobody is told that all of it was committed."""
    with pytest.raises(errors.RollbackOnlyError, match="was ended on the driver's own connection"):
        async with manager.begin() as unit:
            await unit.session.execute(text(INSERT))
            raw = await raw_of(unit.session)
            if hasattr(raw, how):
                await getattr(raw, how)()
            else:
                await raw.execute(how.upper())
    assert unit.status is Status.ROLLED_BACK


# -- the pool


async def in_transaction(engine):
    """Take a connection from the pool and say whether the server has a transaction open on it."""
    async with engine.connect() as connection:
        raw = (await connection.get_raw_connection()).driver_connection
        if hasattr(raw, "is_in_transaction"):
            return raw.is_in_transaction()
        if hasattr(raw, "pgconn"):
            return raw.info.transaction_status != 0
        if hasattr(raw, "server_status"):
            return bool(raw.server_status & 1)
        return raw.in_transaction


@pytest.mark.parametrize("who", ["a unit", "anybody"])
async def test_a_connection_that_comes_back_inside_a_transaction(db, caplog, who):
    """It is discarded, whoever left it so: here a listener begins again behind the ROLLBACK of the pool."""
    engine = db.engine(pool_size=1, max_overflow=0)
    manager = UnitOfWorkManager(engine)
    left = []

    @event.listens_for(engine.sync_engine, "checkin", insert=True)  # so that ours hears of it behind
    def leave(dbapi_connection, _record):
        if left:
            left.clear()
            cursor = dbapi_connection.cursor()
            cursor.execute("BEGIN" if db.driver in ("sqlite", "asyncpg") else INSERT)
            cursor.close()

    with caplog.at_level(logging.WARNING, logger="sqla_uow"):
        if who == "a unit":
            async with manager.begin() as unit:
                await unit.session.execute(text("SELECT 1"))
                left.append(1)
        else:
            async with engine.connect() as connection:
                await connection.execute(text("SELECT 1"))
                left.append(1)
    assert "came back to the pool inside a transaction" in caplog.text
    assert not await in_transaction(engine)
    async with manager.begin() as unit:
        unit.session.add(Account(id=2))
    assert await db.rows("SELECT id FROM account") == [(2,)]


async def test_a_commit_under_a_raw_call_of_another_task(db, manager):
    """COMMIT fails at the client; whatever the driver's adapter believes, the pool gets no open transaction."""
    tasks = []
    sleep = {"postgresql": "SELECT pg_sleep(0.3)", "mysql": "SELECT SLEEP(0.3)"}.get(db.family, "SELECT 1")
    with contextlib.suppress(Exception):
        async with manager.begin() as unit:
            await unit.session.execute(text(INSERT))
            raw = await raw_of(unit.session)
            tasks.append(asyncio.create_task(send(raw, sleep)))
            await asyncio.sleep(0)
    committed = unit.status is Status.COMMITTED
    await asyncio.gather(*tasks, return_exceptions=True)
    assert not await in_transaction(manager.engine)
    assert len(await db.rows("SELECT id FROM account")) == committed
    async with manager.begin() as unit:
        unit.session.add(Account(id=2))
    assert (2,) in await db.rows("SELECT id FROM account")


async def test_its_connection_keeps_no_unit(db, manager):
    """What told of the raw calls is gone with the unit, though the connection stays in the pool."""
    async with manager.begin() as unit:
        await send(await raw_of(unit.session), "SELECT 1")
        transaction = weakref.ref(unit._transaction)
    del unit
    gc.collect()
    assert transaction() is None
    assert manager.engine.pool.checkedin() == 1
