"""The server is full, of connections or of data: what cannot be done is not done, and as soon as there is room it goes on."""

from __future__ import annotations

import asyncio
import contextlib
import time

import pytest
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from tests.kit.databases import SERVERS
from tests.kit.waiting import until
from tests.servers import MariaDB, PostgreSQL, SmallDisk
from tests.torture.bank import Bank
from tests.torture.harm import LONG, MARKS, NO_ROOM, answers, banking, fill, modes

pytestmark = MARKS

# PostgreSQL compresses rows from 2,000 bytes; InnoDB asks for 4 MB at a time.
NOTES = {PostgreSQL: "x" * 1500, MariaDB: "x" * 4000}


@pytest.fixture
def disk(driver, settings):
    """A small disk."""
    if (reason := SmallDisk.unavailable()) is not None:
        pytest.skip(reason)
    if SERVERS[driver] is PostgreSQL:
        settings |= {"max_wal_size": "48MB", "min_wal_size": "32MB"}
    return SmallDisk(256)


@modes
async def test_the_disk_is_full(driver, settings, disk, mode):
    """Statements are refused, or the server ends; calls fail with that, and go on within two seconds of its being up."""
    up, refused = [], {"note": NOTES[SERVERS[driver]], "permanent": NO_ROOM}
    with SERVERS[driver](settings, disk=disk) as server:
        server.execute(";".join(Bank.tables()))
        async with banking(driver, server, mode, bank=refused) as bank:
            end = time.monotonic() + LONG
            while time.monotonic() < end:
                await asyncio.sleep(1)
                await fill(disk, bank)
                if len(up) % 2:
                    await asyncio.to_thread(_end_for_want_of_room, server)
                await asyncio.to_thread(disk.free)
                await _come_back(server)
                up.append(time.monotonic())
            await asyncio.sleep(2)
    print(f"{len(up)} times full; going on after {bank.longest_wait_after(up):.2f} s at most")  # noqa: T201
    assert bank.longest_wait_after(up) < 2
    if mode == "verify":
        assert bank.unknown == []


def _end_for_want_of_room(server):
    """Make PostgreSQL need another file for its log, which ends it; MariaDB has its log from the start, and is killed."""
    if isinstance(server, MariaDB):
        server.kill()
        return
    while answers(server):
        server._ask("SELECT pg_switch_wal()", server.database)  # in the course of which it ends


async def _come_back(server):
    """Wait for a server that recovers by itself; start one that has ended, or does not come to its end."""
    with contextlib.suppress(TimeoutError):  # PostgreSQL 18.6 can hang for ever when its recovery has failed
        await until(lambda: server.pid is None or not server.is_running() or answers(server))
    if server.pid is not None and not answers(server):
        await asyncio.to_thread(server.kill)
    if server.pid is None:
        await asyncio.to_thread(server.restart)


@modes
async def test_others_take_all_connections(driver, server, mode):
    """The server is full now and then: calls that cannot begin are begun again."""
    limit = "max_connections"
    if isinstance(server, MariaDB):
        server.execute(f"SET GLOBAL {limit} = 20")
    others = create_async_engine(server.url(driver), poolclass=NullPool)
    full = 0
    async with banking(driver, server, mode, poolclass=NullPool) as bank:
        end = time.monotonic() + LONG
        while time.monotonic() < end:
            held = []
            try:
                while len(held) < 60:
                    connection = others.connect()
                    await connection.start()
                    held.append(connection)
            except Exception:  # noqa: BLE001  # full, in the words of each driver
                full += 1
            await asyncio.sleep(0.3)
            for connection in held:
                await connection.close()
            await asyncio.sleep(0.3)
    print(f"{full} times full")  # noqa: T201
    assert full > 0
    assert bank.unknown == []
