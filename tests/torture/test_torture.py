"""Whatever happens to the servers: what was acknowledged is there once, what was reported as failed is not there."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import time
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from sqlalchemy import event
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from tests.databases import SERVERS
from tests.servers import MariaDB, PostgreSQL, Proxy, Standby
from tests.torture.bank import SECONDS, WORKERS, Bank
from tests.waiting import until

LONG = float(os.environ.get("SQLA_UOW_TORTURE", "10"))
"""Seconds of each torture."""
SOAK = float(os.environ.get("SQLA_UOW_SOAK", "0"))
"""Seconds of the soak; 1,800 are half an hour."""
SEGMENTS = 12
SEED = int(os.environ.get("SQLA_UOW_TORTURE_SEED", "0")) or random.SystemRandom().randrange(1, 1_000_000)

pytestmark = [pytest.mark.drivers("asyncpg", "psycopg", "asyncmy", "aiomysql"), pytest.mark.timeout(LONG * 4 + 120)]
modes = pytest.mark.parametrize("mode", ["raise", "verify"])


@pytest.fixture
def server(driver):
    """A server of this test's own, with the bank's tables."""
    kind = SERVERS[driver]
    if (reason := kind.unavailable()) is not None:
        pytest.skip(reason)
    settings = {"innodb_flush_log_at_trx_commit": "2"} if kind is MariaDB else {"max_connections": "60"}
    with kind(settings) as server:
        server.execute(";".join(Bank.tables()))
        yield server


@asynccontextmanager
async def banking(driver, server, mode, *, port=None, **options):
    """Let the bank work while the block does harm; then look what is there."""
    options = options or {"pool_size": WORKERS, "pool_timeout": SECONDS}
    engine = create_async_engine(server.url(driver, port=port), **options)
    bank = Bank(engine, ambiguous_commit=mode, seed=SEED)
    work = asyncio.create_task(bank.work())
    try:
        yield bank
    finally:
        bank.stop()
        await work
        await engine.dispose()
    print(f"\nseed {SEED}: {bank}")  # noqa: T201  # the figures in the docs
    await until(lambda: _answers(server))
    ledger = server.execute("SELECT id FROM bank_ledger").split()
    bank.check(ledger, _total(server))
    assert bank.acknowledged


def _answers(server):
    return server._ask("SELECT 1", server.database).returncode == 0


@modes
async def test_the_server_is_killed_every_second(driver, server, mode):
    """It recovers each time; the workers go on within two seconds."""
    up = []
    async with banking(driver, server, mode) as bank:
        end = time.monotonic() + LONG
        while time.monotonic() < end:
            await asyncio.sleep(1)
            await asyncio.to_thread(server.kill)
            await asyncio.to_thread(server.restart)
            up.append(time.monotonic())
        await asyncio.sleep(2)
    print(f"{len(up)} restarts; going on after {bank.longest_wait_after(up):.2f} s at most")  # noqa: T201
    assert bank.longest_wait_after(up) < 2
    if mode == "verify":
        assert bank.unknown == []


@modes
async def test_sessions_are_terminated(driver, server, mode):
    """One after the other, wherever it is."""
    kills = 0
    async with banking(driver, server, mode) as bank:
        end = time.monotonic() + LONG
        while time.monotonic() < end:
            kills += await asyncio.to_thread(_terminate_one, server)
            await asyncio.sleep(0.02)
    print(f"{kills} sessions terminated")  # noqa: T201
    assert kills > LONG
    if mode == "verify":
        assert bank.unknown == []


def _terminate_one(server):
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


@modes
async def test_the_network_is_bad(driver, server, mode):
    """Bytes are dropped, delayed, held back and cut off in either direction."""
    with Proxy("127.0.0.1", server.port) as proxy:
        async with banking(driver, server, mode, port=proxy.port) as bank:
            faults = await _disturb_for(LONG, proxy, random.Random(SEED))
    print(f"{faults} faults")  # noqa: T201
    if mode == "verify":
        assert bank.unknown == []


async def _disturb_for(seconds, proxy, chance):
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


@modes
async def test_tasks_are_cancelled(driver, server, mode):
    """At random, as often as they come by; the status of the unit says what became of it."""
    chance = random.Random(SEED)
    cancelled = 0
    async with banking(driver, server, mode) as bank:
        end = time.monotonic() + LONG
        while time.monotonic() < end:
            await asyncio.sleep(chance.uniform(0, 0.01))
            if bank.calls:
                chance.choice(list(bank.calls)).cancel()
                cancelled += 1
    print(f"{cancelled} cancelled")  # noqa: T201
    assert cancelled > LONG
    assert bank.unknown == []


@modes
@pytest.mark.drivers("asyncpg", "psycopg")
async def test_the_standby_is_promoted(driver, mode):
    """What was acknowledged is at the standby, as it was asked to wait for it; the workers go on there."""
    with PostgreSQL({"synchronous_standby_names": "*", "max_connections": "60"}) as primary:
        primary.execute("SET synchronous_commit = local; " + ";".join(Bank.tables()))
        with Standby(primary, {"max_connections": "60"}) as standby:
            leader = [primary.port]
            engine = create_async_engine(primary.url(driver), pool_size=WORKERS, pool_timeout=SECONDS)

            @event.listens_for(engine.sync_engine, "do_connect")
            def _connect(_dialect, _record, _arguments, parameters):
                parameters["port"] = leader[0]

            bank = Bank(engine, ambiguous_commit=mode, seed=SEED)
            work = asyncio.create_task(bank.work())
            await asyncio.sleep(min(LONG, 3))
            await asyncio.to_thread(primary.kill)
            await asyncio.to_thread(standby.execute, "SELECT pg_promote()")
            leader[0] = standby.port
            promoted = time.monotonic()
            await asyncio.sleep(min(LONG, 4))
            bank.stop()
            await work
            await engine.dispose()
            print(f"\n{bank}; going on after {bank.longest_wait_after([promoted]):.2f} s")  # noqa: T201
            ledger = standby.execute("SELECT id FROM bank_ledger").split()
            bank.check(ledger, _total(standby))
            assert bank.longest_wait_after([promoted]) < 2


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


@pytest.mark.skipif(not SOAK, reason="half an hour: tox -e soak")
@pytest.mark.timeout(SOAK * 1.5 + 300)
@pytest.mark.drivers("asyncpg", "asyncmy")
async def test_it_goes_on_for_long(driver, server):
    """A bad network, terminated sessions and cancelled calls: what the process holds does not grow."""
    chance, held = random.Random(SEED), []
    with Proxy("127.0.0.1", server.port) as proxy:
        engine = create_async_engine(server.url(driver, port=proxy.port), pool_size=WORKERS, pool_timeout=SECONDS)
        bank = Bank(engine, ambiguous_commit="verify", seed=SEED)
        for _ in range(SEGMENTS):
            work = asyncio.create_task(bank.work())
            harm = asyncio.create_task(_cancel_and_terminate(bank, server, chance))
            await _disturb_for(SOAK / SEGMENTS, proxy, chance)
            bank.stop()
            await work
            harm.cancel()
            await asyncio.gather(harm, return_exceptions=True)
            bank.check(server.execute("SELECT id FROM bank_ledger").split(), _total(server))
            bank.forget()
            server.execute("DELETE FROM bank_ledger")
            gc.collect()
            held.append(_held())
            print(held[-1], flush=True)  # noqa: T201
        await engine.dispose()
    settled = held[2:]
    assert max(tasks for _, tasks, _, _ in settled) <= min(tasks for _, tasks, _, _ in settled)
    assert settled[-1][2] <= settled[0][2] + WORKERS
    assert settled[-1][0] < settled[0][0] * 1.02
    assert settled[-1][3] < settled[0][3] * 1.1


async def _cancel_and_terminate(bank, server, chance):
    while True:
        await asyncio.sleep(chance.uniform(0, 0.3))
        if bank.calls:
            chance.choice(list(bank.calls)).cancel()
        if chance.random() < 0.2:
            await asyncio.to_thread(_terminate_one, server)


def _total(server):
    return int(server.execute("SELECT sum(balance) FROM bank_account"))


def _held():
    """Return how many objects, tasks, descriptors and KiB of memory this process has."""
    descriptors = sum(1 for _ in Path("/proc/self/fd").iterdir())
    resident = int(Path("/proc/self/status").read_text().partition("VmRSS:")[2].split()[0])
    return len(gc.get_objects()), len(asyncio.all_tasks()), descriptors, resident
