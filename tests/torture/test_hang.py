"""The server hangs, which no error tells: calls wait for as long as they may, and no longer."""

from __future__ import annotations

import asyncio
import random
import time

from sqla_uow._unit.ending import IDLE_SECONDS
from sqla_uow._unit.rollback import ROLLBACK_SECONDS
from tests.torture.harm import LONG, MARKS, SEED, banking, modes

pytestmark = MARKS

PATIENCE = ROLLBACK_SECONDS + IDLE_SECONDS
"""Seconds for which the end of a unit waits for a server that does not answer; as long as psycopg does, with our own try."""


async def _hang(server, seconds):
    """Freeze the server for a while; return the moment from which it goes on."""
    await asyncio.to_thread(server.freeze)
    await asyncio.sleep(seconds)
    await asyncio.to_thread(server.thaw)
    return time.monotonic()


@modes
async def test_the_server_hangs_for_a_while(driver, server, mode):
    """Shorter than a call may take: nobody notices."""
    chance, up = random.Random(SEED), []
    async with banking(driver, server, mode) as bank:
        end = time.monotonic() + LONG
        while time.monotonic() < end:
            await asyncio.sleep(0.5)
            up.append(await _hang(server, chance.uniform(0.1, 2)))
        await asyncio.sleep(2)
    print(f"{len(up)} times; going on after {bank.longest_wait_after(up):.2f} s at most")  # noqa: T201
    assert bank.longest_wait_after(up) < 2
    assert (bank.failed, bank.unknown) == ([], [])


@modes
async def test_the_server_hangs_for_longer_than_a_call_may_take(driver, server, mode):
    """Each call ends when its time is up and its statement was given up, and the workers go on within two seconds."""
    up, impatient = [], {"timeout": 2}
    async with banking(driver, server, mode, bank=impatient) as bank:
        end = time.monotonic() + LONG
        while time.monotonic() < end:
            await asyncio.sleep(3)
            up.append(await _hang(server, 20))
        await asyncio.sleep(3)
    print(f"{len(up)} times; going on after {bank.longest_wait_after(up):.2f} s at most")  # noqa: T201
    assert bank.longest_wait_after(up) < 2
    assert bank.longest_call < 2 + PATIENCE + 1
    assert bank.reasons["timeout"]
