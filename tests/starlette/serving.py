"""A real server for the applications that a test builds."""

from __future__ import annotations

import asyncio
import contextlib
import socket

import uvicorn


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
