"""What the guides say of errors with status 200, and of jobs that are started inside a unit."""

from __future__ import annotations

import asyncio

import pytest
from starlette.responses import JSONResponse

from sqla_uow import Status, after_commit, current_session, current_unit, transactional
from tests.kit.models import Account
from tests.starlette.client import add, app_of, client_of


@pytest.mark.parametrize("dooms", [False, True])
async def test_an_error_inside_a_response_of_success(manager, db, dooms):
    """It commits what was done before it, unless the unit is doomed; the answer leaves in either case."""

    async def graphql(request):
        await add(9)
        answer = {"data": None, "errors": [{"message": "no such field"}]}
        if dooms:
            current_unit().doom("the answer has errors")
        return JSONResponse(answer)

    async with client_of(app_of(manager, graphql, atomic=True)) as client:
        response = await client.post("/graphql")
    assert (response.status_code, response.json()["errors"]) == (200, [{"message": "no such field"}])
    assert await db.scalar("SELECT count(*) FROM account WHERE id = 9") == (0 if dooms else 1)


@pytest.mark.parametrize("remedy", [False, True])
@pytest.mark.parametrize("status", [200, 409])
async def test_a_job_that_a_request_starts(manager, db, remedy, status):
    """It joins the request's unit and goes with its rollback; started by a hook, it is there exactly if the request is."""
    jobs, units = [], []

    @transactional
    async def job():
        units.append(current_unit())
        current_session().add(Account(id=9, balance=0))

    def add_job(function):
        jobs.append(asyncio.create_task(function()))

    async def order(request):
        await add(8)
        if remedy:
            after_commit(add_job, job)
        else:
            add_job(job)
            await asyncio.sleep(0)
            await jobs[0]  # it is done, as far as it knows
        return JSONResponse({}, status)

    async with client_of(app_of(manager, order, atomic=True)) as client:
        assert (await client.post("/order")).status_code == status
    await asyncio.gather(*jobs)
    there = {row[0] for row in await db.rows("SELECT id FROM account WHERE id > 1")}
    assert there == ({8, 9} if status == 200 else set())
    if status == 409:
        assert [unit.status for unit in units] == ([] if remedy else [Status.ROLLED_BACK])
