"""R14: requests that are transactions take turns by route, when they send SQL, and only those of routes in conflict."""

from __future__ import annotations

import asyncio

import pytest
from sqlalchemy import text
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from sqla_uow import UnitOfWorkManager, current_session
from sqla_uow._retry.gate import ANY
from sqla_uow_starlette import UnitOfWorkMiddleware
from tests.kit.queueing import narrow
from tests.kit.waiting import until
from tests.starlette.client import client_of

pytestmark = pytest.mark.drivers("sqlite", "asyncpg")


async def sends_sql(_request):
    """Answer with what the database says."""
    return PlainTextResponse(str(await current_session().scalar(text("SELECT 1"))))


async def sends_nothing(request):
    """Answer without the database, if the client says so."""
    return PlainTextResponse("none") if "none" in request.query_params else await sends_sql(request)


@pytest.fixture
def manager(db):
    """Return one over a fresh database."""
    return UnitOfWorkManager(db.engine(pool_size=4))


@pytest.fixture
async def client(manager):
    """Return one of an application whose requests are transactions."""
    routes = [
        Route("/hot/{id}", sends_nothing, methods=["GET", "POST"]),
        Route("/cold/{id}", sends_sql, methods=["POST"]),
    ]
    middleware = Middleware(UnitOfWorkMiddleware, manager=manager, atomic=True, retries=5, read_only_methods=["GET"])
    async with client_of(Starlette(routes=routes, middleware=[middleware])) as client:
        yield client


async def test_only_the_route_in_conflict_waits(manager, client):
    """Another route, one that only reads, and one that sends no SQL are answered while the turn is taken."""
    gate = narrow(manager, "POST /hot/{id}")
    assert gate.try_enter(ANY)
    waits = asyncio.create_task(client.post("/hot/1"))
    await until(lambda: manager.contention("POST /hot/{id}").waiting == 1, seconds=5, pause=0)
    async with asyncio.timeout(1.5):  # a stall lets the next one in after two seconds
        assert (await client.post("/cold/1")).text == "1"
        assert (await client.get("/hot/1")).text == "1"
        assert (await client.post("/hot/2?none")).text == "none"
    assert not waits.done()
    assert manager.engine.pool.checkedout() == 0  # who waits holds no connection
    gate.left(0.0, 0.0, ANY, committed=True)
    assert (await waits).text == "1"
    assert manager.contention("POST /hot/{id}")[1:3] == (0, 0)


async def test_a_request_that_is_cancelled_while_it_waits_holds_nothing(manager, client):
    """The turn that it waited for is the next one's."""
    gate = narrow(manager, "POST /hot/{id}")
    assert gate.try_enter(ANY)
    waits = asyncio.create_task(client.post("/hot/1"))
    await until(lambda: manager.contention("POST /hot/{id}").waiting == 1, seconds=5, pause=0)
    waits.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waits
    gate.left(0.0, 0.0, ANY, committed=True)
    async with asyncio.timeout(1.5):
        assert (await client.post("/hot/1")).text == "1"
    assert gate.state()[1:3] == (0, 0)
