"""R2, R3, D4: a connection that is lost before COMMIT was sent, and a ROLLBACK that cannot be sent."""

from __future__ import annotations

import asyncio
import contextlib
from unittest.mock import ANY

import pytest
from sqlalchemy import select, text
from sqlalchemy.exc import DBAPIError

from sqla_uow import RetryPolicy, Status, UnitOfWorkManager, current_session, current_unit, transactional
from sqla_uow.errors import AmbiguousCommitError
from tests.kit.logged import logged
from tests.kit.models import Account, Note
from tests.kit.waiting import until

pytestmark = pytest.mark.drivers("asyncpg", "psycopg", "asyncmy", "aiomysql")

RETRIED = [Status.ROLLED_BACK, Status.COMMITTED]
AT_ONCE = RetryPolicy(base=0, cap=0)


@pytest.fixture
def manager(db):
    """The manager of a fresh database."""
    return UnitOfWorkManager(db.engine())


async def has_retried(wire):
    """One row more, one hook, on one new connection, after one run that was lost."""
    await wire.until_left()
    assert [unit.status for unit in wire.units] == RETRIED
    assert wire.hooks == ["after rollback", "after commit"]
    assert wire.connected == 2
    assert wire.engine.pool.checkedout() == 0
    assert await wire.balance() == 1


@pytest.mark.parametrize("needle", [b"FROM account", b"UPDATE account"], ids=["read", "flush"])
@pytest.mark.parametrize("answered", [False, True], ids=["before", "after"])
async def test_a_statement_that_is_lost_is_retried(wire, needle, answered):
    """R2: before or after the server has it: without COMMIT it is undone, so it may be done again."""
    lost = wire.proxy.on_client_bytes(needle, "cut", after_server=answered)
    await wire.add_one()
    assert lost.fired
    await has_retried(wire)


async def test_a_server_that_restarts_is_retried(wire):
    """R2: killed under the statement; back after a moment, within the retries' waits."""
    server = wire.db.server

    def crash():
        server.kill()
        server.restart()

    lost = wire.proxy.on_client_bytes(b"UPDATE account", crash)
    await wire.add_one()
    assert lost.fired
    await has_retried(wire)


async def killed_in_its_first_run(wire, *, seen):
    """Kill the backend between the last statement and COMMIT, in the first run."""
    manager = UnitOfWorkManager(wire.engine)

    @transactional(using=manager, retries=5)
    async def add_one():
        await wire._body(manager)
        session = current_unit(manager).session
        await session.flush()
        if len(wire.units) == 1:
            raw = (await (await session.connection()).get_raw_connection()).driver_connection
            await wire.db.kill(session)
            await until(lambda: not seen or raw.is_closed(), seconds=5)

    await add_one()


@pytest.mark.drivers("asyncpg")
async def test_a_commit_that_cannot_be_sent_is_retried(wire):
    """R3: asyncpg knows that its connection is closed and sends nothing, so nothing is unknown."""
    await killed_in_its_first_run(wire, seen=True)
    await has_retried(wire)


@pytest.mark.drivers("psycopg", "asyncmy", "aiomysql")
async def test_a_commit_to_a_dead_backend_is_ambiguous(wire):
    """R3: these drivers send it and see the same end as of a COMMIT that was applied."""
    with pytest.raises(AmbiguousCommitError) as caught:
        await killed_in_its_first_run(wire, seen=False)
    assert isinstance(caught.value.__cause__, DBAPIError)
    assert [unit.status for unit in wire.units] == [Status.AMBIGUOUS]
    assert wire.hooks == []
    assert await wire.balance() == 0


async def test_a_lost_rollback_replaces_nothing(wire, caplog):
    """D4: the body's own exception, one log line, and no connection kept."""
    manager = UnitOfWorkManager(wire.engine)
    await wire.add_one(read_only=True)
    lost = wire.proxy.on_client_bytes(b"ROLLBACK", "cut")
    with pytest.raises(ValueError, match="mine") as caught:
        async with manager.begin() as unit:
            (await unit.session.get_one(Account, 1)).balance += 1
            await unit.session.flush()
            raise ValueError("mine")
    assert lost.fired
    assert caught.value.__cause__ is None
    assert unit.status is Status.ROLLED_BACK
    (found,) = logged(caplog)
    message = f"ROLLBACK of begin() failed ({found[2].get('error')}); its connection is discarded"
    assert found == ("WARNING", message, {"function": "begin()", "error": ANY})
    assert wire.engine.pool.checkedout() == 0
    await wire.add_one()
    assert (wire.connected, await wire.balance()) == (2, 1)


async def test_a_rollback_that_is_not_answered_is_given_up(wire, monkeypatch, caplog):
    """D4: bounded; the connection is discarded, which rolls back too."""
    monkeypatch.setattr("sqla_uow._unit.rollback.ROLLBACK_SECONDS", 0.2)
    monkeypatch.setattr("sqla_uow._unit.ending.IDLE_SECONDS", 0.2)
    monkeypatch.setattr("sqla_uow._databases.interrupt.STOP_SECONDS", 0.2)
    manager = UnitOfWorkManager(wire.engine)
    await wire.add_one(read_only=True)
    held = wire.proxy.on_client_bytes(b"ROLLBACK", "hold")
    with pytest.raises(ValueError, match="mine"):
        async with manager.begin() as unit:
            (await unit.session.get_one(Account, 1)).balance += 1
            await unit.session.flush()
            raise ValueError("mine")
    assert held.fired
    assert unit.status is Status.ROLLED_BACK
    message = "ROLLBACK of begin() took more than 0.2 s; its connection is discarded"
    stopping = "a cancelled statement could not be stopped on the server within 0.2 s; its locks last until it ends"
    told = [("WARNING", stopping, {})] if wire.engine.dialect.driver == "asyncpg" else []  # it waits for an answer
    assert logged(caplog) == [*told, ("WARNING", message, {"function": "begin()"})]
    wire.proxy.cut()  # else psycopg takes its time: 5 s
    await until(lambda: not wire.engine.pool.checkedout(), seconds=2)
    await wire.add_one()
    assert await wire.balance() == 1


async def test_a_rollback_of_a_doomed_reading_that_is_not_answered(wire, monkeypatch):
    """D4: likewise; it is not ended by COMMIT, as a sound one is."""
    for limit in ("_unit.rollback.ROLLBACK_SECONDS", "_unit.ending.IDLE_SECONDS", "_databases.interrupt.STOP_SECONDS"):
        monkeypatch.setattr(f"sqla_uow.{limit}", 0.2)
    await wire.add_one(read_only=True)
    held = wire.proxy.on_client_bytes(b"ROLLBACK", "hold")
    async with asyncio.timeout(8):
        async with UnitOfWorkManager(wire.engine).scope():
            with pytest.raises(DBAPIError):
                await current_session().execute(text("SELECT wrong"))
            assert not held.fired
    assert held.fired
    wire.proxy.cut()  # else psycopg takes its time: 5 s
    await until(lambda: not wire.engine.pool.checkedout(), seconds=2)


async def test_another_failure_after_a_lost_connection_was_swallowed(db, manager):
    """R2: the function has judged it, and failed for a reason of its own: that is not run again."""
    units = []

    @transactional(using=manager, retries=3, retry=AT_ONCE)
    async def work():
        units.append(current_unit(manager))
        session = current_session(manager)
        await db.kill(session)
        with contextlib.suppress(DBAPIError):
            await session.execute(select(Note))
        raise KeyError

    with pytest.raises(KeyError):
        await work()
    assert len(units) == 1
