"""A response that starts while a unit of its request is open: its COMMIT would be told to nobody."""

from __future__ import annotations

import asyncio
import inspect
import warnings
from typing import TYPE_CHECKING

import pytest
from fastapi import Depends, FastAPI
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse

from sqla_uow import UnitOfWork, UnitOfWorkManager, transactional
from sqla_uow.errors import LateCommitWarning
from sqla_uow_starlette import UnitOfWorkMiddleware
from sqla_uow_starlette.fastapi import unit_of_work
from tests.kit.models import Account
from tests.starlette.client import add, app_of, client_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


def fastapi_app(manager, dependency, **options):
    """Return an application whose endpoint writes in the unit of a dependency."""
    app = FastAPI(middleware=[Middleware(UnitOfWorkMiddleware, manager=manager)])

    @app.post("/accounts/{number}")
    async def create(number: int, unit: UnitOfWork = dependency) -> int:
        unit.session.add(Account(id=number, balance=0))
        return number

    return app, create


async def test_a_dependency_without_the_scope_function(manager, db):
    """It is told with the route, the remedy, and the endpoint's own line."""

    async def unit() -> AsyncIterator[UnitOfWork]:
        async with manager.begin() as unit:
            yield unit

    app, endpoint = fastapi_app(manager, Depends(unit))
    async with client_of(app) as client:
        with pytest.warns(LateCommitWarning) as told:
            await client.post("/accounts/7")
    (warning,) = told
    assert str(warning.message) == (
        "POST /accounts/{number} begins its response while a unit of it is open, whose COMMIT comes too late to tell "
        "the client; end the unit before, in a FastAPI dependency by Depends(..., scope='function')"
    )
    assert (warning.filename, warning.lineno) == (__file__, inspect.getsourcelines(endpoint)[1])


async def test_once_for_each_endpoint(manager):
    """As Python tells warnings: not again for each request."""

    async def unit() -> AsyncIterator[UnitOfWork]:
        async with manager.begin() as unit:
            yield unit

    app, _endpoint = fastapi_app(manager, Depends(unit))
    async with client_of(app) as client:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("default", LateCommitWarning)
            for number in range(7, 10):
                await client.post(f"/accounts/{number}")
    assert [warning.category for warning in told] == [LateCommitWarning]


@pytest.mark.parametrize("how", ["function", "ours"])
async def test_the_remedy(manager, db, how):
    """With the scope, or with the dependency that has it: committed before the response, whose failure is then answered."""

    async def unit() -> AsyncIterator[UnitOfWork]:
        async with manager.begin() as unit:
            yield unit

    dependency = Depends(unit, scope="function") if how == "function" else unit_of_work(manager)
    app, _endpoint = fastapi_app(manager, dependency)
    async with client_of(app) as client:
        assert (await client.post("/accounts/7")).status_code == 200
        assert (await client.post("/accounts/7")).status_code == 500
    assert await db.scalar("SELECT count(*) FROM account WHERE id = 7") == 1


async def test_others_are_not_told(manager):
    """A task of its own that the request has started, and a unit that has ended, are no late commits."""
    ended, tasks = asyncio.Event(), []

    @transactional
    async def long():
        await ended.wait()

    async def endpoint(request):
        tasks.append(asyncio.create_task(long()))
        await asyncio.sleep(0)
        await add(9)
        return PlainTextResponse("done")

    async with client_of(app_of(manager, endpoint)) as client:
        assert (await client.get("/endpoint")).text == "done"
    ended.set()
    await asyncio.gather(*tasks)


async def test_a_unit_of_another_manager(manager, db):
    """A unit of any manager that is open in the request is told."""
    other = UnitOfWorkManager(db.engine(), name="other")

    async def unit() -> AsyncIterator[UnitOfWork]:
        async with other.begin() as unit:
            yield unit

    app, _endpoint = fastapi_app(manager, Depends(unit))
    async with client_of(app) as client:
        with pytest.warns(LateCommitWarning):
            await client.post("/accounts/7")
