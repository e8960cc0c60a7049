"""Requests that are cancelled: nothing stays checked out, nothing idle in its transaction (C3)."""

from __future__ import annotations

import asyncio
import os
import random

import anyio
import httpx
import pytest
from sqlalchemy import text
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from sqla_uow import UnitOfWorkManager, after_commit, before_commit, current_session, transactional
from sqla_uow_starlette import UnitOfWorkMiddleware
from tests.kit.models import Account
from tests.kit.waiting import until, until_free
from tests.starlette.client import client_of
from tests.starlette.serving import served

pytestmark = pytest.mark.drivers("sqlite", "asyncpg", "psycopg")

ROUNDS = 1000 if os.environ.get("SQLA_UOW_LONG") else 50
MODES = pytest.mark.parametrize("atomic", [False, True], ids=["default", "atomic"])


class Passing(BaseHTTPMiddleware):
    """Runs the application in a child task."""

    async def dispatch(self, request, call_next):
        return await call_next(request)


class Bank:
    """An application whose endpoint reads, writes, and may wait in its unit.

    Attributes:
        hooks: the accounts whose after_commit hook ran.
    """

    def __init__(self, manager, *, atomic, around=(), waits=None):
        self.hooks = []
        self.waiting = asyncio.Event()
        self._waits = waits
        ours = Middleware(UnitOfWorkMiddleware, manager=manager, atomic=atomic)
        self.app = Starlette(
            routes=[Route("/{number:int}", self._endpoint)], middleware=[*around, ours, Middleware(Passing)]
        )

    async def _endpoint(self, request):
        await current_session().execute(text("SELECT 1"))
        await transactional(self._open)(request.path_params["number"])
        return PlainTextResponse("done", 201)

    async def _open(self, number):
        current_session().add(Account(id=number))
        after_commit(self.hooks.append, number)
        await current_session().flush()
        if self._waits is not None:
            self.waiting.set()
            await self._waits.wait()


async def nothing_is_left(db, engine):
    """Assert that no connection is lent, and that the server sees no open transaction."""
    await until_free(engine)
    await until(db.is_idle)


class Deadline:
    """Cancels the application inside after some time, with anyio.

    Attributes:
        cut: how many requests it has cancelled.
    """

    cut = 0

    def __init__(self, app, *, random):
        self.app = app
        self._random = random

    async def __call__(self, scope, receive, send):
        with anyio.move_on_after(self._random.uniform(0, 0.02)) as limit:
            await self.app(scope, receive, send)
        if limit.cancelled_caught:
            type(self).cut += 1


@MODES
@pytest.mark.timeout(600)
async def test_an_anyio_timeout_around_the_application(db, atomic):
    """C3: wherever it strikes; each row is there exactly if its hook ran, and a success only if the row is there."""
    engine = db.engine(pool_size=3, max_overflow=0, pool_timeout=30)

    class Counted(Deadline):
        cut = 0

    seeded = random.Random(ROUNDS)  # no secret
    bank = Bank(UnitOfWorkManager(engine), atomic=atomic, around=[Middleware(Counted, random=seeded)])
    succeeded = set()

    async def request(number):
        async with client_of(bank.app) as http:
            try:
                response = await http.get(f"/{number}")
            except (RuntimeError, AssertionError):  # httpx's transport, where no response was made at all
                return
            if response.status_code == 201:
                succeeded.add(number)

    for number in range(1, ROUNDS + 1, 2):
        await asyncio.gather(request(number), request(number + 1))
    await nothing_is_left(db, engine)
    there = {row[0] for row in await db.rows("SELECT id FROM account")}
    assert Counted.cut > 0
    assert succeeded <= there
    assert set(bank.hooks) == there
    assert len(bank.hooks) == len(there)


@MODES
async def test_the_server_shuts_down_under_a_request(db, atomic):
    """C3: uvicorn cancels what has not ended within its grace; the unit is rolled back."""
    engine = db.engine()
    bank = Bank(UnitOfWorkManager(engine), atomic=atomic, waits=asyncio.Event())
    async with httpx.AsyncClient() as http:
        async with served(bank.app, timeout_graceful_shutdown=0) as (port, _):
            request = asyncio.create_task(http.get(f"http://127.0.0.1:{port}/1"))
            await bank.waiting.wait()
            assert engine.pool.checkedout() == 1
        answers = await asyncio.gather(request, return_exceptions=True)
    assert [getattr(answer, "status_code", None) for answer in answers] in ([500], [None])
    await nothing_is_left(db, engine)
    assert await db.scalar("SELECT count(*) FROM account") == 0
    assert bank.hooks == []


@MODES
async def test_a_client_that_leaves_in_the_middle_stops_nothing(db, atomic):
    """C3: an ASGI server tells, and cancels nothing: the request ends by itself, and nothing is left of it."""
    engine = db.engine()
    go_on = asyncio.Event()
    bank = Bank(UnitOfWorkManager(engine), atomic=atomic, waits=go_on)
    async with served(bank.app) as (port, _):
        async with httpx.AsyncClient() as http:
            request = asyncio.create_task(http.get(f"http://127.0.0.1:{port}/1"))
            await bank.waiting.wait()
            request.cancel()
            await asyncio.wait({request})
        go_on.set()
        await nothing_is_left(db, engine)
    rows = await db.scalar("SELECT count(*) FROM account")
    assert (rows, bank.hooks) in [(0, []), (1, [1])]


class Impatient:
    """Answers with a status of its own where the application inside takes too long."""

    def __init__(self, app, status):
        self.app, self.status = app, status

    async def __call__(self, scope, receive, send):
        with anyio.move_on_after(0.1) as limit:
            await self.app(scope, receive, send)
        if limit.cancelled_caught:
            await PlainTextResponse("fallback", self.status)(scope, receive, send)


@pytest.mark.parametrize(("status", "answer"), [(200, (500, "Internal Server Error")), (503, (503, "fallback"))])
async def test_no_other_success_after_the_end_of_the_unit_was_cancelled(db, status, answer):
    """W3: the unit was rolled back, so a success that the application makes afterwards does not leave; an error may."""
    engine = db.engine()

    async def endpoint(request):
        current_session().add(Account(id=1))
        before_commit(asyncio.Event().wait)
        return PlainTextResponse("done", 201)

    ours = Middleware(UnitOfWorkMiddleware, manager=UnitOfWorkManager(engine), atomic=True)
    app = Starlette(routes=[Route("/", endpoint)], middleware=[ours, Middleware(Impatient, status=status)])
    async with client_of(app) as http:
        response = await http.get("/")
    assert (response.status_code, response.text) == answer
    assert await db.scalar("SELECT count(*) FROM account") == 0
    await nothing_is_left(db, engine)


async def test_a_request_cancelled_while_a_child_task_ends_its_unit(db):
    """W3: the child goes on to its end; nobody ends the unit under it."""
    engine, sent = db.engine(), []
    committing, go_on, children = asyncio.Event(), asyncio.Event(), []

    async def hold():
        committing.set()
        await go_on.wait()

    async def application(scope, receive, send):
        async def child():
            current_session().add(Account(id=1))
            before_commit(hold)
            await send({"type": "http.response.start", "status": 200, "headers": []})

        children.append(asyncio.create_task(child()))
        await committing.wait()

    async def send(message):
        sent.append(message["type"])

    ours = UnitOfWorkMiddleware(application, manager=UnitOfWorkManager(engine), atomic=True)
    scope = {"type": "http", "method": "POST", "path": "/", "headers": []}
    request = asyncio.create_task(ours(scope, None, send))
    await committing.wait()
    await asyncio.sleep(0)  # the application has returned, and the middleware waits for the child
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request
    go_on.set()
    await asyncio.wait(children)
    assert await db.scalar("SELECT count(*) FROM account") == len(sent)
    await nothing_is_left(db, engine)
