"""A relay before PostgreSQL that changes one thing: which version the server announces when a connection is made."""

from __future__ import annotations

import asyncio
import struct
from contextlib import asynccontextmanager

_VERSION = b"server_version\0"
_LENGTH = 4


@asynccontextmanager
async def announced_as(version, server_port):
    """Yield the port of a server that is the one at `server_port`, but for its `server_version`."""
    links = set()

    async def relay(reader, writer):
        links.add(asyncio.current_task())
        its_reader, its_writer = await asyncio.open_connection("127.0.0.1", server_port)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(_pump(reader, its_writer))
                group.create_task(_greet(its_reader, writer, version))
        except* (OSError, asyncio.IncompleteReadError):
            pass  # one side has left
        finally:
            for side in (its_writer, writer):
                side.close()

    server = await asyncio.start_server(relay, "127.0.0.1", 0)
    yield server.sockets[0].getsockname()[1]
    server.close()
    for link in links:
        link.cancel()
    await asyncio.gather(*links, return_exceptions=True)


async def _pump(reader, writer):
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.write_eof()


async def _greet(reader, writer, version):
    """Hand on message by message until the announcement has come, and everything after it as it is."""
    while (kind := await reader.readexactly(1)) == b"N":  # no TLS, no GSSAPI
        writer.write(kind)
    while True:
        (length,) = struct.unpack("!I", await reader.readexactly(_LENGTH))
        body = await reader.readexactly(length - _LENGTH)
        if kind == b"S" and body.startswith(_VERSION):
            body = _VERSION + version.encode() + b"\0"
        writer.write(kind + struct.pack("!I", len(body) + _LENGTH) + body)
        await writer.drain()
        if kind == b"Z":  # ReadyForQuery
            break
        kind = await reader.readexactly(1)
    await _pump(reader, writer)
