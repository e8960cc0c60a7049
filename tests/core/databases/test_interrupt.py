"""A cancelled statement that cannot be stopped on the server."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import anyio
import pytest
from sqlalchemy import event, select, text

from sqla_uow import UnitOfWorkManager
from sqla_uow._databases import interrupt
from tests.kit.models import Note
from tests.kit.waiting import until


@pytest.fixture
def manager(db):
    """The manager of a fresh database."""
    return UnitOfWorkManager(db.engine())


@pytest.mark.drivers("psycopg")
async def test_a_libpq_that_has_no_cancel_request(db, manager, caplog):
    """C3: before 17, whose own way to cancel would block the loop: an interrupted connection is discarded as it is."""
    caplog.set_level("DEBUG", "sqla_uow")

    class Older:
        """Stand for the connection of such a libpq: the one that runs here is newer."""

        def __init__(self, connection):
            self.connection, self.real = connection, connection.pgconn
            connection.pgconn = self

        def __getattr__(self, name):
            return getattr(self.real, name)

        def cancel_conn(self):
            self.connection.pgconn = self.real
            raise self.connection.NotSupportedError

    event.listen(manager.engine.sync_engine, "checkout", lambda lent, *_: Older(lent.driver_connection))

    async def call():
        with anyio.CancelScope() as scopes[0]:
            async with manager.begin() as unit:
                await unit.session.execute(text("SELECT pg_sleep(20)"))

    async def is_running():
        return any(state == "active" for _pid, state in await db.sessions())

    scopes = [None]
    task = asyncio.create_task(call())
    await until(is_running)
    scopes[0].cancel()
    await task
    assert scopes[0].cancelled_caught
    assert "stopping a cancelled statement failed" not in caplog.text
    assert manager.engine.pool.checkedout() == 0


@pytest.mark.drivers("asyncpg", "psycopg")
async def test_a_statement_that_cannot_be_stopped(db, manager, monkeypatch, caplog):
    """C3: there is no time left to stop it, so the log says what its locks do."""
    monkeypatch.setattr(interrupt, "STOP_SECONDS", 0.0)
    entered = asyncio.Event()

    async def call():
        async with manager.begin() as unit:
            await unit.session.execute(select(Note))
            entered.set()
            await unit.session.execute(text("SELECT pg_sleep(20)"))

    task = asyncio.create_task(call())
    await entered.wait()

    async def is_running():
        return any(state == "active" for _pid, state in await db.sessions())

    await until(is_running)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert any("could not be stopped on the server within 0.0 s" in message for message in caplog.messages)
    assert manager.engine.pool.checkedout() == 0


@pytest.mark.drivers("sqlite")
def test_a_driver_whose_statements_nobody_can_stop(driver):
    """C3: its connection is discarded; one of a driver that is not here."""
    other = SimpleNamespace(
        dialect=SimpleNamespace(driver="oracledb"), connection=SimpleNamespace(driver_connection=None)
    )
    interrupt.stop_statement(other, None)
