"""For half an hour: what the process holds does not grow."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import sys
from pathlib import Path

import pytest
from sqlalchemy.ext.asyncio import create_async_engine

from tests.servers import Proxy
from tests.torture.bank import SECONDS, WORKERS, Bank
from tests.torture.harm import SEED, disturb_for, terminate_one, total

SOAK = float(os.environ.get("SQLA_UOW_SOAK", "0"))
"""Seconds of the soak; 1,800 are half an hour."""
SEGMENTS = 12


@pytest.mark.skipif(not SOAK, reason="half an hour: tox -e soak")
@pytest.mark.timeout(SOAK * 1.5 + 300)
@pytest.mark.drivers("asyncpg", "asyncmy")
async def test_it_goes_on_for_long(driver, server):
    """A bad network, terminated sessions and cancelled calls: what the process holds does not grow."""
    chance, held = random.Random(SEED), []
    with Proxy("127.0.0.1", server.port) as proxy:
        engine = create_async_engine(server.url(driver, port=proxy.port), pool_size=WORKERS, pool_timeout=SECONDS)
        bank = Bank(engine, ambiguous_commit="verify", seed=SEED)
        before = _held()
        for _ in range(SEGMENTS):
            work = asyncio.create_task(bank.work())
            harm = asyncio.create_task(_cancel_and_terminate(bank, server, chance))
            faults = await disturb_for(SOAK / SEGMENTS, proxy, chance)
            bank.stop()
            await work
            harm.cancel()
            await asyncio.gather(harm, return_exceptions=True)
            assert not bank.reasons["unknown"]  # but for calls that were cancelled, which nobody waits for
            bank.check(server.execute("SELECT id FROM bank_ledger").split(), total(server))
            told = str(bank)
            bank.forget()
            server.execute("DELETE FROM bank_ledger")
            gc.collect()
            held.append(_held())
            print(f"seed {SEED}: {told}, {faults} faults; holds {held[-1]}", flush=True)  # noqa: T201
        await engine.dispose()
    settled = held[2:]
    assert max(tasks for _, tasks, _, _ in settled) <= min(tasks for _, tasks, _, _ in settled)
    # However many connections the pool has at that moment: each is one of ours, two of the proxy, and one that just ends.
    assert max(descriptors for _, _, descriptors, _ in settled) <= before[2] + 4 * WORKERS
    assert settled[-1][0] < settled[0][0] * 1.02
    assert settled[-1][3] < settled[0][3] * 1.1


async def _cancel_and_terminate(bank, server, chance):
    while True:
        await asyncio.sleep(chance.uniform(0, 0.3))
        if bank.calls:
            chance.choice(list(bank.calls)).cancel()
        if chance.random() < 0.2:
            await asyncio.to_thread(terminate_one, server)


def _held():
    """Return how many blocks of memory Python has, tasks, descriptors and KiB of memory this process has."""
    descriptors = sum(1 for _ in Path("/proc/self/fd").iterdir())
    resident = int(Path("/proc/self/status").read_text().partition("VmRSS:")[2].split()[0])
    return sys.getallocatedblocks(), len(asyncio.all_tasks()), descriptors, resident
