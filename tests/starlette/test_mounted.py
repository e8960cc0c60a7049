"""Conflicts and outages inside a mounted application, whose own error page comes before the handlers around it."""

from __future__ import annotations

import pytest
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route

from sqla_uow import UnitOfWorkManager, current_session, errors, transactional
from sqla_uow_starlette import UnitOfWorkMiddleware, exception_handlers
from tests.starlette.client import client_of


def app_of(trouble, endpoint, *, retries=2, make=Starlette, depth=1, atomic=True, inner=None, outer=exception_handlers):
    """Return an application with another one mounted in it, or in one that is mounted in it."""
    app = make(routes=[Route("/", endpoint, methods=["GET", "POST"])], **(inner or {}))
    for _ in range(depth - 1):
        app = Starlette(routes=[Mount("/inner", app)])
    options = {"atomic": True, "isolation": trouble.isolation, "retries": retries} if atomic else {}
    own = Middleware(UnitOfWorkMiddleware, manager=UnitOfWorkManager(trouble.engine()), **options)
    return Starlette(routes=[Mount("/inner", app)], middleware=[own], exception_handlers=outer)


@pytest.mark.parametrize("make", [Starlette, FastAPI])
@pytest.mark.parametrize("depth", [1, 2])
async def test_a_conflict_is_run_again(trouble, db, make, depth):
    """The page of the mounted application is not the answer to a conflict: the request is run again."""
    runs = []

    async def endpoint(request):
        await trouble.settle()
        runs.append(await request.body())
        if len(runs) < 3:
            await trouble.strike(current_session())
        await trouble.write(current_session())
        return PlainTextResponse("done")

    async with client_of(app_of(trouble, endpoint, make=make, depth=depth)) as client:
        response = await client.post("/inner" * depth + "/", content=b"body")
    await trouble.settle()
    assert (response.status_code, response.text, runs) == (200, "done", [b"body"] * 3)
    assert await db.scalar("SELECT count(*) FROM note") == 1


@pytest.mark.parametrize("atomic", [False, True])
async def test_a_conflict_that_stays(trouble, db, atomic):
    """It is answered as one outside a mount: 503, with a code, and nothing of it is in the database."""

    @transactional(isolation=trouble.isolation, retries=1)
    async def work():
        await trouble.settle()
        await trouble.strike(current_session())

    async def endpoint(request):
        await work()

    async with client_of(app_of(trouble, endpoint, atomic=atomic)) as client:
        response = await client.get("/inner/")
    await trouble.settle()
    assert (response.status_code, response.json()["code"]) == (503, "conflict")
    assert await db.scalar("SELECT count(*) FROM note") == 0


@pytest.mark.parametrize("atomic", [False, True])
@pytest.mark.parametrize("wanted", ["handler", "debug", "outer"])
async def test_who_answers(trouble, atomic, wanted):
    """A handler of the mounted application, or its debug page, is its answer; else the handlers of the one around are asked."""

    async def mine(request, error):
        return PlainTextResponse(f"mine {type(error).__name__}", 500)

    async def endpoint(request):
        raise errors.ConflictError("of a service")

    inner = {"handler": {"exception_handlers": {Exception: mine}}, "debug": {"debug": True}}.get(wanted)
    outer = {errors.ConflictError: mine} if wanted == "outer" else exception_handlers
    async with client_of(app_of(trouble, endpoint, atomic=atomic, inner=inner, outer=outer)) as client:
        response = await client.get("/inner/")
    assert response.status_code == 500
    assert ("Traceback" if wanted == "debug" else "mine ConflictError") in response.text


@pytest.mark.parametrize("atomic", [False, True])
async def test_another_error_keeps_the_page_of_the_mounted_application(trouble, db, atomic):
    """What is no matter of the database is not ours to answer; it is rolled back, and reaches the server's log."""

    async def endpoint(request):
        if atomic:
            await trouble.write(current_session())
        raise ValueError("of the endpoint")

    app = app_of(trouble, endpoint, atomic=atomic)
    async with client_of(app) as client:
        response = await client.get("/inner/")
    assert (response.status_code, response.text) == (500, "Internal Server Error")
    with pytest.raises(ValueError, match="of the endpoint"):
        async with client_of(app, raise_app_exceptions=True) as client:
            await client.get("/inner/")
    assert await db.scalar("SELECT count(*) FROM note") == 0
