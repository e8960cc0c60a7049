"""Reads of the read session are answered as writes are when the database is away: 503, not 500."""

from __future__ import annotations

import gc

import pytest
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Mount, Route

from sqla_uow import UnitOfWorkManager, current_session
from sqla_uow_starlette import UnitOfWorkMiddleware, exception_handlers
from tests.servers import Proxy
from tests.starlette.client import client_of

pytestmark = [
    pytest.mark.drivers("asyncpg", "psycopg", "asyncmy", "aiomysql"),
    # aiomysql cannot close a dead connection, and complains when that is collected.
    pytest.mark.filterwarnings(
        "ignore:Exception ignored in. <function Connection:pytest.PytestUnraisableExceptionWarning"
    ),
]


@pytest.fixture
async def proxy(db):
    """Between the engines and the server."""
    with Proxy("127.0.0.1", db.port) as proxy:
        yield proxy
        proxy.forward_all()
        await db.dispose()
    gc.collect()


class Passing(BaseHTTPMiddleware):
    async def dispatch(self, request, call_next):
        return await call_next(request)


@pytest.mark.parametrize("where", ["app", "mounted", "behind", "no handlers"])
@pytest.mark.parametrize("phase", ["connecting", "reading"])
async def test_the_database_goes_away(db, proxy, where, phase):
    """At the first statement, and after something was read; wherever the endpoint stands."""

    async def endpoint(request):
        if phase == "reading":
            await current_session().scalar(text("SELECT 1"))
            proxy.cut()
        proxy.refuse()
        await current_session().scalar(text("SELECT 2"))
        return PlainTextResponse("read")

    routes = [Route("/", endpoint)]
    engine = db.engine(port=proxy.port)
    own = Middleware(UnitOfWorkMiddleware, manager=UnitOfWorkManager(engine))
    app = Starlette(
        routes=[Mount("/", Starlette(routes=routes))] if where == "mounted" else routes,
        middleware=[own, Middleware(Passing)] if where == "behind" else [own],
        exception_handlers=None if where == "no handlers" else exception_handlers,
    )
    async with client_of(app) as client:
        response = await client.get("/")
        assert (response.status_code, response.json()["code"]) == (503, "database-unavailable")
        assert response.headers["retry-after"] == "1"
        proxy.forward_all()
    assert engine.pool.checkedout() == 0


async def test_handlers_of_ones_own_come_first(db, proxy):
    """What the application answers itself stays its answer."""

    async def mine(request, error):
        return PlainTextResponse(type(error).__name__, 418)

    async def endpoint(request):
        await current_session().scalar(text("SELECT 1"))
        proxy.cut()
        await current_session().scalar(text("SELECT 2"))

    app = Starlette(
        routes=[Route("/", endpoint)],
        middleware=[Middleware(UnitOfWorkMiddleware, manager=UnitOfWorkManager(db.engine(port=proxy.port)))],
        exception_handlers={**exception_handlers, SQLAlchemyError: mine, OSError: mine},
    )
    async with client_of(app) as client:
        assert (await client.get("/")).status_code == 418


@pytest.mark.parametrize("started", [False, True])
async def test_what_is_no_outage_of_the_database_is_not_answered(db, proxy, started):
    """A refused connection of somebody else's, and a failure behind the start of the response, stay what they are."""

    async def body():
        yield "begun"
        raise OSError("in the stream")

    async def endpoint(request):
        await current_session().scalar(text("SELECT 1"))
        if started:
            return StreamingResponse(body())
        raise ConnectionRefusedError("of another service")

    app = Starlette(
        routes=[Route("/", endpoint)],
        middleware=[Middleware(UnitOfWorkMiddleware, manager=UnitOfWorkManager(db.engine(port=proxy.port)))],
        exception_handlers=exception_handlers,
    )
    async with client_of(app, raise_app_exceptions=True) as client:
        with pytest.raises(OSError, match="in the stream" if started else "of another service"):
            await client.get("/")
