"""A scope per request and connection, closed when the response starts: W1, W2 and W5."""

from __future__ import annotations

import pytest
from sqlalchemy import text
from starlette.background import BackgroundTask
from starlette.responses import JSONResponse, PlainTextResponse

from sqla_uow import current_session, errors
from tests.kit.models import Account
from tests.starlette.client import add, app_of, client_of

SCOPE_ENDED = (
    "the scope that was open here has ended; in a task that outlives it, or a background task, "
    "call a @transactional function, which opens its own unit"
)


async def test_reads_and_units_in_one_request(db, manager):
    """W2: a read in the scope, a unit, and a read again, on a pool of one."""

    async def endpoint(request):
        before = await current_session().scalar(text("SELECT count(*) FROM account"))
        await add(2)
        after = await current_session().scalar(text("SELECT count(*) FROM account"))
        return JSONResponse([before, after, manager.engine.pool.checkedout()])

    async with client_of(app_of(manager, endpoint)) as client:
        response = await client.get("/endpoint")
    assert response.json() == [1, 2, 1]
    assert await db.scalar("SELECT count(*) FROM account") == 2


async def test_an_object_changed_in_the_request_is_an_error(db, manager):
    """W2, S7: no success for a change that nothing would write."""
    seen = []

    async def endpoint(request):
        account = await current_session().get_one(Account, 1)
        account.balance = 99
        return PlainTextResponse("done", background=BackgroundTask(seen.append, "background"))

    async def refused(request, error):
        return PlainTextResponse(str(error), 409)

    async with client_of(app_of(manager, endpoint, exception_handlers={errors.ReadOnlyError: refused})) as client:
        response = await client.post("/endpoint")
    assert (response.status_code, seen) == (409, [])
    assert "Account" in response.text
    assert await db.scalar("SELECT balance FROM account") == 10


async def test_an_object_changed_in_a_request_that_fails(db, manager):
    """W2, S7: an error has its own story to tell."""

    async def endpoint(request):
        (await current_session().get_one(Account, 1)).balance = 99
        return PlainTextResponse("no", 422)

    async with client_of(app_of(manager, endpoint)) as client:
        response = await client.post("/endpoint")
    assert (response.status_code, response.text) == (422, "no")
    assert await db.scalar("SELECT balance FROM account") == 10


async def test_a_background_task_reads_no_more_but_may_call(db, manager):
    """W5: NoUnitError with the cure, and a unit of its own."""
    seen = []

    async def afterwards():
        with pytest.raises(errors.NoUnitError) as caught:
            current_session()
        seen.append(str(caught.value))
        await add(3)

    async def endpoint(request):
        await current_session().get_one(Account, 1)
        return PlainTextResponse("done", background=BackgroundTask(afterwards))

    async with client_of(app_of(manager, endpoint)) as client:
        response = await client.post("/endpoint")
    assert (response.status_code, seen) == (200, [SCOPE_ENDED])
    assert await db.scalar("SELECT count(*) FROM account") == 2
