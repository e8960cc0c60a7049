"""What the tests of the middleware begin with."""

from __future__ import annotations

import pytest

from sqla_uow import UnitOfWorkManager


@pytest.fixture
async def manager(db):
    """A manager whose pool lends one connection, and has it back at the end."""
    await db.run("INSERT INTO account (id, balance) VALUES (1, 10)")
    engine = db.engine(pool_size=1, max_overflow=0, pool_timeout=2)
    yield UnitOfWorkManager(engine)
    assert engine.pool.checkedout() == 0
