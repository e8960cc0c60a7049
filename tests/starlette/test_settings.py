"""Settings of a request's transactions, which the middleware finds in its ASGI scope."""

from __future__ import annotations

import pytest
from sqlalchemy import text
from starlette.background import BackgroundTask
from starlette.middleware import Middleware
from starlette.responses import JSONResponse

from sqla_uow import UnitOfWorkManager, after_commit, current_session, transactional
from sqla_uow.errors import SettingMissingError
from sqla_uow.testing import FaultPlan
from sqla_uow_starlette import UnitOfWorkMiddleware
from tests.kit.tenants import PARCELS, ROLE, SEND, USER, make_parcels, tenant, url_of
from tests.starlette.client import app_of, client_of

pytestmark = pytest.mark.drivers("asyncpg", "psycopg")

TENANT = text("SELECT current_setting('app.tenant')")


class Login:
    """Middleware that says whose a request is, wherever it stands."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        if scope["type"] in ("http", "websocket"):
            headers = dict(scope["headers"])
            scope["login"] = headers.get(b"x-tenant", b"").decode() or None
        await self.app(scope, receive, send)


def of_login(scope):
    """Return the settings of a request."""
    return {"app.tenant": scope.get("login")}


@pytest.fixture
async def manager(db):
    """A manager whose tenant nobody knows but the request."""
    await make_parcels(db)
    return UnitOfWorkManager(db.engine(url=url_of(db), pool_size=2), settings={"app.tenant": tenant.get})


@transactional
async def write(body="new"):
    """Write for whoever it is, and return what there is."""
    session = current_session()
    whose = await session.scalar(TENANT)
    await session.execute(SEND, {"tenant": whose, "body": body})
    return await seen()


async def seen():
    """Return the tenants that can be seen."""
    return sorted({row.tenant for row in await current_session().execute(PARCELS)})


@pytest.mark.parametrize("atomic", [False, True])
@pytest.mark.parametrize("where", ["around", "inside"])
async def test_each_request_has_its_own(db, manager, atomic, where):
    """Read sessions and units, also of hooks; asked when a unit is opened, so other middleware may come first."""
    hooked = []

    async def look():
        async with manager.begin() as unit:
            hooked.append(await unit.session.scalar(TENANT))

    async def endpoint(request):
        before = await seen()

        @transactional
        async def work():
            after_commit(look)
            return await write()

        return JSONResponse([before, await work()])

    if atomic and where == "inside":
        pytest.skip("the unit is opened before what is inside has run")
    app = app_of(manager, endpoint, atomic=atomic, settings=of_login, **{where: [Middleware(Login)]})
    async with client_of(app) as client:
        for whose in ("a", "b", "a"):
            response = await client.post("/endpoint", headers={"x-tenant": whose})
            assert (response.status_code, response.json()) == (200, [[whose], [whose]])
        assert hooked == ["a", "b", "a"]
        nobody = await client.post("/endpoint")
    assert nobody.status_code == 500
    assert await db.scalar("SELECT count(*) FROM parcel") == 5


async def test_a_replayed_request_asks_again(manager):
    """Each attempt has what its scope says then."""

    async def endpoint(request):
        return JSONResponse(await write())

    app = app_of(manager, endpoint, atomic=True, retries=2, settings=of_login, around=[Middleware(Login)])
    async with client_of(app) as client:
        with FaultPlan(manager, "conflict", at="commit"):
            response = await client.post("/endpoint", headers={"x-tenant": "a"})
    assert (response.status_code, response.json()) == (200, ["a"])


async def test_a_background_task_has_no_tenant(db, manager):
    """It asks in its own context, where nobody says any more; the request is answered all the same."""
    refused = []

    async def late():
        try:
            await write("late")
        except SettingMissingError as error:
            refused.append(error.name)
        await told_itself()

    async def told_itself():
        async with manager.begin(settings={"app.tenant": "b"}) as unit:
            await unit.session.execute(SEND, {"tenant": "b", "body": "told"})

    async def endpoint(request):
        return JSONResponse(await write(), background=BackgroundTask(late))

    for atomic in (False, True):
        app = app_of(manager, endpoint, atomic=atomic, settings=of_login, around=[Middleware(Login)])
        async with client_of(app) as client:
            assert (await client.post("/endpoint", headers={"x-tenant": "a"})).json() == ["a"]
    assert refused == ["app.tenant"] * 2
    assert await db.rows("SELECT tenant FROM parcel WHERE body = 'told'") == [("b",), ("b",)]


async def test_a_role_of_the_request(db, manager):
    """A constant, or a function of the ASGI scope."""
    login = UnitOfWorkManager(db.engine())

    async def endpoint(request):
        return JSONResponse(await current_session().scalar(USER))

    for role in (ROLE, lambda scope: ROLE):
        async with client_of(app_of(login, endpoint, role=role)) as client:
            assert (await client.get("/endpoint")).json() == ROLE


@pytest.mark.parametrize(("options", "message"), [
    ({"settings": {"app.tenant": "a"}}, "has settings of type dict; pass a function of the ASGI scope"),
    ({"settings": Login.__call__}, "is async; use a plain function"),
    ({"role": Login.__call__}, "is async; use a plain function"),
], ids=str)  # fmt: skip
def test_what_cannot_be(manager, options, message):
    """Told when the application is made."""
    with pytest.raises(TypeError, match=message):
        UnitOfWorkMiddleware(None, manager=manager, **options)
