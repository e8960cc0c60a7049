"""A conflict replays the request: W4."""

from __future__ import annotations

import asyncio
import logging

import pytest
from sqlalchemy.exc import SQLAlchemyError
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route

from sqla_uow import Status, UnitOfWorkManager, current_session, current_unit, errors
from sqla_uow_starlette import UnitOfWorkMiddleware
from tests.kit.troubles import BusyAtCommit, MariaDBDeadlock, WriteSkewAtCommit
from tests.starlette.client import client_of

AT_COMMIT = {"postgresql": WriteSkewAtCommit, "sqlite": BusyAtCommit, "mysql": MariaDBDeadlock}


def app_of(trouble, endpoint, *, engine=None, middleware=(), exception_handlers=None, **options):
    """Return an application that retries, and its engine."""
    engine = engine or trouble.engine()
    own = Middleware(
        UnitOfWorkMiddleware, manager=UnitOfWorkManager(engine), atomic=True, isolation=trouble.isolation,
        **{"retries": 5, **options},
    )  # fmt: skip
    routes = [Route("/", endpoint, methods=["GET", "POST"])]
    return Starlette(routes=routes, middleware=[*middleware, own], exception_handlers=exception_handlers)


@pytest.mark.parametrize("how", ["raised", "handled", "swallowed"])
async def test_every_trouble_is_replayed_however_it_is_answered(db, kind, how):
    """W4: asked of the unit: raised, turned into a response by a handler, or swallowed by the endpoint itself."""
    await db.run(
        "INSERT INTO account (id, balance) VALUES (1, 0), (2, 0)",
        "INSERT INTO versioned (id, value, version) VALUES (1, 0, 1)",
    )
    trouble, bodies = kind(db), []

    async def own(request, error):
        return PlainTextResponse("my own", 500)

    async def endpoint(request):
        bodies.append(await request.body())
        await trouble.settle()
        if len(bodies) == 3:
            await trouble.write(current_session())
            return PlainTextResponse("done")
        try:
            await trouble.strike(current_session())
        except Exception as error:
            if how != "swallowed":
                raise
            return await own(request, error)
        return PlainTextResponse("done")

    handlers = {errors.UnitOfWorkError: own, SQLAlchemyError: own} if how == "handled" else None
    async with client_of(app_of(trouble, endpoint, exception_handlers=handlers)) as client:
        response = await client.post("/", content=b"body")
    await trouble.settle()
    assert (response.status_code, bodies, trouble.struck) == (200, [b"body"] * 3, 2)
    assert await db.scalar("SELECT count(*) FROM note") == 1


async def test_state_is_fresh_in_each_attempt_and_the_last_one_is_written_back(trouble):
    """W4: what an attempt puts into `state` and `session` is not seen by the next; the last one's is, outside."""
    seen, outside = [], []

    class Around:
        def __init__(self, app):
            self.app = app

        async def __call__(self, scope, receive, send):
            if scope["type"] == "http":
                scope["state"] = {"given": 1}
                scope["session"] = {"basket": []}

            async def look(message):
                outside.append((scope["state"].get("attempt"), scope["session"]))
                await send(message)

            await self.app(scope, receive, look)
            outside.append(scope["endpoint"])

    async def endpoint(request):
        await trouble.settle()
        seen.append((dict(request.scope["state"]), str(request.session)))
        request.state.attempt = current_unit().attempt
        request.session["basket"].append(len(seen))
        if len(seen) < 3:
            await trouble.strike(current_session())
        return PlainTextResponse("done")

    async with client_of(app_of(trouble, endpoint, middleware=[Middleware(Around)])) as client:
        response = await client.get("/")
    assert response.status_code == 200
    assert seen == [({"given": 1}, "{'basket': []}")] * 3
    assert outside == [(3, {"basket": [3]})] * 2 + [endpoint]


async def test_the_last_attempts_own_answer_leaves(trouble):
    """W4: when the retries are used up, what the application has made of the conflict is the answer."""
    runs = []

    async def endpoint(request):
        await trouble.settle()
        runs.append(1)
        try:
            await trouble.strike(current_session())
        except Exception:  # noqa: BLE001  # as an endpoint may
            return PlainTextResponse(f"mine {len(runs)}", 500)

    async with client_of(app_of(trouble, endpoint, retries=2)) as client:
        response = await client.get("/")
    assert (response.status_code, response.text) == (500, "mine 3")


@pytest.mark.parametrize(("limit", "runs"), [(3 * 1024 * 1024, 3), (3 * 1024 * 1024 - 1, 1)])
async def test_a_large_upload_is_replayed_below_the_limit(trouble, limit, runs):
    """W4: 3 MiB in chunks come again byte for byte; one byte over the limit, one attempt and 503."""
    chunks = [bytes([number]) * 65536 for number in range(48)]
    bodies = []

    async def upload():
        for chunk in chunks:
            yield chunk

    async def endpoint(request):
        await trouble.settle()
        bodies.append(b"".join([chunk async for chunk in request.stream()]))
        if len(bodies) < 3:
            await trouble.strike(current_session())
        return PlainTextResponse("done")

    async with client_of(app_of(trouble, endpoint, max_replay_body=limit)) as client:
        response = await client.post("/", content=upload())
    assert bodies == [b"".join(chunks)] * runs
    assert response.status_code == (200 if runs == 3 else 503)
    if runs == 1:
        assert response.json()["code"] == "conflict"


async def test_a_client_that_leaves_between_attempts_ends_them(trouble, caplog):
    """W4: nobody would get the answer."""
    caplog.set_level(logging.INFO, "sqla_uow_starlette")
    gone, runs, sent = [], [], []

    async def endpoint(request):
        await trouble.settle()
        runs.append(1)
        gone.append(True)
        await trouble.strike(current_session())

    async def receive():
        if not gone:
            await asyncio.Event().wait()
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": "/", "headers": [], "query_string": b"", "root_path": ""}
    await app_of(trouble, endpoint)(scope, receive, send)
    assert (runs, sent) == ([1], [])
    told = [record.getMessage() for record in caplog.records if record.name == "sqla_uow_starlette"]
    assert told == ["GET /: the client left between two attempts"]


class Inside(BaseHTTPMiddleware):
    async def dispatch(self, request, call_next):
        return await call_next(request)


async def test_each_attempt_begins_in_the_task_of_the_request(db, driver):
    """W4, S3: behind two `BaseHTTPMiddleware`s the last attempt was ended elsewhere, and the next one sees its own unit."""
    await db.run("INSERT INTO account (id, balance) VALUES (1, 0), (2, 0)")
    trouble = AT_COMMIT[db.family](db)
    units = []

    async def endpoint(request):
        await trouble.settle()
        units.append(current_unit())
        if len(units) < 3:
            await trouble.strike(current_session())
        else:
            await trouble.write(current_session())
        return StreamingResponse(iter(["done"]))

    routes = [Route("/", endpoint)]
    own = Middleware(
        UnitOfWorkMiddleware,
        manager=UnitOfWorkManager(trouble.engine()),
        atomic=True,
        isolation=trouble.isolation,
        retries=5,
    )
    app = Starlette(routes=routes, middleware=[own, Middleware(Inside), Middleware(Inside)])
    async with client_of(app, raise_app_exceptions=True) as client:
        response = await client.get("/")
    await trouble.settle()
    assert (response.text, [unit.status for unit in units]) == (
        "done", [Status.ROLLED_BACK, Status.ROLLED_BACK, Status.COMMITTED]
    )  # fmt: skip
    assert await db.scalar("SELECT count(*) FROM note") == 1
