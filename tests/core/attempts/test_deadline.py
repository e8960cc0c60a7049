"""R6: whoever notices first that the deadline has passed, the caller gets the same error."""

from __future__ import annotations

import asyncio
import contextlib
import time

import pytest
from sqlalchemy import event, text
from sqlalchemy.util import await_only

from sqla_uow import Status, UnitOfWorkManager, current_session, errors, transactional
from tests.kit.models import Note

SLEEP = {"postgresql": "SELECT pg_sleep(20)", "mysql": "SELECT 1 WHERE sleep(20) = 0"}


@pytest.fixture
def manager(db):
    """The manager of a fresh database."""
    return UnitOfWorkManager(db.engine())


async def notes(db):
    """Return what is committed."""
    return [note for (note,) in await db.rows("SELECT text FROM note ORDER BY id")]


@pytest.mark.drivers("asyncpg", "psycopg", "asyncmy", "aiomysql")
async def test_the_servers_own_limit_is_the_deadline_too(db, monkeypatch):
    """A loop too busy to notice lets the server be first: its code becomes TransactionTimeoutError, not a retry."""

    @transactional(timeout=0.3, retries=3)
    async def work():
        await current_session().execute(text(SLEEP[db.family]))

    class Never:  # a timer that never fires stands for an event loop that is blocked
        async def __aenter__(self):
            return self

        async def __aexit__(self, *_):
            return None

        def expired(self):
            return False

    monkeypatch.setattr("sqla_uow._attempts.attempt.asyncio.timeout", lambda _seconds: Never())
    manager = UnitOfWorkManager(db.engine())
    started = time.monotonic()
    with manager.activate(), pytest.raises(errors.TransactionTimeoutError) as caught:
        await work()
    assert time.monotonic() - started < 10
    assert caught.value.attempts == 1
    assert str(caught.value) == (
        "work() did not finish within 0.3 s: the deadline passed in attempt 1; raise the timeout, or shorten the transaction"
    )


async def test_a_deadline_that_passes_behind_the_commit(db):
    """R6, C3: COMMIT was answered; that giving the connection back took too long does not make it undone."""
    engine = db.engine(pool_size=1, max_overflow=0)
    manager = UnitOfWorkManager(engine)

    def linger(_connection, _record, state):
        if state.asyncio_safe:
            slow.append(await_only(asyncio.sleep(30)))

    slow = []
    async with manager.begin(timeout=0.5) as unit:
        await unit.session.execute(text("INSERT INTO account (id, balance) VALUES (1, 0)"))
        event.listen(engine.sync_engine.pool, "reset", linger)
    event.remove(engine.sync_engine.pool, "reset", linger)
    assert slow == []  # it was cut off
    assert unit.status is Status.COMMITTED
    assert engine.pool.checkedout() == 0
    assert await db.rows("SELECT id FROM account") == [(1,)]
    async with manager.begin() as unit:
        assert await unit.session.scalar(text("SELECT 7")) == 7


async def test_a_body_that_swallows_its_deadline(db, manager):
    """R6: it comes to its end, too late: rolled back, and the caller is told."""

    async def late(*, cancelled_too):
        async with manager.begin(timeout=0.5) as unit:
            units.append(unit)
            unit.session.add(Note(text="late"))
            await unit.session.flush()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.Event().wait()
            if cancelled_too:
                asyncio.current_task().cancel()

    for cancelled_too in (False, True):
        units = []
        task = asyncio.create_task(late(cancelled_too=cancelled_too))
        with pytest.raises(errors.TransactionTimeoutError) as told:
            await task
        assert isinstance(told.value.__cause__, asyncio.CancelledError) is cancelled_too  # which is not lost for it
        assert units[0].status is Status.ROLLED_BACK
    assert await notes(db) == []
    assert manager.engine.pool.checkedout() == 0
