"""What middleware around and inside an atomic request sees in the ASGI scope, over all attempts."""

from __future__ import annotations

import contextlib

import pytest
from fastapi import Depends, FastAPI, Request
from sqlalchemy.exc import SQLAlchemyError
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from sqla_uow import UnitOfWorkManager, current_session, current_unit
from sqla_uow_starlette import UnitOfWorkMiddleware
from tests.starlette.client import client_of


def app_of(trouble, endpoint, *around, retries=5, **options):
    """Return an application whose requests are run again, between other middleware."""
    manager = UnitOfWorkManager(trouble.engine())
    own = Middleware(UnitOfWorkMiddleware, manager=manager, atomic=True, isolation=trouble.isolation, retries=retries)
    return Starlette(routes=[Route("/", endpoint)], middleware=[*around, own], **options)


class Reporter(BaseHTTPMiddleware):
    """Looks at `request.state` before and after, as loggers and reporters of errors do."""

    def __init__(self, app, seen):
        super().__init__(app)
        self.seen = seen

    async def dispatch(self, request, call_next):
        request.state.steps = steps = ["outside"]
        request.state.facts = facts = {"tags": {"a"}}
        try:
            return await call_next(request)
        finally:
            self.seen.append((request.state._state.get("user"), steps, facts))


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("conflicts", [0, 2])
async def test_those_around_see_the_last_attempt(trouble, raises, conflicts):
    """The objects of the scope are the same all the time; only the last attempt's changes are in them, also if it raises."""
    runs, seen = [], []

    async def endpoint(request):
        await trouble.settle()
        runs.append(1)
        request.state.user = f"user {current_unit().attempt}"
        request.state.steps.append(len(runs))
        request.state.facts["tags"].add(len(runs))
        if len(runs) <= conflicts:
            request.state.forgotten = True
            await trouble.strike(current_session())
        assert not hasattr(request.state, "forgotten")
        if raises:
            raise ValueError("of the endpoint")
        return PlainTextResponse("done")

    async with client_of(app_of(trouble, endpoint, Middleware(Reporter, seen=seen))) as client:
        response = await client.get("/")
    last = conflicts + 1
    assert response.status_code == (500 if raises else 200)
    assert seen == [(f"user {last}", ["outside", last], {"tags": {"a", last}})]


class Session(dict):
    """A session as Starlette's `SessionMiddleware` makes it: it knows whether it has to be sent."""

    def __init__(self, *args):
        super().__init__(*args)
        self.modified = False

    def __setitem__(self, key, value):
        self.modified = True
        super().__setitem__(key, value)

    def update(self, *args, **kwargs):
        self.modified = True
        super().update(*args, **kwargs)


class Sessions:
    """Puts a session into the scope, and looks at it when the response starts."""

    def __init__(self, app, sent):
        self.app = app
        self.sent = sent

    async def __call__(self, scope, receive, send):
        scope["session"] = session = Session({"basket": []})

        async def look(message):
            if message["type"] == "http.response.start":
                self.sent.append((dict(session), session.modified, session is scope["session"]))
            await send(message)

        await self.app(scope, receive, look)


@pytest.mark.parametrize("last_changes", [False, True])
async def test_the_browsers_session_is_as_the_last_attempt_left_it(trouble, last_changes):
    """It is the same object; what a failed attempt did to it is undone, its mark of a change, too."""
    runs, sent = [], []

    async def endpoint(request):
        await trouble.settle()
        runs.append(1)
        if len(runs) < 3:
            request.session["failed"] = True
            request.session["basket"].append(len(runs))
            await trouble.strike(current_session())
        if last_changes:
            request.session["user"] = "ada"
        return PlainTextResponse("done")

    async with client_of(app_of(trouble, endpoint, Middleware(Sessions, sent=sent))) as client:
        assert (await client.get("/")).text == "done"
    assert sent == [({"basket": []} | ({"user": "ada"} if last_changes else {}), last_changes, True)]


async def test_what_the_lifespan_gave_to_all_is_nobodys_to_put_back(trouble):
    """Another request has changed the lifespan's cache between two attempts: it stays changed."""
    runs, cache = [], {}

    @contextlib.asynccontextmanager
    async def lifespan(app):
        yield {"cache": cache}

    async def endpoint(request):
        await trouble.settle()
        runs.append(1)
        if len(runs) < 3:
            cache[len(runs)] = "of another request"
            await trouble.strike(current_session())
        return PlainTextResponse(str(request.state.cache))

    app, state = app_of(trouble, endpoint, lifespan=lifespan), {}
    messages = [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}]

    async def receive():
        return messages.pop(0)

    async def send(message):
        if message["type"] != "lifespan.startup.complete":
            return

        async def with_state(scope, receive, send):  # as servers do
            await app({**scope, "state": dict(state)}, receive, send)

        async with client_of(with_state) as client:
            assert (await client.get("/")).text == "{1: 'of another request', 2: 'of another request'}"

    await app({"type": "lifespan", "state": state}, receive, send)
    assert len(runs) == 3


async def test_a_dependency_tells_the_middleware_around(trouble):
    """Also without any conflict: FastAPI's dependency sets the user, who is seen outside."""
    seen = []

    async def user(request: Request):
        request.state.user = "ada"

    own = Middleware(
        UnitOfWorkMiddleware, manager=UnitOfWorkManager(trouble.engine()), atomic=True, isolation=trouble.isolation,
        retries=3,
    )  # fmt: skip
    app = FastAPI(middleware=[Middleware(Reporter, seen=seen), own])

    @app.get("/", dependencies=[Depends(user)])
    async def endpoint() -> str:
        return "done"

    async with client_of(app) as client:
        assert (await client.get("/")).status_code == 200
    assert seen[0][0] == "ada"


async def test_a_handler_answers_with_the_state_of_the_last_attempt(trouble):
    """The handler of an exception that came out at COMMIT, or before, sees what the attempt has set."""
    runs = []

    async def mine(request, error):
        return PlainTextResponse(f"{request.state.user} {request.state.steps}", 409)

    async def endpoint(request):
        await trouble.settle()
        runs.append(1)
        request.state.user = len(runs)
        request.state.steps = [*getattr(request.state, "steps", []), len(runs)]
        await trouble.strike(current_session())

    app = app_of(trouble, endpoint, retries=1, exception_handlers={SQLAlchemyError: mine})
    async with client_of(app) as client:
        assert (await client.get("/")).text == "2 [2]"
