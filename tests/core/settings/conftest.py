"""Two tenants on PostgreSQL."""

from __future__ import annotations

import pytest

from sqla_uow import UnitOfWorkManager
from tests.kit.tenants import make_parcels, tenant, url_of


@pytest.fixture
async def engine(db):
    """The engine of a role that the policy holds for, with one connection."""
    await make_parcels(db)
    return db.engine(url=url_of(db), pool_size=1, max_overflow=0, pool_timeout=2)


@pytest.fixture
def manager(engine):
    """A manager that tells its transactions the tenant of the context."""
    return UnitOfWorkManager(engine, settings={"app.tenant": tenant.get})


@pytest.fixture
def of_a():
    """Work for tenant a."""
    token = tenant.set("a")
    yield "a"
    tenant.reset(token)
