"""An application whose requests have keys, in processes that can be killed: ``python -m tests.idempotency.shop SETTINGS``.

The settings are JSON: the URL, the file descriptors of listening sockets, one for each process, and options of the engine.
A process that ends is replaced at once; the sockets stay open meanwhile.  Each birth is told on stdout: ``PORT PID``.
All ends when stdin does.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import secrets
import select
import signal
import socket
import sys

import uvicorn
from sqlalchemy import Column, Integer, MetaData, String, Table, event, text
from sqlalchemy.ext.asyncio import create_async_engine
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.routing import Route

from sqla_uow import UnitOfWorkManager, current_session
from sqla_uow.idempotency import IdempotencyKeys
from sqla_uow_starlette import Idempotency, UnitOfWorkMiddleware, exception_handlers

COUNTERS = 10
metadata = MetaData()
work = Table("work", metadata, Column("token", String(16), primary_key=True), Column("request", String(60), index=True))
counter = Table(
    "counter", metadata, Column("id", Integer, primary_key=True, autoincrement=False), Column("n", Integer, nullable=False)
)  # fmt: skip
keys = IdempotencyKeys(metadata)


async def make_tables(engine):
    """Make what the application needs."""
    async with engine.begin() as connection:
        await connection.run_sync(metadata.create_all)
        await connection.execute(counter.insert(), [{"id": number, "n": 0} for number in range(1, COUNTERS + 1)])


async def carry_out(request):
    """Work once more: a row with the request's key, and a counter that others want, too.

    Each run has an answer of its own, so two runs of one key are seen in their answers.
    """
    session, token = current_session(), secrets.token_hex(8)
    await session.execute(work.insert().values(token=token, request=request.headers["idempotency-key"]))
    chosen = random.randint(1, COUNTERS)
    await session.execute(text("UPDATE counter SET n = n + 1 WHERE id = :id"), {"id": chosen})
    await asyncio.sleep(float(request.headers["seconds"]))
    return JSONResponse({"token": token}, 201, headers={"Location": f"/work/{token}"})


def application(url, options, wait):
    """Make the application over a database."""
    engine = create_async_engine(url, **options)
    if engine.dialect.name == "sqlite":
        event.listen(engine.sync_engine, "connect", _use_wal)
    manager = UnitOfWorkManager(engine)
    idempotency = Idempotency(keys, caller=lambda _scope: "ann", required=True, wait=wait)
    options = {"manager": manager, "atomic": True, "retries": 5, "idempotency": idempotency}
    return Starlette(
        routes=[Route("/work", carry_out, methods=["POST"])],
        middleware=[Middleware(UnitOfWorkMiddleware, **options)],
        exception_handlers=exception_handlers,
    )


def _use_wal(dbapi_connection, _record):
    dbapi_connection.execute("PRAGMA journal_mode=WAL")


def _serve(listener, settings):
    async def serve():
        asyncio.get_running_loop().add_reader(0, os._exit, 0)
        app = application(settings["url"], settings["options"], settings["wait"])
        config = uvicorn.Config(app, log_level="error", access_log=False, lifespan="off")
        await uvicorn.Server(config).serve(sockets=[listener])

    asyncio.run(serve())


def main():
    """Keep one process for each socket."""
    settings = json.loads(sys.argv[1])
    free = [socket.socket(fileno=number) for number in settings["sockets"]]
    at = {}
    while True:
        while free:
            listener = free.pop()
            pid = os.fork()
            if not pid:
                _serve(listener, settings)
                os._exit(1)
            at[pid] = listener
            print(listener.getsockname()[1], pid, flush=True)  # noqa: T201  # what the test reads
        if select.select([0], [], [], 0.01)[0]:
            for pid in at:
                os.kill(pid, signal.SIGKILL)
            return
        ended, _status = os.waitpid(-1, os.WNOHANG)
        if ended:
            free.append(at.pop(ended))


if __name__ == "__main__":
    main()
