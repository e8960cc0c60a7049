"""What names a request: its route, in errors, the log, events, spans and statistics."""

from __future__ import annotations

import logging

import pytest
from fastapi import APIRouter, FastAPI
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route

from sqla_uow import UnitOfWorkManager, current_session, errors, transactional
from sqla_uow.events import Observer
from sqla_uow_starlette import UnitOfWorkMiddleware, exception_handlers
from tests.kit.models import Account
from tests.starlette.client import client_of


class Recorder(Observer):
    """Keeps the name that each event tells."""

    def __init__(self):
        self.attempts, self.retries, self.outcomes = [], [], []

    def on_attempt(self, event):
        self.attempts.append(event.function)

    def on_retry(self, event):
        self.retries.append(event.function)

    def on_outcome(self, event):
        self.outcomes.append(event.function)


def own(trouble, **options):
    """Return the middleware of a manager whose requests are run again."""
    options = {"retries": 1, **options}
    return Middleware(
        UnitOfWorkMiddleware, manager=UnitOfWorkManager(trouble.engine(), observers=options.pop("observers", ())),
        atomic=True, isolation=trouble.isolation, **options,
    )  # fmt: skip


async def test_a_conflict_is_of_its_route(trouble, caplog):
    """Error, log records, fields and events name method and route, never the path or what the library calls inside."""
    caplog.set_level(logging.INFO, "sqla_uow")
    recorder, caught = Recorder(), []

    async def keep(request, error):
        caught.append(error)
        return PlainTextResponse("kept", 503)

    async def endpoint(request):
        await trouble.settle()
        await trouble.strike(current_session())

    app = Starlette(
        routes=[Route("/accounts/{id:int}", endpoint, methods=["POST"])],
        middleware=[own(trouble, observers=[recorder])],
        exception_handlers={errors.ConflictError: keep},
    )
    name = "POST /accounts/{id:int}"
    async with client_of(app) as client:
        assert (await client.post("/accounts/4711")).status_code == 503
    assert str(caught[0]).startswith(f"{name} failed in each of 2 attempts")
    told = [record for record in caplog.records if record.name == "sqla_uow" and hasattr(record, "uow_function")]
    assert {(type(record.uow_function), record.uow_function) for record in told} == {(str, name)}
    assert [record.getMessage().partition(": ")[0] for record in told] == [name, name]
    assert (recorder.attempts, recorder.retries, recorder.outcomes) == (["POST request", name], [name], [name])


@pytest.mark.drivers("sqlite")
@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/v1/accounts/5", "GET /v1/accounts/{number}"),
        ("/shops/5/accounts/5", "GET /shops/{shop}/accounts/{number}"),
        ("/plain/6", "GET /plain/{number}"),
        ("/nowhere/4711", "GET request"),
    ],
)
async def test_every_kind_of_route(db, path, name):
    """FastAPI, a router with a prefix, an application mounted under a parameter, a Starlette one; and no route."""
    recorder = Recorder()
    router = APIRouter(prefix="/accounts")

    @router.get("/{number}")
    async def show(number: int) -> int:
        return number

    async def plain(_request):
        return PlainTextResponse("plain")

    shop = FastAPI()
    shop.include_router(router)
    app = FastAPI(
        middleware=[
            Middleware(UnitOfWorkMiddleware, manager=UnitOfWorkManager(db.engine(), observers=[recorder]), atomic=True)
        ],
    )
    app.include_router(router, prefix="/v1")
    app.mount("/shops/{shop}", shop)
    app.router.routes.append(Mount("/plain", Starlette(routes=[Route("/{number}", plain)])))
    async with client_of(app) as client:
        await client.get(path)
    assert recorder.outcomes == [name]


@pytest.mark.drivers("sqlite")
async def test_what_is_refused_in_a_request_names_it(db):
    """`commit()` in an atomic request, as libraries call it, and a write in one that only reads: the route is told."""
    caught = []

    async def commit(_request):
        await current_session().commit()

    async def write(_request):
        current_session().add(Account(id=9, balance=0))
        await current_session().flush()

    async def keep(request, error):
        caught.append(str(error))
        return PlainTextResponse("kept", 500)

    app = Starlette(
        routes=[Route("/commit", commit), Route("/write", write)],
        middleware=[
            Middleware(
                UnitOfWorkMiddleware, manager=UnitOfWorkManager(db.engine()), atomic=True, read_only_methods=["GET"]
            )
        ],
        exception_handlers={**exception_handlers, errors.PropagationError: keep, errors.ReadOnlyError: keep},
    )
    async with client_of(app) as client:
        await client.get("/commit")
        await client.get("/write")
    assert [message.partition(";")[0] for message in caught] == [
        "COMMIT was called inside GET /commit, which commits at its own end",
        "Account(new) was changed in GET /write, which is read-only",
    ]


async def test_a_function_keeps_its_name(trouble):
    """Where `@transactional` is used, the function is named, also behind the middleware."""
    recorder = Recorder()

    @transactional(isolation=trouble.isolation, retries=1)
    async def transfer():
        await trouble.settle()
        await trouble.strike(current_session())

    async def endpoint(_request):
        await transfer()

    manager = UnitOfWorkManager(trouble.engine(), observers=[recorder])
    app = Starlette(routes=[Route("/", endpoint)], middleware=[Middleware(UnitOfWorkMiddleware, manager=manager)])
    async with client_of(app) as client:
        await client.get("/")
    assert recorder.outcomes == ["transfer()"]
    assert [name for name, _ in manager.statistics().contention] == ["transfer()"]


async def test_the_turns_of_requests_are_named(trouble):
    """They take turns by route, once one of them has met a conflict."""
    runs = []

    async def endpoint(_request):
        await trouble.settle()
        runs.append(1)
        if len(runs) < 2:
            await trouble.strike(current_session())
        return PlainTextResponse("done")

    middleware = own(trouble)
    app = Starlette(routes=[Route("/", endpoint)], middleware=[middleware])
    async with client_of(app) as client:
        assert (await client.get("/")).text == "done"
    assert [name for name, _ in middleware.kwargs["manager"].statistics().contention] == ["GET /"]
