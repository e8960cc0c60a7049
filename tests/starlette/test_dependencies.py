"""FastAPI: which dependency sees the request's read session (W2, W5)."""
# No `from __future__ import annotations`: FastAPI has to find what is local to a test.

from typing import Annotated

import pytest
from fastapi import Depends, FastAPI

from sqla_uow import UnitOfWorkManager, current_session, transactional
from sqla_uow.errors import NoUnitError, TaskBoundaryError
from sqla_uow_starlette import UnitOfWorkMiddleware
from tests.kit.models import Account
from tests.starlette.client import client_of

pytestmark = pytest.mark.drivers("sqlite", "asyncpg")

SCOPE_ENDED = (
    "the scope that was open here has ended; in a task that outlives it, or a background task, "
    "call a @transactional function, which opens its own unit"
)


@transactional
async def deposit(amount):
    """Write."""
    account = await current_session().get_one(Account, 1)
    account.balance += amount
    return account.balance


async def account():
    """Read, in the task of the endpoint."""
    return await current_session().get_one(Account, 1)


async def test_a_dependency_reads_before_and_after_the_endpoint(db):
    """W2, W5: with scope="function" it ends while the session still reads; else after the response has started."""
    await db.run("INSERT INTO account (id, balance) VALUES (1, 10)")
    engine, log = db.engine(), []

    async def until_response():
        yield await account()
        log.append((await account()).balance)

    async def until_sent():
        yield
        try:
            current_session()
        except NoUnitError as error:
            log.append(str(error))

    app = FastAPI()
    app.add_middleware(UnitOfWorkMiddleware, manager=UnitOfWorkManager(engine))

    @app.post("/")
    async def endpoint(
        found: Annotated[object, Depends(until_response, scope="function")], _: Annotated[object, Depends(until_sent)]
    ) -> int:
        assert isinstance(found, Account)
        return found.balance + await deposit(5)

    async with client_of(app, raise_app_exceptions=True) as http:
        assert (await http.post("/")).json() == 25
    assert log == [15, SCOPE_ENDED]
    assert engine.pool.checkedout() == 0
    assert await db.scalar("SELECT balance FROM account") == 15


async def test_a_sync_dependency_runs_in_a_thread(db):
    """S5: it is told so, and what to do."""
    engine = db.engine()

    def dependency():
        with pytest.raises(TaskBoundaryError) as caught:
            current_session()
        return str(caught.value)

    app = FastAPI()
    app.add_middleware(UnitOfWorkMiddleware, manager=UnitOfWorkManager(engine))

    @app.get("/")
    async def endpoint(told: Annotated[str, Depends(dependency)]) -> str:
        return told

    async with client_of(app, raise_app_exceptions=True) as http:
        assert (await http.get("/")).json() == (
            "the read session of this scope was used from a thread other than the one of its event loop; "
            "read beforehand what the thread needs, or open a unit inside it"
        )
