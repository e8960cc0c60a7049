"""No part of a body is lost between two attempts, whatever stands around, nor to who answers a failure."""

from __future__ import annotations

import asyncio
import weakref

import httpx
import pytest
from sqlalchemy.exc import IntegrityError
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import PlainTextResponse

from sqla_uow import current_session, errors
from sqla_uow.testing import FaultPlan
from sqla_uow_starlette import UnitOfWorkMiddleware, exception_handlers
from tests.kit.models import Account
from tests.starlette.client import app_of, client_of
from tests.starlette.serving import served

PARTS = 6
PART = b"x" * 1000


class Around(BaseHTTPMiddleware):
    async def dispatch(self, request, call_next):
        """Send on what comes, from another task."""
        return await call_next(request)


async def slowly():
    """Give a body whose parts come one after the other."""
    for _ in range(PARTS):
        yield PART
        await asyncio.sleep(0.02)


def endpoint_of(runs):
    """Return one that reads a part of its body in its first attempts, and stores how much it has read in the last."""

    async def store(request):
        runs.append(0)
        async for part in request.stream():
            runs[-1] += len(part)
            if len(runs) < 3 and runs[-1]:
                break
        current_session().add(Account(id=2, balance=runs[-1]))
        return PlainTextResponse("stored")

    return store


@pytest.mark.parametrize("around", [0, 1, 2])
async def test_a_body_that_arrives_slowly(db, manager, around):
    """Looking for a client that has left takes nothing away."""
    runs = []
    app = app_of(manager, endpoint_of(runs), around=[Middleware(Around)] * around, atomic=True, retries=3)
    async with served(app) as (port, _), httpx.AsyncClient() as client:
        with FaultPlan(manager, "conflict", at="commit", times=2):
            response = await client.post(f"http://127.0.0.1:{port}/store", content=slowly())
    assert (response.status_code, len(runs)) == (200, 3)
    assert await db.scalar("SELECT balance FROM account WHERE id = 2") == PARTS * len(PART)


async def test_a_body_from_a_generator(db, manager):
    """Cutting off its receive() would end the generator."""
    runs = []
    async with client_of(app_of(manager, endpoint_of(runs), atomic=True, retries=3)) as client:
        with FaultPlan(manager, "conflict", at="commit", times=2):
            await client.post("/store", content=slowly())
    assert await db.scalar("SELECT balance FROM account WHERE id = 2") == PARTS * len(PART)


@pytest.mark.parametrize("retries", [0, 2])
@pytest.mark.parametrize("limit", [1 << 20, 3])
async def test_a_handler_that_reads_the_body(db, manager, retries, limit):
    """What COMMIT has failed with is answered with what the application has read, and where that is too long, at once."""

    async def taken(request, error):
        try:
            return PlainTextResponse(await request.body(), 409)
        except ClientDisconnect:
            return PlainTextResponse("too long", 409)

    async def store(request):
        await request.body()
        current_session().add(Account(id=1))
        return PlainTextResponse("stored")

    handlers = {**exception_handlers, IntegrityError: taken}
    app = app_of(manager, store, atomic=True, retries=retries, max_replay_body=limit, exception_handlers=handlers)
    async with served(app) as (port, _), httpx.AsyncClient(timeout=5) as client:
        response = await client.post(f"http://127.0.0.1:{port}/store", content=b"again")
    assert (response.status_code, response.text) == (409, "again" if limit > 3 else "too long")


async def test_a_handler_that_reads_the_body_of_a_reading_request(db, manager):
    """A success that is refused, since nothing would write what was changed, is answered with the body at hand, too."""

    async def told(request, error):
        return PlainTextResponse(await request.body(), 409)

    async def change(request):
        await request.body()
        account = await current_session().get_one(Account, 1)
        account.balance += 1
        return PlainTextResponse("changed")

    app = app_of(manager, change, exception_handlers={errors.ReadOnlyError: told})
    async with served(app) as (port, _), httpx.AsyncClient(timeout=5) as client:
        response = await client.post(f"http://127.0.0.1:{port}/change", content=b"again")
    assert (response.status_code, response.text) == (409, "again")


class Part(bytearray):
    """One of which a weak reference can be had."""


@pytest.mark.parametrize("options", [{}, {"atomic": True, "retries": 2}], ids=["scope", "atomic"])
async def test_nothing_is_kept_while_a_response_goes_on(manager, options):
    """A stream may take hours; its request's body is let go when it starts."""
    kept = []

    async def app(scope, receive, send):
        kept.append(weakref.ref((await receive())["body"]))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        kept.append(kept[0]())
        await send({"type": "http.response.body", "body": b""})

    async def receive():
        return {"type": "http.request", "body": Part(b"x"), "more_body": False}

    async def send(message):
        pass

    scope = {"type": "http", "method": "POST", "path": "/", "headers": []}
    await UnitOfWorkMiddleware(app, manager=manager, **options)(scope, receive, send)
    assert kept[1] is None
