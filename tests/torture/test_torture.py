"""Whatever happens to the servers: what was acknowledged is there once, what was reported as failed is not there."""

from __future__ import annotations

import asyncio
import random
import time

import pytest
from sqlalchemy import event
from sqlalchemy.ext.asyncio import create_async_engine

from tests.servers import PostgreSQL, Proxy, Standby
from tests.servers.pgbouncer import PgBouncer
from tests.torture.bank import SECONDS, WORKERS, Bank
from tests.torture.harm import LONG, MARKS, SEED, banking, disturb_for, modes, terminate_one, total

pytestmark = MARKS


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
            kills += await asyncio.to_thread(terminate_one, server)
            await asyncio.sleep(0.02)
    print(f"{kills} sessions terminated")  # noqa: T201
    assert kills > LONG
    if mode == "verify":
        assert bank.unknown == []


@modes
async def test_the_network_is_bad(driver, server, mode):
    """Bytes are dropped, delayed, held back and cut off in either direction."""
    with Proxy("127.0.0.1", server.port) as proxy:
        async with banking(driver, server, mode, port=proxy.port) as bank:
            faults = await disturb_for(LONG, proxy, random.Random(SEED))
    print(f"{faults} faults")  # noqa: T201
    if mode == "verify":
        assert bank.unknown == []


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
            bank.check(ledger, total(standby))
            assert bank.longest_wait_after([promoted]) < 2


@modes
@pytest.mark.drivers("asyncpg", "psycopg")
async def test_a_pooler_and_its_server_are_killed(driver, server, mode):
    """Now one, now the other, now both: the workers go on two seconds after the pooler asks for the server again."""
    if (reason := PgBouncer.unavailable()) is not None:
        pytest.skip(reason)
    chance, up = random.Random(SEED), []
    # Seconds; 15 by default, which is as long as a call may take.
    patience = 1
    with PgBouncer(server, size=WORKERS // 2, settings={"server_login_retry": str(patience)}) as pooler:
        unprepared = {"asyncpg": {"statement_cache_size": 0}, "psycopg": {"prepare_threshold": None}}[driver]
        pool = {"pool_size": WORKERS, "pool_timeout": SECONDS, "connect_args": unprepared}
        async with banking(driver, server, mode, port=pooler.port, **pool) as bank:
            end = time.monotonic() + LONG
            while time.monotonic() < end:
                await asyncio.sleep(3)
                pooler_too, server_too = chance.choice([(True, False), (False, True), (True, True)])
                if server_too:
                    await asyncio.to_thread(server.kill)
                if pooler_too:
                    await asyncio.to_thread(pooler.restart)
                if server_too:
                    await asyncio.to_thread(server.restart)
                up.append(time.monotonic())
            await asyncio.sleep(3)
    print(f"{len(up)} restarts; going on after {bank.longest_wait_after(up):.2f} s at most")  # noqa: T201
    assert bank.longest_wait_after(up) < 2 + patience
    if mode == "verify":
        assert bank.unknown == []
