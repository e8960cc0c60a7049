"""Applications and clients for the tests of the middleware."""

from __future__ import annotations

import httpx
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.routing import Route

from sqla_uow import current_session, transactional
from sqla_uow_starlette import UnitOfWorkMiddleware
from tests.kit.models import Account


@transactional
async def add(key, balance=0):
    """Write, as the endpoints of many tests do."""
    current_session().add(Account(id=key, balance=balance))


def app_of(manager, *endpoints, around=(), inside=(), exception_handlers=None, lifespan=None, debug=False, **options):
    """Return an application whose endpoints have their function's name as path, and its middleware between others."""
    routes = [Route(f"/{endpoint.__name__}", endpoint, methods=["GET", "POST"]) for endpoint in endpoints]
    own = Middleware(UnitOfWorkMiddleware, manager=manager, **options)
    return Starlette(
        routes=routes,
        middleware=[*around, own, *inside],
        exception_handlers=exception_handlers,
        lifespan=lifespan,
        debug=debug,
    )


def client_of(app, *, raise_app_exceptions=False):
    """Return a client that calls the application without a server between them."""
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=raise_app_exceptions)
    return httpx.AsyncClient(transport=transport, base_url="http://test")
