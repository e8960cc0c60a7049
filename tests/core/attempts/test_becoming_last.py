"""R13: an attempt that becomes the last one waits for locks as the last one does."""

from __future__ import annotations

import asyncio
import contextlib

import pytest
from sqlalchemy import event, text
from starlette.responses import PlainTextResponse

from sqla_uow import RetryPolicy, UnitOfWorkManager, current_session, current_unit, transactional
from sqla_uow._retry.gate import ANY
from tests.kit.queueing import has_conflicted
from tests.kit.waiting import until
from tests.starlette.client import app_of, client_of

pytestmark = pytest.mark.drivers("asyncpg", "psycopg")
LONGER = 0.8
"""Seconds; more than twice what an attempt waits for a lock while turns are limited in the beginning."""
LOCK = "SELECT balance FROM account WHERE id = 1 FOR UPDATE"


@pytest.fixture
async def held(db):
    """Provide one account, and a block during which its row is locked until a session has waited for longer than that."""
    await db.run("INSERT INTO account (id, balance) VALUES (1, 0)")

    @contextlib.asynccontextmanager
    async def holding():
        locked, over = asyncio.Event(), asyncio.Event()

        async def has_waited():
            query = (
                "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock' "
                f"AND clock_timestamp() - query_start > interval '{LONGER} s'"
            )
            return over.is_set() or bool(await db.rows(query))

        async def hold():
            async with db.outside() as other:
                await other.execute(text(LOCK))
                locked.set()
                await until(has_waited)

        holder = asyncio.create_task(hold())
        await locked.wait()
        try:
            yield
        finally:
            over.set()
            await holder

    return holding


def statements_of(engine):
    """Return the statements that are sent from now on."""
    sent = []
    event.listen(engine.sync_engine, "before_cursor_execute", lambda _c, _cu, statement, *_: sent.append(statement))
    return sent


@pytest.fixture
def manager(db):
    """Provide an active manager whose calls are two at once: of each the patience is limited."""
    with UnitOfWorkManager(db.engine(), retries=3, retry=RetryPolicy(base=0, cap=0)).activate() as manager:
        yield manager


async def beside(work, another):
    """Run a call beside another one of the same function, which goes on until it has ended."""
    began, over = asyncio.Event(), asyncio.Event()
    first = asyncio.create_task(another(began, over))
    try:
        await began.wait()
        return await work()
    finally:
        over.set()
        await first


async def race(manager, held, become_last):
    """Return how many attempts a call took that becomes the last and then meets a lock, beside another call."""
    runs = []

    @transactional
    async def work(began=None, over=None):
        if began is not None:
            began.set()
            await over.wait()
            return
        runs.append(1)
        await become_last()
        await current_session().execute(text("UPDATE account SET balance = balance + 1 WHERE id = 1"))

    has_conflicted(manager, work)
    async with held():
        await beside(work, work)
    return len(runs)


async def sql():
    """Have the transaction begun, with its limit."""
    assert await current_session().scalar(text("SELECT 1")) == 1


async def at_once():
    """Before any SQL: then no limit is sent."""
    current_unit().is_last_attempt = True


async def after_sql():
    """The limit has been sent."""
    await sql()
    current_unit().is_last_attempt = True


async def in_a_savepoint():
    """It is lifted, and that is undone with the savepoint."""
    await sql()
    current_unit().is_last_attempt = True
    savepoint = await current_session().begin_nested()
    await sql()
    await savepoint.rollback()


async def before_a_savepoint():
    """The statement before which it is lifted is a SAVEPOINT, and must be known as one."""
    await sql()
    current_unit().is_last_attempt = True
    savepoint = await current_session().begin_nested()
    with pytest.raises(Exception, match="nowhere"):
        await current_session().execute(text("SELECT * FROM nowhere"))
    await savepoint.rollback()


@pytest.mark.parametrize(
    "become_last", [at_once, after_sql, in_a_savepoint, before_a_savepoint], ids=lambda how: how.__name__
)
async def test_it_waits_as_long_as_it_takes(db, manager, held, become_last):
    """The row is held for longer than an attempt waits that may be run again; the call is told nothing of it."""
    assert await race(manager, held, become_last) == 1
    assert await db.scalar("SELECT balance FROM account") == 1


async def test_one_that_may_be_run_again_does_not(db, manager, held):
    """The limit is there: without it this would test nothing."""
    assert await race(manager, held, sql) > 1
    assert await db.scalar("SELECT balance FROM account") == 1


async def test_nothing_is_sent_where_nothing_changes(db, manager):
    """An attempt without a limit, one that is the last anyhow, and one that has sent no SQL yet."""
    sent = statements_of(manager.engine)

    @transactional
    async def work():
        current_unit().is_last_attempt = True
        await sql()
        current_unit().is_last_attempt = True
        await sql()

    await work()
    async with manager.begin():
        await after_sql()
        await sql()
    assert sent == ["SELECT 1"] * 4


async def test_a_request_whose_body_is_too_long_to_be_replayed(db, held):
    """It is the last attempt by the middleware's own decision: no 503 for a row that is busy."""
    manager = UnitOfWorkManager(db.engine(), retry=RetryPolicy(base=0, cap=0))

    async def write(request):
        session = current_session(manager)
        await session.scalar(text("SELECT 1"))
        await request.body()
        await session.execute(text("UPDATE account SET balance = balance + 1 WHERE id = 1"))
        return PlainTextResponse("written")

    gate = has_conflicted(manager, "POST /write")
    assert all(gate.try_enter(ANY) for _ in range(2))  # others run
    assert gate.lock_wait(1)  # seconds; there is a limit that has to be lifted
    async with client_of(app_of(manager, write, atomic=True, retries=3, max_replay_body=10)) as client, held():
        response = await client.post("/write", content=b"x" * 1000)
    assert (response.status_code, response.text) == (200, "written")
    assert await db.scalar("SELECT balance FROM account") == 1


async def test_commit_waits_as_well(db, manager):
    """A constraint that is checked by COMMIT needs a row that another transaction holds."""
    await db.run(
        "INSERT INTO account (id, balance) VALUES (1, 0)",
        "CREATE TABLE child (parent int NOT NULL REFERENCES account (id) DEFERRABLE INITIALLY DEFERRED)",
    )
    holding, waiting = asyncio.Event(), asyncio.Event()

    @transactional
    async def work(began=None, over=None):
        if began is not None:
            began.set()
            await over.wait()
            return
        await current_session().execute(text("INSERT INTO child VALUES (1)"))
        current_unit().is_last_attempt = True
        waiting.set()
        await holding.wait()

    async def call():
        task = asyncio.create_task(work())
        await waiting.wait()
        async with db.outside() as other:
            await other.execute(text("DELETE FROM account WHERE id = 1"))
            holding.set()

            async def waited():
                return task.done() or await db.rows(
                    "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock' "
                    f"AND clock_timestamp() - query_start > interval '{LONGER} s'"
                )

            await until(waited)
        await task

    has_conflicted(manager, work)
    await beside(call, work)
    assert await db.scalar("SELECT count(*) FROM child") == 1
