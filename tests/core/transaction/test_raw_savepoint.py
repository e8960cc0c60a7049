"""A savepoint that is set and undone on the driver's own connection makes good what failed in it."""

from __future__ import annotations

import contextlib

import pytest

from sqla_uow import Status, UnitOfWorkManager
from tests.kit.models import Account
from tests.kit.raw import raw_of

pytestmark = pytest.mark.drivers("asyncpg", "psycopg")


async def test_a_failure_in_a_savepoint_of_the_drivers(db):
    """The server goes on, and so does the unit."""
    manager = UnitOfWorkManager(db.engine(pool_size=1, max_overflow=0))
    async with manager.begin() as unit:
        unit.session.add(Account(id=1))
        await unit.session.flush()
        raw = await raw_of(unit.session)
        with contextlib.suppress(Exception):
            async with raw.transaction():
                await raw.execute("SELECT nonsense")
        unit.session.add(Account(id=2))
    assert unit.status is Status.COMMITTED
    assert await db.rows("SELECT id FROM account ORDER BY id") == [(1,), (2,)]
