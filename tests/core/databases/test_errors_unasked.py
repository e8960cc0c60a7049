"""A server that ends a session tells why, unasked, before it closes the connection."""

from __future__ import annotations

import asyncio
import contextlib

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from sqla_uow import UnitOfWorkManager
from sqla_uow.errors import ConflictError

pytestmark = pytest.mark.drivers("asyncpg")


def message(kind, content):
    """Spell a message of PostgreSQL's protocol."""
    return kind + (len(content) + 4).to_bytes(4) + content


GREETING = message(b"R", bytes(4)) + message(b"S", b"server_version\x0018.0\x00") + message(b"Z", b"I")
TOLD = message(b"E", b"SFATAL\x00VFATAL\x00C08P01\x00Mserver conn crashed?\x00\x00")


@contextlib.asynccontextmanager
async def pooler():
    """A pooler that loses its server as soon as a session begins; a real one does so only now and then, when that is killed."""

    async def serve(reader, writer):
        head = await reader.readexactly(8)
        if int.from_bytes(head[4:]) == 80877103:  # asks for TLS
            writer.write(b"N")
            head = await reader.readexactly(8)
        await reader.readexactly(int.from_bytes(head[:4]) - 8)
        writer.write(GREETING + TOLD)
        await reader.read()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    yield server.sockets[0].getsockname()[1]
    server.close()


async def test_an_error_before_the_first_statement(driver):
    """It is a server that is away, so the unit is run again, and a web service answers 503."""
    async with pooler() as port:
        engine = create_async_engine(f"postgresql+asyncpg://u@127.0.0.1:{port}/d")
        with pytest.raises(ConflictError) as caught:
            async for attempt in UnitOfWorkManager(engine).attempts(retries=1):
                async with attempt as unit:
                    await unit.session.execute(text("SELECT 1"))
        await engine.dispose()
    assert (caught.value.attempts, caught.value.reason) == (2, "not started")
