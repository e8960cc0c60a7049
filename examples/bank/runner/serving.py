"""A real server on loopback, beside what else this process does."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import TYPE_CHECKING

import uvicorn

from examples.bank.runner.waiting import to_the_end

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from starlette.applications import Starlette

__all__ = ["PortTakenError", "served"]

_HOST = "127.0.0.1"
_PATIENCE = 5  # s, for the requests in flight when the server stops


class PortTakenError(Exception):
    """The port cannot be listened on."""


class _Server(uvicorn.Server):
    """Leaves the signals to whoever runs it, and says when it is up."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.up = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.up.set()


@contextlib.asynccontextmanager
async def served(app: Starlette, port: int = 0) -> AsyncIterator[str]:
    """Serve the application until the end of the block.

    Args:
        app: what is served.
        port: where; 0 is any that is free.

    Yields:
        the address.

    Raises:
        PortTakenError: somebody else listens there.
    """
    listener = _listen(port)
    config = uvicorn.Config(
        app,
        log_config=None,
        log_level="warning",
        access_log=False,
        ws_max_size=64 * 1024,
        timeout_graceful_shutdown=_PATIENCE,
    )
    server = _Server(config)
    serving = asyncio.create_task(server.serve(sockets=[listener]), name="server")
    up = asyncio.create_task(server.up.wait())
    try:
        await asyncio.wait({serving, up}, return_when=asyncio.FIRST_COMPLETED)
        if serving.done():
            serving.result()
        yield f"http://{_HOST}:{listener.getsockname()[1]}"
    finally:
        up.cancel()
        server.should_exit = True
        await to_the_end(serving)  # so that the requests in flight end


def _listen(port: int) -> socket.socket:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((_HOST, port))
    except OSError as error:
        listener.close()
        raise PortTakenError(f"port {port} of {_HOST} cannot be listened on ({error.strerror})") from error
    return listener
