"""What a client is told: whole problem documents, made by real failures."""

from __future__ import annotations

import asyncio

import pytest
from fastapi import FastAPI
from sqlalchemy import text
from starlette.applications import Starlette
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.websockets import WebSocketDisconnect

from sqla_uow import RetryPolicy, UnitOfWorkManager, current_session, errors, transactional
from sqla_uow_starlette import exception_handlers
from tests.kit.losses import Wire
from tests.servers import Proxy
from tests.starlette.pages import app, client, pages

TITLES = {
    400: "Bad Request",
    409: "Conflict",
    412: "Precondition Failed",
    428: "Precondition Required",
    500: "Internal Server Error",
    503: "Service Unavailable",
}
CONFLICT = "other requests changed the same data at the same time; this one was rolled back, send it again"
BUSY = "the database did not answer in time; send the request again later"


def refused(response):
    """Return the status, the code and the detail of a problem document, after a look at everything else in it."""
    problem = response.json()
    code, detail = problem.pop("code"), problem.pop("detail")
    assert problem == {"type": "about:blank", "title": TITLES[response.status_code], "status": response.status_code}
    assert response.headers["Content-Type"] == "application/problem+json"
    assert response.headers["Cache-Control"] == "no-store"
    assert response.headers.get("Retry-After") == ("1" if response.status_code == 503 else None)
    return response.status_code, code, detail


async def answer_of(endpoint, make=Starlette):
    """Return the response of an application that has one endpoint."""
    application = make(routes=[Route("/", endpoint)], exception_handlers=exception_handlers)
    async with client(application) as http:
        return await http.get("/")


@pytest.mark.drivers("asyncpg", "psycopg")
async def test_a_conflict(db):
    """W6: a 40001 that outlives its retries is 503 with Retry-After."""

    @transactional(isolation="REPEATABLE READ")
    async def endpoint(_request):
        session = current_session()
        await session.execute(text("SELECT value FROM page"))
        await db.run("UPDATE page SET value = value + 1")
        await session.execute(text("UPDATE page SET value = :secret WHERE id = 1"), {"secret": 4711})
        return PlainTextResponse("written")

    async with pages(db):
        assert refused(await answer_of(endpoint)) == (503, "conflict", CONFLICT)
    assert await db.scalar("SELECT value FROM page") == 1


@pytest.mark.drivers("asyncpg", "psycopg", "asyncmy", "aiomysql")
async def test_a_database_that_is_not_there(db):
    """W6: a connection that cannot be made is 503 with Retry-After."""
    with Proxy("127.0.0.1", db.port) as proxy:
        engine = db.engine(port=proxy.port)
    manager = UnitOfWorkManager(engine, retries=1, retry=RetryPolicy(base=0.001))

    @transactional(using=manager)
    async def endpoint(_request):
        await current_session().execute(text("SELECT 1"))

    detail = "the database cannot be reached; this request was rolled back, send it again later"
    assert refused(await answer_of(endpoint)) == (503, "database-unavailable", detail)


@pytest.mark.drivers("sqlite", "asyncpg")
async def test_an_exhausted_pool(db, caplog):
    """W6: the pool's timeout is 503 with Retry-After, and is logged."""

    @transactional
    async def endpoint(_request):
        await current_session().execute(text("SELECT 1"))

    async with pages(db, pool_size=1, max_overflow=0, pool_timeout=0.05) as manager, manager.engine.connect():
        assert refused(await answer_of(endpoint)) == (503, "database-busy", BUSY)
    assert [record.getMessage() for record in caplog.records if record.name == "sqla_uow_starlette"] == [
        "TimeoutError at GET /"
    ]


@pytest.mark.drivers("asyncpg")
async def test_a_deadline(db):
    """A deadline that passed is 503 too: nothing was written."""

    @transactional(timeout=0.05)
    async def endpoint(_request):
        await current_session().execute(text("SELECT pg_sleep(60)"))

    async with pages(db):
        assert refused(await answer_of(endpoint)) == (503, "database-busy", BUSY)


@pytest.mark.drivers("asyncpg", "asyncmy")
async def test_an_ambiguous_commit(db):
    """W6: the answer to COMMIT is lost: 500, a code for programs, and nothing that invites a repetition."""
    await db.run("INSERT INTO account (id, balance) VALUES (1, 0)")
    with Proxy("127.0.0.1", db.port) as proxy:
        wire = Wire(db, proxy)

        async def endpoint(_request):
            wire.on_commit(proxy.cut, applied=True)
            await wire.add_one()

        detail = "whether this request was carried out is unknown; look before sending it again"
        assert refused(await answer_of(endpoint)) == (500, "ambiguous-commit", detail)
        proxy.forward_all()
        await wire.engine.dispose()
    assert await db.scalar("SELECT balance FROM account") == 1


@pytest.mark.drivers("sqlite")
@pytest.mark.parametrize(("headers", "status"), [({}, 409), ({"If-Match": '"a"'}, 412)])
async def test_a_stale_version(driver, headers, status):
    """W6: 409 where the client did not say what it has seen, 412 where it did."""

    async def endpoint(_request):
        raise errors.StaleVersionError("Page(1) is at version 2 where 1 was expected; read it again")

    application = Starlette(routes=[Route("/", endpoint)], exception_handlers=exception_handlers)
    async with client(application) as http:
        found = refused(await http.get("/", headers=headers))
    assert (
        found
        == {
            409: (409, "stale-version", "the resource was changed by another request meanwhile; get it again"),
            412: (
                412,
                "precondition-failed",
                "If-Match does not hold: the resource has changed since, or is gone; get it again",
            ),
        }[status]
    )


@pytest.mark.drivers("sqlite")
@pytest.mark.parametrize(
    ("path", "headers", "expected"),
    [
        (
            "/pages/1",
            {"If-Match": '"a"'},
            (
                412,
                "precondition-failed",
                "If-Match does not hold: the resource has changed since, or is gone; get it again",
            ),
        ),
        (
            "/pages/9",
            {"If-Match": "*"},
            (412, "precondition-failed", "If-Match does not hold: there is no such resource; get it again"),
        ),
        (
            "/pages/1",
            {"If-None-Match": "*"},
            (412, "precondition-failed", "If-None-Match does not hold: the resource is there; get it again"),
        ),
        (
            "/pages/1",
            {},
            (
                428,
                "precondition-required",
                "this request must be conditional; send If-Match and the ETag that you have seen",
            ),
        ),
        (
            "/pages/9",
            {},
            (428, "precondition-required", "this request must be conditional; send If-None-Match: *"),
        ),
        (
            "/pages/1",
            {"If-Match": '"a" "b"'},
            (
                400,
                "malformed-precondition",
                'If-Match is malformed at character 1; send * or entity tags in their quotes: "a", "b"',
            ),
        ),
    ],
)
async def test_a_precondition(db, path, headers, expected):
    """W6, W7: each refusal says what does not hold, and what to send."""
    async with pages(db), client(app()) as http:
        assert refused(await http.put(path, json={"value": 1}, headers=headers)) == expected


@pytest.mark.drivers("sqlite")
async def test_a_precondition_without_the_handlers(db):
    """W7: an application that did not install them answers with the right status all the same."""
    application = app()
    application.exception_handlers.clear()
    async with pages(db), client(application) as http:
        found = await http.put("/pages/1", json={"value": 1})
        assert (found.status_code, found.text) == (
            428,
            "this request must be conditional; send If-Match and the ETag that you have seen",
        )
        tag = (await http.get("/pages/1")).headers["ETag"]
        assert (await http.get("/pages/1", headers={"If-None-Match": tag})).status_code == 304


@pytest.mark.drivers("sqlite")
async def test_fastapi_and_mounted_applications(driver):
    """W6: the same mapping is for FastAPI and for applications that are mounted, which have handlers of their own."""
    fast = FastAPI(exception_handlers=exception_handlers)

    @fast.get("/")
    async def endpoint():
        raise errors.ConflictError("transfer() gave up")

    outer = Starlette(routes=[Mount("/inner", fast)])
    for application, path in ((fast, "/"), (outer, "/inner/")):
        async with client(application) as http:
            assert refused(await http.get(path)) == (503, "conflict", CONFLICT)


@pytest.mark.drivers("sqlite")
async def test_a_handler_of_the_application_goes_before(driver):
    """W6: the mapping is an ordinary one; what stands behind it in a dict replaces its answer."""

    async def mine(_request, _error):
        return JSONResponse({"sorry": True}, 500)

    async def endpoint(_request):
        raise errors.ConflictError("transfer() gave up")

    application = Starlette(
        routes=[Route("/", endpoint)], exception_handlers={**exception_handlers, errors.ConflictError: mine}
    )
    async with client(application) as http:
        assert (await http.get("/")).json() == {"sorry": True}


# -- WebSockets


class Socket:
    """The server's side of a WebSocket connection."""

    def __init__(self, *received):
        self.received = [{"type": "websocket.connect"}, *received]
        self.sent = []

    async def receive(self):
        return self.received.pop(0)

    async def send(self, message):
        self.sent.append(message)

    async def run(self, endpoint):
        """Run an application with this endpoint; return what it sent."""
        application = Starlette(routes=[WebSocketRoute("/", endpoint)], exception_handlers=exception_handlers)
        scope = {"type": "websocket", "path": "/", "headers": [], "query_string": b"", "subprotocols": []}
        async with asyncio.timeout(5):
            await application(scope, self.receive, self.send)
        return self.sent


@pytest.mark.drivers("sqlite")
@pytest.mark.parametrize(
    ("error", "code", "reason"),
    [
        (errors.ConflictError("f() gave up"), 1013, "conflict"),
        (errors.StaleVersionError("stale"), 1011, "stale-version"),
        (errors.AmbiguousCommitError("lost"), 1011, "ambiguous-commit"),
    ],
)
async def test_a_websocket_is_closed(driver, error, code, reason):
    """W5, W6: a WebSocket has no status; it is closed, with "try again later" where that would help."""

    async def endpoint(websocket):
        await websocket.accept()
        raise error

    accept, close = await Socket().run(endpoint)
    assert accept["type"] == "websocket.accept"
    assert close == {"type": "websocket.close", "code": code, "reason": reason}


@pytest.mark.drivers("sqlite")
async def test_a_websocket_that_has_left_is_not_closed_twice(driver):
    """W6: there is nobody to tell; what the unit has met is in the log of `sqla_uow`."""

    async def endpoint(websocket):
        await websocket.accept()
        try:
            await websocket.receive_text()
        except WebSocketDisconnect:
            raise errors.ConflictError("f() gave up") from None

    sent = await Socket({"type": "websocket.disconnect", "code": 1001}).run(endpoint)
    assert [message["type"] for message in sent] == ["websocket.accept"]
