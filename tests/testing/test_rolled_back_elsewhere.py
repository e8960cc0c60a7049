"""`rolled_back` and another event loop, and beside another worker of the same database."""

from __future__ import annotations

import asyncio
import threading

import pytest
from sqlalchemy import text
from sqlalchemy.exc import OperationalError
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from sqla_uow import RetryPolicy, UnitOfWorkManager, current_session, errors, transactional
from sqla_uow.testing import rolled_back
from sqla_uow_starlette import UnitOfWorkMiddleware
from tests.kit.models import Account, Note
from tests.kit.waiting import until
from tests.starlette.pages import client

bound = pytest.mark.drivers("asyncpg", "asyncmy", "aiomysql")
CURE = (
    "; use httpx.AsyncClient with ASGITransport(app) instead of the sync TestClient, one loop_scope for fixtures and tests, and "
    "poolclass=NullPool for an engine that outlives a test"
)


@transactional(retries=2)
async def write():
    """Write a note."""
    current_session().add(Note(text="x"))


def in_a_loop_of_its_own(work):
    """Run it there, in a thread of its own, and return what it raised."""
    raised = []

    def run():
        try:
            asyncio.run(work())
        except Exception as error:  # noqa: BLE001  # for the test to look at
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return raised


async def test_the_sync_test_client(db):
    """It runs the application in a loop of its own: works where the driver lets it, else one clear error; the test goes on."""

    async def post(_request):
        await write()
        return PlainTextResponse("")

    async with rolled_back(UnitOfWorkManager(db.engine())) as manager:
        app = Starlette(
            routes=[Route("/", post, methods=["POST"])], middleware=[Middleware(UnitOfWorkMiddleware, manager=manager)]
        )
        answers = []

        async def send():  # as Starlette's TestClient does
            async with client(app) as http:
                answers.append((await http.post("/")).status_code)

        raised = in_a_loop_of_its_own(send)
        if db.driver in ("sqlite", "psycopg"):
            assert (answers, raised) == ([200], [])
        else:
            assert [type(error) for error in raised] == [errors.TaskBoundaryError]
            assert str(raised[0]) == f"rolled_back() has begun in another event loop{CURE}"
        before = 1 if db.driver in ("sqlite", "psycopg") else 0
        await write()
        async with manager.begin() as unit:
            assert await unit.session.scalar(text("SELECT count(*) FROM note")) == before + 1
    assert await db.scalar("SELECT count(*) FROM note") == 0


@bound
async def test_an_engine_that_outlives_a_loop(db):
    """Its pool has a connection of the loop before: one clear error."""
    engine = db.engine()

    async def use():
        async with engine.connect() as connection:
            await connection.execute(text("SELECT 1"))

    async def roll_back():
        async with rolled_back(engine):
            pass

    await use()
    (error,) = in_a_loop_of_its_own(roll_back)
    assert type(error) is errors.TaskBoundaryError
    assert str(error) == f"the engine's pool has given rolled_back() a connection of another event loop{CURE}"


@bound
async def test_an_engine_without_a_pool_outlives_a_loop(db):
    """The cure that is named."""
    from sqlalchemy.pool import NullPool  # noqa: PLC0415  # of this one

    engine = db.engine(poolclass=NullPool)

    async def work():
        async with rolled_back(UnitOfWorkManager(engine)):
            await write()

    await work()
    assert in_a_loop_of_its_own(work) == []


@pytest.mark.drivers("asyncmy", "aiomysql")
async def test_a_deadlock_with_another_worker(db):
    """MariaDB ends the whole transaction, and the attempts that follow are told why, and what to do."""
    await db.run("INSERT INTO account (id, balance) VALUES (1, 0), (2, 0)")
    engine = db.engine()
    async with rolled_back(UnitOfWorkManager(engine, retries=3, retry=RetryPolicy(base=0, cap=0))) as manager:

        @transactional(using=manager)
        async def change():
            one = await current_session().get_one(Account, 1)
            one.balance = 1
            await current_session().flush()
            other.set()
            await current_session().execute(text("UPDATE account SET balance = 2 WHERE id = 2"))

        other, raised = asyncio.Event(), None
        async with db.outside() as connection:
            # More rows than ours, so that ours is the one that is given up.
            await connection.execute(text("UPDATE account SET balance = balance + 1 WHERE id = 2"))
            for number in range(10, 30):
                await connection.execute(text(f"INSERT INTO account (id, balance) VALUES ({number}, 0)"))
            changing = asyncio.create_task(change())
            await other.wait()
            await until(db.waiting)
            waiting = asyncio.create_task(connection.execute(text("UPDATE account SET balance = 3 WHERE id = 1")))
            await asyncio.wait({changing})
            await waiting
            raised = changing.exception()
    assert type(raised) is errors.PropagationError
    assert str(raised) == (
        "MariaDB has ended the transaction of rolled_back() by 1213, a deadlock with another connection, and with it what the "
        "test wrote; where tests run side by side, as with pytest-xdist, give each worker a database of its own"
    )


@pytest.mark.drivers("sqlite")
async def test_another_worker_writes_to_the_file(db):
    """SQLite has one writer: the error of the database, with what to do."""
    async with rolled_back(db.engine()):
        with pytest.raises(OperationalError, match="database is locked") as raised:
            async with rolled_back(db.engine(connect_args={"timeout": 0.1})):
                pass
    (note,) = raised.value.__notes__
    assert note == (
        "sqla_uow: rolled_back() waited for SQLite's one writer; where tests run side by side, as with pytest-xdist, give "
        "each worker a file of its own"
    )
