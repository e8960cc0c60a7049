"""With uvicorn: a WebSocket connection, and the engine's end with the application (W5)."""

from __future__ import annotations

import httpx
import pytest
from sqlalchemy import text
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.routing import Route, WebSocketRoute
from websockets.asyncio.client import connect

from sqla_uow import UnitOfWorkManager, current_session, transactional
from sqla_uow_starlette import UnitOfWorkMiddleware, dispose_on_shutdown
from tests.kit.models import Account
from tests.kit.waiting import until_free
from tests.starlette.serving import served

pytestmark = pytest.mark.drivers("sqlite", "asyncpg")

MODES = pytest.mark.parametrize("atomic", [False, True], ids=["default", "atomic"])


@transactional
async def open_account(number):
    """Write."""
    current_session().add(Account(id=number))


def app_of(manager, *routes, lifespan=None, **options):
    """Return an application behind the middleware."""
    middleware = [Middleware(UnitOfWorkMiddleware, manager=manager, **options)]
    return Starlette(routes=routes, middleware=middleware, lifespan=lifespan)


@MODES
async def test_each_message_of_a_websocket_is_a_unit_of_its_own(db, atomic):
    """W5: between messages no connection is checked out, though the application reads in each."""
    engine = db.engine()
    waiting = []

    async def feed(websocket):
        await websocket.accept()
        while True:
            waiting.append(engine.pool.checkedout())
            message = await websocket.receive()
            if message["type"] == "websocket.disconnect":
                return
            await open_account(int(message["text"]))
            count = await current_session().scalar(text("SELECT count(*) FROM account"))
            await websocket.send_text(f"{count} {engine.pool.checkedout()}")

    app = app_of(UnitOfWorkManager(engine), WebSocketRoute("/", feed), atomic=atomic)
    async with served(app) as (port, _):
        async with connect(f"ws://127.0.0.1:{port}/") as websocket:
            for number in (1, 2, 3):
                await websocket.send(str(number))
                assert await websocket.recv() == f"{number} 1"
                await until_free(engine)  # the application waits for the next message
                assert await db.scalar("SELECT count(*) FROM account") == number
        await until_free(engine)


async def test_the_engine_ends_with_the_application(db):
    """W5: lifespan passes through, the application's own runs inside, and then the pool is empty."""
    engine = db.engine()
    manager = UnitOfWorkManager(engine)

    async def create(request):
        await open_account(1)
        return PlainTextResponse("done")

    app = app_of(manager, Route("/", create), lifespan=dispose_on_shutdown(manager))
    pools = [engine.pool]
    async with (
        served(app, lifespan="on") as (port, _),
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http,
    ):
        assert (await http.get("/")).text == "done"
        pools.append(engine.pool)
        assert engine.pool.checkedin() == 1
    assert pools[0] is pools[1]
    assert engine.pool is not pools[0]
    assert pools[0].checkedin() == 0
