"""What the tests of idempotency keys begin with."""

from __future__ import annotations

import pytest
from sqlalchemy import MetaData

from sqla_uow import UnitOfWorkManager
from sqla_uow.idempotency import IdempotencyKeys
from tests.kit.keys import keys_in


@pytest.fixture
async def keys(db):
    """Keys whose table is there."""
    return await keys_in(db)


@pytest.fixture
async def manager(db):
    """An activated manager, whose pool has everything back at the end."""
    await db.run("INSERT INTO account (id, balance) VALUES (1, 0)")
    manager = UnitOfWorkManager(db.engine(pool_size=3, max_overflow=0, pool_timeout=5))
    with manager.activate():
        yield manager
    assert manager.engine.pool.checkedout() == 0


@pytest.fixture
def balance(db):
    """Return the balance of the one account, as it is committed."""

    async def balance():
        return await db.scalar("SELECT balance FROM account WHERE id = 1")

    return balance


@pytest.fixture
def keys_only():
    """Keys that no database knows."""
    return IdempotencyKeys(MetaData())
