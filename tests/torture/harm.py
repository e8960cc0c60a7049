"""What the tortures have in common: the bank at work while a block does harm, and harms that more than one of them does."""

from __future__ import annotations

import asyncio
import os
import random
import time
from contextlib import asynccontextmanager

import pytest
from sqlalchemy.ext.asyncio import create_async_engine

from tests.kit.waiting import until
from tests.servers import PostgreSQL
from tests.torture.bank import SECONDS, WORKERS, Bank

LONG = float(os.environ.get("SQLA_UOW_TORTURE", "10"))
"""Seconds of each torture."""
SEED = int(os.environ.get("SQLA_UOW_TORTURE_SEED", "0")) or random.SystemRandom().randrange(1, 1_000_000)
MARKS = [pytest.mark.drivers("asyncpg", "psycopg", "asyncmy", "aiomysql"), pytest.mark.timeout(LONG * 4 + 120)]

NO_ROOM = {
    "53100",  # PostgreSQL: disk full
    1114,  # MariaDB: the table is full
    13,  # SQLITE_FULL
}

modes = pytest.mark.parametrize("mode", ["raise", "verify"])


@asynccontextmanager
async def banking(driver, server, mode, *, port=None, bank=None, **options):
    """Let the bank work while the block does harm; then look what is there.

    Args:
        driver: by which the bank speaks to it.
        server: that of the bank.
        mode: what becomes of a COMMIT whose answer was lost.
        port: of a proxy before the server.
        bank: options of `Bank`.
        options: of the engine.
    """
    options = options or {"pool_size": WORKERS, "pool_timeout": SECONDS}
    engine = create_async_engine(server.url(driver, port=port), **options)
    bank = Bank(engine, ambiguous_commit=mode, seed=SEED, **(bank or {}))
    work = asyncio.create_task(bank.work())
    try:
        yield bank
    finally:
        bank.stop()
        try:
            await work
            await until(lambda: answers(server))
            await until(lambda: not _open_transactions(server), pause=0.2)  # now: to dispose of the engine ends them
        finally:
            await engine.dispose()
    print(f"\nseed {SEED}: {bank}")  # noqa: T201  # the figures in the docs
    ledger = server.execute("SELECT id FROM bank_ledger").split()
    bank.check(ledger, total(server))
    assert bank.acknowledged


def _open_transactions(server):
    """Return how many transactions somebody has left open."""
    if isinstance(server, PostgreSQL):
        return int(server.execute("SELECT count(*) FROM pg_stat_activity WHERE state LIKE 'idle in transaction%'"))
    return int(server.execute("SELECT count(*) FROM information_schema.innodb_trx"))


def answers(server):
    """Say whether the server lets anybody in."""
    return server._ask("SELECT 1", server.database).returncode == 0


def total(server):
    """Return the sum of all balances."""
    return int(server.execute("SELECT sum(balance) FROM bank_account"))


def terminate_one(server):
    """End one of the bank's sessions, wherever it is; return how many were ended."""
    if isinstance(server, PostgreSQL):
        who = "backend_type = 'client backend' AND pid <> pg_backend_pid()"
        ended = server.execute(
            f"SELECT count(pg_terminate_backend(pid)) FROM (SELECT pid FROM pg_stat_activity WHERE {who} "
            "ORDER BY random() LIMIT 1) AS one"
        )
        return int(ended)
    who = server.execute(
        "SELECT id FROM information_schema.processlist WHERE id <> connection_id() AND user = 'u' ORDER BY rand() LIMIT 1"
    )
    if who:
        server._ask(f"KILL {who}", server.database)  # refused if it has left by itself
    return bool(who)


async def disturb_for(seconds, proxy, chance):
    """Do one harm after the other; return how many."""
    faults, end = 0, time.monotonic() + seconds
    while time.monotonic() < end:
        _disturb(proxy, chance)
        faults += 1
        await asyncio.sleep(chance.uniform(0.02, 0.3))
        proxy.forward_all()
        if chance.random() < 0.5:
            proxy.cut()
        await asyncio.sleep(chance.uniform(0.02, 0.3))
    proxy.forward_all()
    proxy.cut()  # who waits for bytes that were dropped waits for ever
    return faults


def _disturb(proxy, chance):
    direction = chance.choice(["to_server", "to_client"])
    what = chance.choice(["hold", "drop", "delay", "cut", "refuse", "commit"])
    if what == "delay":
        proxy.delay(direction, chance.uniform(0.001, 0.05))
    elif what in ("hold", "drop"):
        getattr(proxy, what)(direction)
    elif what == "commit":
        proxy.on_client_bytes(b"COMMIT", "cut", after_server=chance.random() < 0.5)
    else:
        getattr(proxy, what)()


async def fill(disk, bank):
    """Leave no room, whatever is given back meanwhile, until a second after the first call was refused."""
    before = _refusals(bank)
    end = time.monotonic() + 30
    while time.monotonic() < end:
        await asyncio.to_thread(disk.fill)
        await asyncio.sleep(0.05)
        if before is not None and _refusals(bank) > before:
            before, end = None, time.monotonic() + 1
    assert before is None, "nothing was refused"


def _refusals(bank):
    return sum(bank.reasons[code] for code in NO_ROOM)
