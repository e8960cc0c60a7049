"""What the middleware can be told, and what it refuses where it is told: W1 and W3."""

from __future__ import annotations

import asyncio
import functools

import pytest
from sqlalchemy import text
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse

from sqla_uow import UnitOfWorkManager, after_commit, current_session, current_unit, errors
from sqla_uow_starlette import UnitOfWorkMiddleware
from tests.kit.models import Account
from tests.starlette.client import app_of, client_of

UNUSED = "where it means nothing; add atomic=True, or say it at the @transactional functions"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"retries": 2}, f"UnitOfWorkMiddleware has retries=2 without atomic=True, {UNUSED}"),
        (
            {"isolation": "SERIALIZABLE"},
            f"UnitOfWorkMiddleware has isolation='SERIALIZABLE' without atomic=True, {UNUSED}",
        ),
        ({"timeout": 1}, f"UnitOfWorkMiddleware has timeout=1 without atomic=True, {UNUSED}"),
        (
            {"read_only_methods": ["get"]},
            f"UnitOfWorkMiddleware has read_only_methods=('GET',) without atomic=True, {UNUSED}",
        ),
        (
            {"atomic": 1},
            "UnitOfWorkMiddleware has atomic=1; use True or False",
        ),
        (
            {"atomic": True, "read_only_methods": "GET"},
            "UnitOfWorkMiddleware has read_only_methods='GET'; pass several, as ('GET', 'HEAD')",
        ),
        (
            {"atomic": True, "should_commit": True},
            "UnitOfWorkMiddleware has should_commit=True; pass a function of the scope and the status",
        ),
        (
            {"atomic": True, "max_replay_body": "1 MiB"},
            "UnitOfWorkMiddleware has max_replay_body='1 MiB'; use a number of bytes",
        ),
        (
            {"atomic": True, "max_replay_body": -1},
            "UnitOfWorkMiddleware has max_replay_body=-1; use a number of bytes, 0 or more",
        ),
        ({"atomic": True, "retries": -1}, "UnitOfWorkMiddleware has retries=-1; use 0 for a single run"),
        (
            {"manager": None},
            "UnitOfWorkMiddleware has manager=None; pass the UnitOfWorkManager that its requests are to use",
        ),
    ],
)
@pytest.mark.drivers("sqlite")
async def test_what_cannot_be(db, options, message):
    """W1: said at construction."""
    with pytest.raises((TypeError, ValueError)) as caught:
        UnitOfWorkMiddleware(None, **{"manager": UnitOfWorkManager(db.engine()), **options})
    assert str(caught.value) == message


async def test_read_only_methods(db, manager):
    """W1: a GET cannot write, a POST can."""

    async def endpoint(request):
        current_session().add(Account(id=2))
        return PlainTextResponse(str(current_unit().read_only))

    async def own(request, error):
        return PlainTextResponse("read-only", 405)

    app = app_of(
        manager,
        endpoint,
        atomic=True,
        read_only_methods=["get", "head"],
        exception_handlers={errors.ReadOnlyError: own},
    )
    async with client_of(app) as client:
        assert (await client.get("/endpoint")).text == "read-only"
        assert await db.scalar("SELECT count(*) FROM account") == 1
        assert (await client.post("/endpoint")).text == "False"
    assert await db.scalar("SELECT count(*) FROM account") == 2


async def test_should_commit_decides(db, manager):
    """W3: also for an exception that a handler answers; what it raises itself is answered as an error."""
    asked = []

    def should_commit(scope, status):
        asked.append((scope["path"], status))
        if status == 418:
            raise LookupError
        return status == 404

    async def endpoint(request):
        status = int(request.query_params["status"])
        current_session().add(Account(id=status))
        if status == 200:
            return PlainTextResponse("done")
        raise HTTPException(status)

    async with client_of(app_of(manager, endpoint, atomic=True, should_commit=should_commit)) as client:
        got = [(await client.get(f"/endpoint?status={status}")).status_code for status in (200, 404, 418)]
    assert got == [200, 404, 500]
    assert asked == [("/endpoint", 200), ("/endpoint", 404), ("/endpoint", 418)]
    assert await db.rows("SELECT id FROM account ORDER BY id") == [(1,), (404,)]


class SaysNo:
    async def __call__(self, scope, status):
        return False


async def says_no(scope, status):
    """Be a coroutine, which is true."""
    return False


@pytest.mark.parametrize(
    "decides", [says_no, SaysNo(), functools.partial(says_no)], ids=["function", "object", "partial"]
)
@pytest.mark.drivers("sqlite")
async def test_an_async_should_commit_is_refused(db, decides):
    """A coroutine is true: it would commit whatever it says."""
    with pytest.raises(
        TypeError, match=r"^UnitOfWorkMiddleware has a should_commit that is async: .* pass a plain function"
    ):
        UnitOfWorkMiddleware(None, manager=UnitOfWorkManager(db.engine()), atomic=True, should_commit=decides)


async def test_a_should_commit_that_returns_a_coroutine_rolls_back(db, manager):
    """Nobody could foresee it: the request is an error, and nothing of it stays."""

    async def endpoint(request):
        current_session().add(Account(id=2))
        return PlainTextResponse("done")

    app = app_of(manager, endpoint, atomic=True, should_commit=lambda scope, status: says_no(scope, status=status))
    async with client_of(app) as client:
        assert (await client.get("/endpoint")).status_code == 500
    assert await db.scalar("SELECT count(*) FROM account WHERE id = 2") == 0


async def test_the_deadline_of_a_request(db, manager):
    """W1, R6: what does not end is rolled back; the client is told to come again."""

    async def endpoint(request):
        current_session().add(Account(id=2))
        await current_session().flush()
        await asyncio.Event().wait()

    async with client_of(app_of(manager, endpoint, atomic=True, timeout=0.3)) as client:
        response = await client.get("/endpoint")
    assert (response.status_code, response.json()["code"]) == (503, "database-busy")
    assert await db.scalar("SELECT count(*) FROM account") == 1


async def test_a_failing_hook(db, manager):
    """C3, W3: committed, but what should follow failed: the application's handler answers, no background task begins."""
    background = []

    def hook():
        raise OSError

    async def endpoint(request):
        current_session().add(Account(id=2))
        after_commit(hook)
        return PlainTextResponse("done", background=BackgroundTask(background.append, 1))

    async def own(request, error):
        return PlainTextResponse("committed, but not sent", 500)

    app = app_of(manager, endpoint, atomic=True, exception_handlers={errors.AfterCommitError: own})
    async with client_of(app) as client:
        response = await client.get("/endpoint")
    assert (response.text, background) == ("committed, but not sent", [])
    assert await db.scalar("SELECT count(*) FROM account") == 2


async def test_no_sql_takes_no_connection(db, manager):
    """S2: in both modes."""
    taken = []

    async def endpoint(request):
        taken.append(manager.engine.pool.checkedin())
        return PlainTextResponse("done")

    for atomic in (False, True):
        async with client_of(app_of(manager, endpoint, atomic=atomic)) as client:
            assert (await client.get("/endpoint")).text == "done"
    assert taken == [0, 0]
    assert manager.engine.pool.checkedin() == 0


async def test_several_managers(db, manager):
    """W1: an entry for each; each session is found by its name."""
    other = UnitOfWorkManager(db.engine(), name="other")

    async def endpoint(request):
        one = await current_session().scalar(text("SELECT 1"))
        return PlainTextResponse(str(one + await current_session("other").scalar(text("SELECT 2"))))

    app = app_of(manager, endpoint, around=[Middleware(UnitOfWorkMiddleware, manager=other, atomic=True)])
    async with client_of(app) as client:
        assert (await client.get("/endpoint")).text == "3"
    assert other.engine.pool.checkedout() == 0


@pytest.mark.parametrize("atomic", [False, True], ids=["default", "atomic"])
async def test_an_application_that_answers_nothing(db, manager, atomic):
    """W3: nothing was told, so nothing is committed."""
    sent = []

    async def app(scope, receive, send):
        session = current_session()
        if atomic:
            session.add(Account(id=2))
            await session.flush()

    async def send(message):
        sent.append(message)

    await UnitOfWorkMiddleware(app, manager=manager, atomic=atomic)({"type": "http", "method": "GET"}, None, send)
    assert sent == []
    assert await db.scalar("SELECT count(*) FROM account") == 1


async def test_messages_of_unknown_types_pass(db, manager):
    """W1: before the response and in it; what is no request passes as it is."""
    sent = []

    async def app(scope, receive, send):
        await send({"type": "http.response.unknown"})
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.later"})

    async def send(message):
        sent.append(message["type"].rpartition(".")[2])

    for atomic in (False, True):
        middleware = UnitOfWorkMiddleware(app, manager=manager, atomic=atomic)
        await middleware({"type": "http", "method": "GET"}, None, send)
        await middleware({"type": "surprise"}, None, send)
    assert sent == ["unknown", "start", "later", "unknown", "later"] * 2
