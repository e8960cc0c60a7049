"""No row of another tenant is ever seen or written, no transaction runs without its settings, nothing stays on a connection.

``tox -e tenants`` runs 100,000 units on each driver.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random

import pytest
from sqlalchemy import make_url
from sqlalchemy.ext.asyncio import create_async_engine

from tests.kit.databases import UNPREPARED
from tests.kit.tenants import ROLE, SETUP
from tests.servers import PostgreSQL, Proxy, Standby
from tests.servers.pgbouncer import PgBouncer
from tests.tenants.world import KINDS, World

if (reason := PgBouncer.unavailable()) is not None:
    pytest.skip(reason, allow_module_level=True)
pytestmark = [pytest.mark.drivers("asyncpg", "psycopg"), pytest.mark.direct("it has its own pooler")]

UNITS = int(os.environ.get("SQLA_UOW_TENANT_UNITS", "500"))
WORKERS = 12
TALLY = (
    "CREATE TABLE tally (tenant text PRIMARY KEY, n int NOT NULL)",
    "INSERT INTO tally VALUES ('a', 0), ('b', 0)",
    f"GRANT SELECT, UPDATE ON tally TO {ROLE}",
    "ALTER TABLE parcel ADD COLUMN told text DEFAULT current_setting('app.tenant', true)",
)
# What the server itself was told when the row was written.
WRONG = "SELECT count(*) FROM parcel WHERE body NOT LIKE 'of %' AND tenant IS DISTINCT FROM told"
END_ONE = (
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE backend_type = 'client backend' "
    "AND pid <> pg_backend_pid() AND datname = 'postgres' ORDER BY random() LIMIT 1"
)


@pytest.fixture
def servers():
    """A primary with its standby."""
    if (reason := PostgreSQL.unavailable()) is not None:
        pytest.skip(reason)
    with PostgreSQL({"full_page_writes": "on", "max_connections": "200"}) as primary:
        for statement in (*SETUP, *TALLY):
            primary.execute(statement)
        with Standby(primary) as standby:
            yield primary, standby


async def disturb(primary, proxy, dice):
    """End a session of the server, or cut every connection, now and then."""
    while True:
        await asyncio.sleep(dice.uniform(0.02, 0.3))
        if dice.random() < 0.1:
            await asyncio.to_thread(proxy.cut)
        else:
            await asyncio.to_thread(primary.execute, END_ONE)


@pytest.mark.timeout(60 + UNITS // 10)
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # of connections that were killed
async def test_no_row_of_another_tenant(driver, servers, caplog):
    """Units of every kind at once, with faults, cancellations at every await, killed backends, a pooler and a replica."""
    caplog.set_level(logging.CRITICAL)
    primary, standby = servers
    seed = int(os.environ.get("SQLA_UOW_TORTURE_SEED", random.randrange(10**6)))
    print(f"SQLA_UOW_TORTURE_SEED={seed}")  # noqa: T201  # shown where the test fails
    dice = random.Random(seed)

    def engine(port, *, user=ROLE, **options):
        url = make_url(primary.url(driver, port=port)).set(username=user, password="secret")  # noqa: S106  # of these servers
        return create_async_engine(url, pool_timeout=10, **options)

    with Proxy("127.0.0.1", primary.port) as proxy, PgBouncer(primary, size=3) as pooler:
        engines = {
            "direct": engine(proxy.port, pool_size=8, max_overflow=8),
            "pooled": engine(
                pooler.port, user="postgres", pool_size=8, max_overflow=8, connect_args=UNPREPARED[driver]
            ),
            "faulty": engine(primary.port, pool_size=2),
        }
        replica = engine(standby.port, pool_size=3)
        world = World(engines, replica, dice)
        disturbing = asyncio.create_task(disturb(primary, proxy, dice))
        try:
            await asyncio.gather(*(world.work(UNITS) for _ in range(WORKERS)))
        finally:
            disturbing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await disturbing
        for name in engines:
            for _ in range(8):
                with contextlib.suppress(Exception):  # its connection was killed
                    await world.look_past(name)
        for one in (*engines.values(), replica):
            await one.dispose()
        for client in world.apps.values():
            await client.aclose()
    print(world.units, dict(world.kinds), dict(world.errors))  # noqa: T201  # likewise
    assert world.wrong == []
    assert world.units >= UNITS
    assert len(world.kinds) == len(KINDS)
    assert primary.execute(WRONG) == "0"
    assert [one.pool.checkedout() for one in engines.values()] == [0, 0, 0]
