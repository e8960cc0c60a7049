"""Applications, clients and a server for the tests of the middleware."""

from __future__ import annotations

import asyncio
import contextlib
import socket

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.routing import Route

from sqla_uow_starlette import UnitOfWorkMiddleware


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


class Server(uvicorn.Server):
    """Leaves the signals alone, and says when it is up."""

    def __init__(self, config):
        super().__init__(config)
        self.up = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self):
        yield

    async def startup(self, sockets=None):
        await super().startup(sockets)
        self.up.set()


@contextlib.asynccontextmanager
async def served(app, **options):
    """Serve the application; give the port and the server."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    config = uvicorn.Config(app, log_config=None, access_log=False, **options)
    server = Server(config)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        await server.up.wait()
        yield listener.getsockname()[1], server
    finally:
        server.should_exit = True
        await serving
        listener.close()


async def first_byte(port, request):
    """Send a request; return the first byte of what comes back, b"" if nothing does, the reader and the writer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    return await reader.read(1), reader, writer
