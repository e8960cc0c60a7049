"""A real server for applications that a test builds."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager

import uvicorn


@asynccontextmanager
async def served(app, **options):
    """Serve an application by uvicorn, in this event loop; yield its address."""
    config = uvicorn.Config(app, port=0, log_config=None, **({"lifespan": "off"} | options))
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server._serve())  # serve() would take the process's signals
    try:
        async with asyncio.timeout(10):
            while not server.started:  # noqa: ASYNC110  # uvicorn tells nobody
                await asyncio.sleep(0.01)
        host, port = server.servers[0].sockets[0].getsockname()
        yield f"{host}:{port}"
    finally:
        server.should_exit = True
        await serving


async def until_free(engine):
    """Wait until nothing is checked out of the engine's pool."""
    async with asyncio.timeout(10):
        while engine.pool.checkedout():  # noqa: ASYNC110  # the pool tells nobody
            await asyncio.sleep(0.01)
