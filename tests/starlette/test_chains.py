"""The session behind and around other middlewares, in endpoints of every kind, and shared by siblings (S3)."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from starlette.applications import Starlette
from starlette.endpoints import HTTPEndpoint
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route

from sqla_uow import UnitOfWorkManager, current_session, transactional
from sqla_uow.errors import NoUnitError, TaskBoundaryError
from sqla_uow_starlette import UnitOfWorkMiddleware
from tests.kit.models import Account
from tests.kit.waiting import until_free
from tests.starlette.client import client_of
from tests.starlette.serving import served

pytestmark = pytest.mark.drivers("sqlite", "asyncpg")


class Reading(BaseHTTPMiddleware):
    """Reads before and after the application inside, or only after it."""

    def __init__(self, app, *, log, before=True):
        super().__init__(app)
        self.log = log
        self.before = before

    async def dispatch(self, request, call_next):
        if self.before:
            self.log.append((await current_session().get_one(Account, 1)).balance)
        response = await call_next(request)
        self.log.append(await self.after())
        return response

    async def after(self):
        try:
            return (await current_session().get_one(Account, 1)).balance
        except NoUnitError:
            return "ended"


class Passing(BaseHTTPMiddleware):
    """Does nothing, in a task of its own."""

    async def dispatch(self, request, call_next):
        return await call_next(request)


@transactional
async def deposit(amount):
    """Write."""
    account = await current_session().get_one(Account, 1)
    account.balance += amount
    return account.balance


def behind(manager, log):
    """Return the middlewares: one outside, ours, two stacked inside, of which the inner one only reads afterwards."""
    return [
        Middleware(Passing),
        Middleware(UnitOfWorkMiddleware, manager=manager),
        Middleware(Reading, log=log),
        Middleware(Reading, log=log, before=False),
    ]


async def test_stacked_basehttpmiddlewares_share_the_session(db):
    """S3: each runs the application inside in a child task; a response that has not left yet is no end for them."""
    await db.run("INSERT INTO account (id, balance) VALUES (1, 10)")
    engine, log = db.engine(), []

    async def endpoint(request):
        before = (await current_session().get_one(Account, 1)).balance
        await deposit(5)
        # This task stays the last that used the read session, and lives on until the response has left.
        return PlainTextResponse(f"{before} {(await current_session().get_one(Account, 1)).balance}")

    app = Starlette(routes=[Route("/", endpoint)], middleware=behind(UnitOfWorkManager(engine), log))
    async with client_of(app, raise_app_exceptions=True) as http:
        assert (await http.get("/")).text == "10 15"
    assert log == [10, 15, 15]
    assert engine.pool.checkedout() == 0
    assert await db.scalar("SELECT balance FROM account") == 15


async def test_gather_is_refused_and_the_pool_is_whole(db):
    """S3: three requests at once whose siblings share a session, on a cold pool of three, leave 0 of 3 checked out."""
    await db.run("INSERT INTO account (id, balance) VALUES (1, 10), (2, 10)")
    engine = db.engine(pool_size=3, max_overflow=0, pool_timeout=5)
    manager = UnitOfWorkManager(engine)

    async def endpoint(request):
        session = current_session()
        await asyncio.gather(session.get(Account, 1), session.get(Account, 2))
        return PlainTextResponse("done")

    async def explain(request, error):
        return PlainTextResponse(str(error), 500)

    app = Starlette(
        routes=[Route("/", endpoint)],
        middleware=[Middleware(UnitOfWorkMiddleware, manager=manager)],
        exception_handlers={TaskBoundaryError: explain},
    )
    async with served(app) as (port, _), httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http:
        answers = await asyncio.gather(*(http.get("/") for _ in range(3)))
    for answer in answers:
        assert answer.status_code == 500
        assert answer.text.startswith("the read session of this scope was used by task ")
        assert answer.text.endswith(
            "await one after the other, or give each task its own unit with propagation='requires_new'"
        )
    await until_free(engine)
    with manager.activate():  # all three connections still serve
        await asyncio.gather(*(transactional(_read)() for _ in range(3)))
    assert engine.pool.checkedout() == 0


async def _read():
    return await current_session().get_one(Account, 1)


async def test_endpoints_of_every_kind(db):
    """W2: the decorator on a function, on an HTTPEndpoint's method and in a mounted application; a thread is told."""
    await db.run("INSERT INTO account (id, balance) VALUES (1, 0)")
    engine = db.engine()

    @transactional
    async def function(request):
        return PlainTextResponse(str(await deposit(1)))

    class Method(HTTPEndpoint):
        @transactional
        async def get(self, request):
            return PlainTextResponse(str(await deposit(1)))

    def sync(request):
        with pytest.raises(TaskBoundaryError) as caught:
            current_session()
        return PlainTextResponse(str(caught.value))

    inner = Starlette(routes=[Route("/", function)])
    app = Starlette(
        routes=[Route("/function", function), Route("/method", Method), Route("/sync", sync), Mount("/inner", inner)],
        middleware=[Middleware(UnitOfWorkMiddleware, manager=UnitOfWorkManager(engine))],
    )
    async with client_of(app, raise_app_exceptions=True) as http:
        assert [(await http.get(path)).text for path in ("/function", "/method", "/inner/")] == ["1", "2", "3"]
        assert (await http.get("/sync")).text == (
            "the read session of this scope was used from a thread other than the one of its event loop; "
            "read beforehand what the thread needs, or open a unit inside it"
        )
    assert await db.scalar("SELECT balance FROM account") == 3
    assert engine.pool.checkedout() == 0
