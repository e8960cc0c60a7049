"""Settings on a replica: its transactions are told first as well."""

from __future__ import annotations

import pytest
from sqlalchemy import text

from sqla_uow import UnitOfWorkManager, current_session
from tests.kit.tenants import tenant

pytestmark = pytest.mark.drivers("asyncpg", "psycopg")

WHERE = text("SELECT pg_is_in_recovery(), current_setting('app.tenant', true)")


async def test_each_reader_has_its_own(pair):
    """Units that only read, and read sessions that end with a change of the tenant, there and on the primary."""
    calls = []

    async def on_begin(unit):
        calls.append(await unit.session.scalar(text("SELECT pg_is_in_recovery()")))

    manager = UnitOfWorkManager(
        pair.engine(pair.primary, pool_size=1, max_overflow=0),
        replicas=[pair.engine(pair.replica, pool_size=1, max_overflow=0)],
        settings={"app.tenant": tenant.get},
        on_begin=on_begin,
    )
    await pair.caught_up()
    token = tenant.set("a")
    try:
        for whose in ("a", "b", "a"):
            tenant.set(whose)
            async with manager.begin(read_only=True) as unit:
                assert (await unit.session.execute(WHERE)).one() == (True, whose)
            async with manager.begin(timeout=5) as unit:
                assert (await unit.session.execute(WHERE)).one() == (False, whose)
        async with manager.scope():
            for whose in ("a", "b", "a"):
                tenant.set(whose)
                assert (await current_session(manager).execute(WHERE)).one() == (True, whose)
    finally:
        tenant.reset(token)
    assert calls == [True, False] * 3 + [True] * 3
    assert [one.pool.checkedout() for one in (manager.engine, *manager.replicas)] == [0, 0]
    for engine in (manager.engine, *manager.replicas):
        async with engine.connect() as connection:
            assert (await connection.execute(WHERE)).one()[1] in (None, "")
