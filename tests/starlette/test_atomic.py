"""The request as the transaction: W3."""

from __future__ import annotations

import asyncio
import contextlib

import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, PlainTextResponse

from sqla_uow import Status, after_commit, before_commit, current_session, current_unit, errors
from sqla_uow_starlette import UnitOfWorkMiddleware
from tests.starlette.client import add, app_of, client_of


async def test_commits_before_the_response_and_background(db, manager):
    """W3: when the background task runs, another connection sees the row."""
    seen = []

    async def look():
        seen.append(await db.scalar("SELECT count(*) FROM account"))

    async def endpoint(request):
        await add(2)
        after_commit(seen.append, "hook")
        return PlainTextResponse("done", background=BackgroundTask(look))

    async with client_of(app_of(manager, endpoint, atomic=True)) as client:
        response = await client.post("/endpoint")
    assert (response.status_code, seen) == (200, ["hook", 2])


@pytest.mark.parametrize("how", ["raised", "returned", "handled", "unhandled", "doomed"])
async def test_errors_roll_back(db, manager, how):
    """W3: a status from 400, an exception, also a handled one, and doom()."""

    async def endpoint(request):
        await add(2)
        if how == "raised":
            raise HTTPException(400)
        if how == "handled":
            raise KeyError
        if how == "unhandled":
            raise OSError
        if how == "doomed":
            current_unit().doom()
            return PlainTextResponse("done")
        return PlainTextResponse("wrong", 422)

    async def handled(request, error):
        return PlainTextResponse("see other", 303)

    async with client_of(app_of(manager, endpoint, atomic=True, exception_handlers={KeyError: handled})) as client:
        response = await client.post("/endpoint")
    expected = {"raised": 400, "returned": 422, "handled": 303, "unhandled": 500, "doomed": 200}
    assert response.status_code == expected[how]
    assert await db.scalar("SELECT count(*) FROM account") == 1


async def test_a_swallowed_error_is_no_success(db, manager):
    """W3, D3: an endpoint that swallows a failed statement cannot answer 200 for a transaction that is rolled back."""
    started = []

    async def endpoint(request):
        await add(2)
        with contextlib.suppress(IntegrityError):
            await current_session().execute(text("INSERT INTO account (id, balance) VALUES (1, 1)"))
        return PlainTextResponse("done", background=BackgroundTask(started.append, "background"))

    async def own(request, error):
        return JSONResponse({"own": type(error).__name__}, 418)

    async with client_of(
        app_of(manager, endpoint, atomic=True, exception_handlers={errors.UnitOfWorkError: own})
    ) as client:
        response = await client.post("/endpoint")
    assert (response.status_code, response.json(), started) == (418, {"own": "RollbackOnlyError"}, [])
    assert await db.scalar("SELECT count(*) FROM account") == 1


async def test_a_child_task_that_answers_behind_its_application(db, manager):
    """W3: the application returns while a child task it has left commits: the unit ends once, and the answer leaves."""
    sent, children, units = [], [], []
    committing, go_on = asyncio.Event(), asyncio.Event()

    async def hold():
        committing.set()
        await go_on.wait()

    async def child(send):
        units.append(current_unit())
        await add(2)
        before_commit(hold)
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def application(scope, receive, send):
        children.append(asyncio.create_task(child(send)))
        await committing.wait()
        asyncio.get_running_loop().call_soon(go_on.set)  # when the middleware already waits for the child

    async def send(message):
        sent.append(message["type"])

    middleware = UnitOfWorkMiddleware(application, manager=manager, atomic=True)
    await middleware({"type": "http", "method": "POST", "path": "/", "headers": []}, None, send)
    assert units[0].status is Status.COMMITTED
    await asyncio.wait(children)
    assert (sent, children[0].exception()) == (["http.response.start"], None)
    assert await db.scalar("SELECT count(*) FROM account") == 2
