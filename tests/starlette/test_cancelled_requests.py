"""A request that is cancelled, by its server or by a timeout around it, leaves nothing behind: C3, W3, W5."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os

import pytest
from sqlalchemy import text
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.responses import PlainTextResponse

from sqla_uow import UnitOfWorkManager, current_session, transactional
from tests.kit.cancelling import WAYS, Suspensions
from tests.kit.models import Account
from tests.kit.waiting import until
from tests.starlette.client import app_of, client_of
from tests.starlette.serving import first_byte, served

TIMES = 1000 if os.environ.get("SQLA_UOW_LONG") == "1" else 56
POINTS = 40
"""More suspensions than a request has; a cancellation at one that it does not reach is none."""


class Held(Suspensions):
    """Knows the tasks that were made."""

    def __init__(self, *chosen):
        super().__init__(*chosen)
        self._tasks = set()

    def _make_task(self, loop, coro, **options):
        task = super()._make_task(loop, coro, **options)
        self._tasks.add(task)
        return task

    async def end(self):
        """Return when every task has ended."""
        await asyncio.wait_for(asyncio.gather(*self._tasks, return_exceptions=True), 5)


class Inside(BaseHTTPMiddleware):
    async def dispatch(self, request, call_next):
        return await call_next(request)


async def until_quiet(db, engine):
    """Return when nothing is checked out, and no session of the server is in a transaction."""

    async def quiet():
        return not engine.pool.checkedout() and all(state in ("idle", None) for _, state in await db.sessions())

    await until(quiet, seconds=5)


@pytest.fixture
async def engine(db):
    """An engine over one account; asyncpg 0.32 forgets a future when it is cancelled while it asks for TLS."""
    await db.run("INSERT INTO account (id, balance) VALUES (1, 10)")
    connect_args = {"ssl": False} if db.driver == "asyncpg" else {}
    return db.engine(pool_size=1, max_overflow=0, pool_timeout=5, connect_args=connect_args)


@pytest.mark.timeout(600 if TIMES == 1000 else 60)
async def test_cancelled_anywhere_it_leaves_nothing(db, engine):
    """C3: in seven ways, at every suspension: 0 checked out, 0 in a transaction; a success was really committed."""
    manager, answered, struck = UnitOfWorkManager(engine), 0, 0

    async def endpoint(request):
        account = await current_session().get_one(Account, 1)
        if request.query_params["atomic"]:
            account.balance += 1
        else:
            await add_one()
        return PlainTextResponse("done")

    @transactional
    async def add_one():
        (await current_session().get_one(Account, 1)).balance += 1

    apps = [
        (atomic, app_of(manager, endpoint, inside=inside, atomic=bool(atomic)))
        for inside in ([], [Middleware(Inside)])
        for atomic in ("", "1")
    ]
    cases = itertools.cycle(itertools.product(range(1, POINTS), WAYS.values(), apps))
    for at, way, (atomic, app) in itertools.islice(cases, 0, TIMES * 19, 19):
        async with engine.connect():  # to be cancelled while it connects is the driver's affair
            pass
        points = Held(at)

        async def call(app=app, atomic=atomic):
            nonlocal answered
            async with client_of(app, raise_app_exceptions=True) as client:
                response = await client.get(f"/endpoint?atomic={atomic}")
            answered += response.status_code == 200

        with points.counted(), contextlib.suppress(asyncio.CancelledError, TimeoutError, ExceptionGroup):
            await asyncio.create_task(way(call, points))
        await points.end()
        struck += points.fired
        assert engine.pool.checkedout() == 0
    await until_quiet(db, engine)
    assert struck > TIMES / 4
    assert await db.scalar("SELECT balance FROM account") >= 10 + answered


@pytest.mark.parametrize("atomic", [False, True], ids=["default", "atomic"])
async def test_a_server_that_shuts_down_cancels(db, engine, atomic):
    """C3: with the request in the middle of its transaction: rolled back, and nothing is left."""
    reached = asyncio.Event()

    async def endpoint(request):
        await current_session().execute(text("SELECT balance FROM account"))
        if atomic:
            current_session().add(Account(id=2))
            await current_session().flush()
        reached.set()
        await asyncio.Event().wait()

    app = app_of(UnitOfWorkManager(engine), endpoint, atomic=atomic)
    async with served(app, timeout_graceful_shutdown=0.01) as (port, server):
        asking = asyncio.create_task(first_byte(port, b"GET /endpoint HTTP/1.1\r\nHost: a\r\n\r\n"))
        await reached.wait()
        assert engine.pool.checkedout() == 1
        server.should_exit = True
        byte, _, writer = await asking
        writer.close()
    await until_quiet(db, engine)
    assert byte in (b"", b"H")  # uvicorn may answer 500 for what it has cancelled
    assert await db.scalar("SELECT count(*) FROM account") == 1


async def test_a_client_that_disconnects(db, engine):
    """W4: the application hears of it after the replayed body, and what it makes of that is rolled back."""
    reached, ended = asyncio.Event(), asyncio.Event()

    async def endpoint(request):
        await request.body()
        current_session().add(Account(id=2))
        await current_session().flush()
        reached.set()
        while (await request.receive())["type"] != "http.disconnect":
            pass
        ended.set()
        return PlainTextResponse("nobody reads this", 499)

    app = app_of(UnitOfWorkManager(engine), endpoint, atomic=True, retries=5)
    async with served(app) as (port, _):
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /endpoint HTTP/1.1\r\nHost: a\r\n\r\n")
        await reached.wait()
        writer.close()
        await asyncio.wait_for(ended.wait(), 5)
    await until_quiet(db, engine)
    assert await db.scalar("SELECT count(*) FROM account") == 1
