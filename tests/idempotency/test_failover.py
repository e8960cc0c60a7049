"""After a failover work and record are there together, or lost together."""

from __future__ import annotations

import pytest
from sqlalchemy import MetaData, text
from sqlalchemy.ext.asyncio import create_async_engine

from sqla_uow import UnitOfWorkManager, current_session, transactional
from sqla_uow.idempotency import IdempotencyKeys
from tests.kit.databases import SERVERS
from tests.kit.waiting import until
from tests.servers import MariaDB, PostgreSQL, Replica, Standby

pytestmark = [
    pytest.mark.drivers("asyncpg", "psycopg", "asyncmy", "aiomysql"),
    pytest.mark.direct("it has servers of its own"),
]
DEAF = {
    PostgreSQL: "ALTER SYSTEM SET primary_conninfo = ''; SELECT pg_reload_conf()",
    MariaDB: "STOP SLAVE",
}
WRITABLE = {PostgreSQL: "SELECT pg_promote()", MariaDB: "STOP SLAVE; SET GLOBAL read_only = 0"}
WORK = "SELECT count(*) FROM work"


@pytest.fixture
def servers(driver):
    """A server, and one that is to take its place."""
    kind = SERVERS[driver]
    if (reason := kind.unavailable()) is not None:
        pytest.skip(reason)
    primary = PostgreSQL() if kind is PostgreSQL else MariaDB({"log_bin": "log", "server_id": "1"})
    with primary, Standby(primary) if kind is PostgreSQL else Replica(primary) as other:
        yield primary, other


@pytest.mark.parametrize("arrived", [True, False])
async def test_the_next_server(driver, servers, arrived):
    """To one that has the commit a repetition is a repetition; to one that never got it, it is the first."""
    primary, other = servers
    kind, metadata = SERVERS[driver], MetaData()
    keys = IdempotencyKeys(metadata)

    @transactional(retries=5)
    async def handle():
        if not await keys.claim("orders", "a"):
            return False
        await current_session().execute(text("INSERT INTO work (id) VALUES (1)"))
        return True

    async def delivered(server):
        engine = create_async_engine(server.url(driver))
        try:
            with UnitOfWorkManager(engine).activate():
                return await handle()
        finally:
            await engine.dispose()

    primary.execute("CREATE TABLE work (id INTEGER PRIMARY KEY)")
    engine = create_async_engine(primary.url(driver))
    async with engine.begin() as connection:
        await connection.run_sync(metadata.create_all)
    await engine.dispose()
    await until(lambda: other._ask("SELECT count(*) FROM uow_idempotency", other.database).returncode == 0)
    if not arrived:
        other.execute(DEAF[kind])
        if kind is PostgreSQL:
            await until(lambda: other.execute("SELECT count(*) FROM pg_stat_wal_receiver") == "0")
    assert await delivered(primary)
    if arrived:
        await until(lambda: other.execute(WORK) == "1")
    primary.kill()
    other.execute(WRITABLE[kind])
    assert other.execute(WORK) == ("1" if arrived else "0")
    assert await delivered(other) is not arrived
    assert other.execute(WORK) == "1"
    assert not await delivered(other)
