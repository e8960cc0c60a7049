"""What is told where a request is committed, and something that was to follow has failed."""

from __future__ import annotations

import logging

import pytest
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from sqla_uow import after_commit, current_session, current_unit, transactional
from sqla_uow_starlette import UnitOfWorkMiddleware, exception_handlers
from tests.kit.models import Account
from tests.starlette.client import add, client_of

PROBLEM = {
    "type": "about:blank",
    "title": "Internal Server Error",
    "status": 500,
    "detail": "this request was carried out, but something that was to follow has failed; do not send it again",
    "code": "committed-hook-failed",
}


async def mail():
    """Be a hook that cannot do what it is for."""
    raise OSError("the mail server is away")


@pytest.mark.parametrize("how", ["scope", "atomic", "no handlers"])
async def test_a_hook_that_fails(manager, db, caplog, how):
    """It is told as committed, nothing invites a repetition, and the operator finds the hook's own error in the log."""
    caplog.set_level(logging.ERROR, "sqla_uow_starlette")
    later = []

    @transactional
    async def work():
        await add(9)
        after_commit(mail)

    async def endpoint(request):
        await work()
        return PlainTextResponse("done", background=BackgroundTask(later.append, 1))

    app = Starlette(
        routes=[Route("/accounts/{id}", endpoint, methods=["POST"])],
        middleware=[Middleware(UnitOfWorkMiddleware, manager=manager, atomic=how != "scope")],
        exception_handlers=None if how == "no handlers" else exception_handlers,
    )
    async with client_of(app) as client:
        response = await client.post("/accounts/9")
    assert (response.status_code, response.json()) == (500, PROBLEM)
    assert response.headers["content-type"] == "application/problem+json"
    assert "retry-after" not in response.headers
    assert await db.scalar("SELECT count(*) FROM account WHERE id = 9") == 1
    assert later == []
    (told,) = [record for record in caplog.records if record.name == "sqla_uow_starlette"]
    assert told.getMessage() == "POST /accounts/{id} is committed, but what was to follow failed"
    assert isinstance(told.exc_info[1].exceptions[0], OSError)


async def test_a_hook_that_changes_what_was_read(manager, db):
    """A hook of the request's unit changes an object of the read session: that is not written, the request is."""

    async def change():
        account = await current_session().get_one(Account, 1)
        account.balance = 4711

    async def endpoint(request):
        await add(9)
        current_unit().after_commit(change)
        return PlainTextResponse("done")

    app = Starlette(
        routes=[Route("/", endpoint)],
        middleware=[Middleware(UnitOfWorkMiddleware, manager=manager, atomic=True)],
        exception_handlers=exception_handlers,
    )
    async with client_of(app) as client:
        response = await client.get("/")
    assert (response.status_code, response.json()) == (500, PROBLEM)
    assert await db.rows("SELECT id, balance FROM account ORDER BY id") == [(1, 10), (9, 0)]
