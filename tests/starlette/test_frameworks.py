"""Every kind of endpoint, application and connection: W2, W3 and W5."""

import asyncio
import contextlib
from typing import Annotated

import httpx
import pytest
from fastapi import Depends, FastAPI
from sqlalchemy import text
from starlette.applications import Starlette
from starlette.endpoints import HTTPEndpoint
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Mount, Route, WebSocketRoute
from websockets.asyncio.client import connect

from sqla_uow import UnitOfWorkManager, current_session, current_unit, errors
from sqla_uow_starlette import UnitOfWorkMiddleware, dispose_on_shutdown
from tests.kit.waiting import until_free
from tests.starlette.client import add, app_of, client_of
from tests.starlette.serving import served

MODES = pytest.mark.parametrize("atomic", [False, True], ids=["default", "atomic"])


async def count():
    """Read in whatever is current."""
    return await current_session().scalar(text("SELECT count(*) FROM account"))


@MODES
async def test_fastapi_and_its_dependencies(db, manager, atomic):
    """W2: a dependency's session is the endpoint's; a returned object is read after the commit."""
    app = FastAPI()
    app.add_middleware(UnitOfWorkMiddleware, manager=manager, atomic=atomic)

    async def counted():
        yield await count()

    @app.post("/accounts/{key}")
    async def create(key: int, before: Annotated[int, Depends(counted)]) -> dict[str, int]:
        await add(key)
        return {"before": before, "after": await count()}

    async with client_of(app) as client:
        response = await client.post("/accounts/2")
        invalid = await client.post("/accounts/none")
    assert (response.json(), invalid.status_code) == ({"before": 1, "after": 2}, 422)
    assert await db.scalar("SELECT count(*) FROM account") == 2


@MODES
async def test_http_endpoints_and_mounted_applications(db, manager, atomic):
    """W2: they see the manager, however deep."""

    class Accounts(HTTPEndpoint):
        async def post(self, request):
            await add(2)
            return JSONResponse(await count())

    inner = Starlette(routes=[Route("/accounts", Accounts)])
    middleware = [Middleware(UnitOfWorkMiddleware, manager=manager, atomic=atomic)]
    app = Starlette(routes=[Mount("/inner", inner)], middleware=middleware)
    async with client_of(app) as client:
        assert (await client.post("/inner/accounts")).json() == 2
    assert await db.scalar("SELECT count(*) FROM account") == 2


@MODES
async def test_sync_endpoints(db, manager, atomic):
    """S5: a thread cannot use the session and is told so; without it, it works."""

    def idle(request):
        return PlainTextResponse("done")

    def using(request):
        with pytest.raises(errors.TaskBoundaryError) as caught:
            current_session()
        return PlainTextResponse(str(caught.value), 400)

    async with client_of(app_of(manager, idle, using, atomic=atomic)) as client:
        assert (await client.get("/idle")).text == "done"
        assert (await client.get("/using")).text.endswith(
            " was used from a thread other than the one of its event loop; "
            "read beforehand what the thread needs, or open a unit inside it"
        )


async def fail(request):
    """Swallow the error of a statement, so that the COMMIT of this success is refused."""
    await add(2)
    with contextlib.suppress(Exception):
        await add(1)
        await current_session().flush()
    return PlainTextResponse("done")


async def test_the_innermost_applications_handler_answers_first(db, manager):
    """W3: a mounted application's handler before the one around it; its Exception handler only for what is left."""

    def answers(name):
        async def own(request, error):
            return PlainTextResponse(f"{name} {type(error).__name__}", 500)

        return own

    def app(inner_handlers, outer_handlers):
        inner = Starlette(routes=[Route("/", fail)], exception_handlers=inner_handlers)
        return Starlette(
            routes=[Mount("/inner", inner)],
            middleware=[Middleware(UnitOfWorkMiddleware, manager=manager, atomic=True)],
            exception_handlers=outer_handlers,
        )

    own = errors.RollbackOnlyError
    for inner, outer, expected in [
        ({own: answers("inner")}, {own: answers("outer")}, "inner RollbackOnlyError"),
        ({}, {errors.UnitOfWorkError: answers("outer"), Exception: answers("general")}, "outer RollbackOnlyError"),
        ({}, {Exception: answers("general")}, "general RollbackOnlyError"),
        ({}, {500: answers("status")}, "status RollbackOnlyError"),
        ({}, {}, "Internal Server Error"),
    ]:
        async with client_of(app(inner, outer)) as client:
            response = await client.get("/inner/")
        assert (response.status_code, response.text) == (500, expected)
    assert await db.scalar("SELECT count(*) FROM account") == 1


async def test_around_the_whole_application(db, manager):
    """W3: as the outermost layer it finds the application's handlers, its general ones and its debug page, too."""

    async def own(request, error):
        return PlainTextResponse(f"own {type(error).__name__}", 500)

    for options, expected in [
        ({"exception_handlers": {errors.RollbackOnlyError: own}}, "own RollbackOnlyError"),
        ({"exception_handlers": {Exception: own}}, "own RollbackOnlyError"),
        ({"debug": True}, "sqla_uow.errors.RollbackOnlyError"),
    ]:
        app = UnitOfWorkMiddleware(Starlette(routes=[Route("/", fail)], **options), manager=manager, atomic=True)
        async with client_of(app) as client:
            response = await client.get("/")
        assert response.status_code == 500
        assert expected in response.text


@MODES
async def test_stacked_base_http_middlewares(db, manager, atomic):
    """S3: two inside and one outside; the session before and after call_next, one of them only after."""
    seen = []

    class Outside(BaseHTTPMiddleware):
        async def dispatch(self, request, call_next):
            response = await call_next(request)
            seen.append("outside")
            return response

    class Both(BaseHTTPMiddleware):
        async def dispatch(self, request, call_next):
            seen.append(await count())
            response = await call_next(request)
            seen.append(await count())
            return response

    class After(BaseHTTPMiddleware):
        async def dispatch(self, request, call_next):
            response = await call_next(request)
            seen.append(await count())
            return response

    async def endpoint(request):
        await add(int(request.query_params["key"]))
        return JSONResponse(await count())

    for key, inside in enumerate(([Both, After], [After, Both]), 2):
        app = app_of(
            manager, endpoint, around=[Middleware(Outside)], inside=[Middleware(one) for one in inside], atomic=atomic
        )
        async with client_of(app, raise_app_exceptions=True) as client:
            assert (await client.get(f"/endpoint?key={key}")).json() == key
    assert seen == [1, 2, 2, "outside", 2, 3, 3, "outside"]
    assert await db.scalar("SELECT count(*) FROM account") == 3


@MODES
async def test_gather_on_the_session_is_an_error_and_the_pool_is_whole(db, atomic):
    """S3: three such requests on a cold pool of three leave 0 of 3 checked out."""
    manager = UnitOfWorkManager(db.engine(pool_size=3, max_overflow=0, pool_timeout=2))

    async def endpoint(request):
        session = current_session()
        await asyncio.gather(*(session.scalar(text("SELECT 1")) for _ in range(3)))

    async def own(request, error):
        return PlainTextResponse("refused", 500)

    app = app_of(manager, endpoint, atomic=atomic, exception_handlers={errors.TaskBoundaryError: own})
    async with client_of(app) as client:
        answers = await asyncio.gather(*(client.get("/endpoint") for _ in range(3)))
    assert [answer.text for answer in answers] == ["refused"] * 3
    assert manager.engine.pool.checkedout() == 0


async def test_websocket_holds_no_transaction_between_messages(db, manager):
    """W5: the scope reads, each message is a unit of its own, and while it waits nothing is checked out."""
    waiting = []

    async def feed(websocket):
        await websocket.accept()
        async for message in websocket.iter_text():
            before = await count()
            await add(int(message))
            waiting.append(current_unit().read_only)
            await websocket.send_json([before, await count()])

    app = Starlette(
        routes=[WebSocketRoute("/feed", feed)],
        middleware=[Middleware(UnitOfWorkMiddleware, manager=manager, atomic=True)],
    )
    async with served(app) as (port, _), connect(f"ws://127.0.0.1:{port}/feed") as websocket:
        for key in (2, 3):
            await websocket.send(str(key))
            assert await websocket.recv() == f"[{key - 1},{key}]"
            await until_free(manager.engine)
    assert waiting == [True, True]
    assert await db.scalar("SELECT count(*) FROM account") == 3


async def test_lifespan_passes_and_the_engine_ends_with_it(db):
    """W5: startup and shutdown reach the application; at the end no connection is left."""
    manager = UnitOfWorkManager(db.engine())
    seen = []

    @contextlib.asynccontextmanager
    async def own(app):
        async with manager.begin() as unit:
            seen.append(await unit.session.scalar(text("SELECT 1")))
        yield {"given": "state"}
        seen.append(manager.engine.pool.checkedin())

    async def endpoint(request):
        return JSONResponse([request.state.given, await count()])

    app = app_of(manager, endpoint, lifespan=dispose_on_shutdown(manager, lifespan=own))
    async with served(app) as (port, _), httpx.AsyncClient() as client:
        assert (await client.get(f"http://127.0.0.1:{port}/endpoint")).json() == ["state", 0]
    assert seen == [1, 1]
    assert manager.engine.pool.checkedin() == 0
