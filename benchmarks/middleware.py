"""One request through `UnitOfWorkMiddleware`, through others, and through none, in process and behind uvicorn.

In process the application is called as a server calls it.  Behind uvicorn one keep-alive connection on loopback, served by
the same event loop, waits for each answer: the client's share is in every side's figure.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import TYPE_CHECKING, Any

import uvicorn
from sqlalchemy import text
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import Response
from starlette.routing import Route

from benchmarks import interleaving
from benchmarks.interleaving import Figure, compare, left_out
from benchmarks.web_peers import PEERS, Web
from sqla_uow import UnitOfWorkManager, current_session
from sqla_uow_starlette import UnitOfWorkMiddleware

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable

    from starlette.requests import Request
    from starlette.types import ASGIApp, Message

__all__ = ["BASELINES", "applications", "compared", "in_process", "report"]

SELECT = text("SELECT 1")
CALLS = {"no SQL": 100, "one SELECT": 20}
BASELINES = {"no SQL": "no middleware", "one SELECT": "session by hand"}
OURS: dict[str, dict[str, Any]] = {
    "sqla_uow": {},
    "sqla_uow, atomic": {"atomic": True},
    "sqla_uow, atomic, retries=5": {"atomic": True, "retries": 5},
}


async def nothing(_request: Request) -> Response:
    """Answer, no SQL."""
    return Response(b"done")


def selecting(web: Web) -> Callable[[Request], Awaitable[Response]]:
    """Return an endpoint that sends one SELECT in the session of its middleware."""

    async def endpoint(request: Request) -> Response:
        session = await web.session(request)
        await session.execute(SELECT)
        return Response(b"done")

    return endpoint


async def by_hand(url: str) -> tuple[Callable[[Request], Awaitable[Response]], Callable[[], Awaitable[None]]]:
    """Return an endpoint with a session written into it, committed before the response."""
    engine = create_async_engine(url)
    maker = async_sessionmaker(engine, expire_on_commit=False)

    async def endpoint(_request: Request) -> Response:
        async with maker() as session:
            await session.execute(SELECT)
            await session.commit()
        return Response(b"done")

    return endpoint, engine.dispose


async def ours(url: str, **options: Any) -> Web:
    """Return `UnitOfWorkMiddleware` with these options."""
    manager = UnitOfWorkManager(create_async_engine(url))

    async def session(_request: Request) -> Any:
        return current_session()

    return Web([Middleware(UnitOfWorkMiddleware, manager=manager, **options)], session, manager.engine.dispose)


async def applications(url: str, stack: contextlib.AsyncExitStack) -> dict[str, ASGIApp]:
    """Return an application for each side; the routes are /no SQL and /one SELECT."""
    endpoint, dispose = await by_hand(url)
    stack.push_async_callback(dispose)
    apps: dict[str, ASGIApp] = {
        "no middleware": Starlette(routes=[Route("/nothing", nothing)]),
        "session by hand": Starlette(routes=[Route("/select", endpoint)]),
    }
    webs = {name: await ours(url, **options) for name, options in OURS.items()}
    for name, build in PEERS.items():
        try:
            webs[name] = await build(url)
        except ImportError as error:
            left_out(name, error)
    for name, web in webs.items():
        stack.push_async_callback(web.dispose)
        routes = [Route("/nothing", nothing), Route("/select", selecting(web))]
        apps[name] = Starlette(routes=routes, middleware=web.middleware)
    return apps


def compared(what: str, apps: dict[str, ASGIApp]) -> tuple[str, dict[str, ASGIApp]]:
    """Return the path of a kind of request and who answers it, the baseline first."""
    others = [name for name in apps if name not in BASELINES.values()]
    return "/nothing" if what == "no SQL" else "/select", {name: apps[name] for name in [BASELINES[what], *others]}


def in_process(app: ASGIApp, path: str) -> Callable[[], Awaitable[None]]:
    """Return what sends a request as a server would, without a socket."""
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "GET", "scheme": "http",
        "path": path, "raw_path": path.encode(), "root_path": "", "query_string": b"",
        "headers": [(b"host", b"localhost")], "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80),
    }  # fmt: skip

    async def call() -> None:
        messages: list[Message] = []

        async def receive() -> Message:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Message) -> None:  # as ASGI has it
            messages.append(message)

        await app(dict(scope), receive, send)
        if messages[0]["status"] != Response().status_code:
            raise RuntimeError(f"{path} was answered by {messages[0]['status']}")

    return call


class Server(uvicorn.Server):
    """Leaves the signals alone, and says when it is up."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.up = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Any:
        """Capture none: Ctrl-C ends the benchmark."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, and say so."""
        await super().startup(sockets)
        self.up.set()


@contextlib.asynccontextmanager
async def served(app: ASGIApp, path: str) -> AsyncGenerator[Callable[[], Awaitable[None]]]:
    """Serve an application by uvicorn; yield what sends it a request on a kept connection."""
    # The protocol has to be named: asyncio switches Nagle's algorithm off only where it sees TCP, and 40 ms are not ours.
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.bind(("127.0.0.1", 0))
        server = Server(uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", timeout_keep_alive=600))
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        await server.up.wait()
        reader, writer = await asyncio.open_connection(*listener.getsockname())
        request = f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()

        async def call() -> None:
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            if not head.startswith(b"HTTP/1.1 200 "):
                raise RuntimeError(f"{path} was answered by {head.splitlines()[0]!r}")
            await reader.readexactly(len(b"done"))

        try:
            yield call
        finally:
            writer.close()
            server.should_exit = True
            await serving


async def measure(url: str, rounds: int) -> dict[str, dict[str, Figure]]:
    """Return the figures of every side, for each kind of request."""
    figures = {}
    async with contextlib.AsyncExitStack() as stack:
        apps = await applications(url, stack)
        for what in BASELINES:
            path, sides = compared(what, apps)
            calls = {name: in_process(app, path) for name, app in sides.items()}
            figures[f"in process, {what}"] = await compare(calls, CALLS[what], rounds)
            async with contextlib.AsyncExitStack() as servers:
                calls = {name: await servers.enter_async_context(served(app, path)) for name, app in sides.items()}
                figures[f"uvicorn, {what}"] = await compare(calls, CALLS[what], rounds)
    return figures


def report(url: str, rounds: int) -> dict[str, dict[str, dict[str, float]]]:
    """Measure, print the tables, and return the figures."""
    return interleaving.report(asyncio.run(measure(url, rounds)))
