"""What the tests of the middleware begin with."""

from __future__ import annotations

import pytest

from sqla_uow import UnitOfWorkManager
from sqla_uow_starlette import Idempotency, exception_handlers
from tests.kit.keys import keys_in
from tests.starlette.client import app_of, client_of
from tests.starlette.keyed import caller


@pytest.fixture
async def manager(db):
    """A manager whose pool lends one connection, and has it back at the end."""
    await db.run("INSERT INTO account (id, balance) VALUES (1, 10)")
    engine = db.engine(pool_size=1, max_overflow=0, pool_timeout=2)
    yield UnitOfWorkManager(engine)
    assert engine.pool.checkedout() == 0


@pytest.fixture
async def keys(db):
    """Idempotency keys whose table is there."""
    return await keys_in(db)


@pytest.fixture
def serve(manager, keys):
    """Return a client of an application whose requests may have a key."""

    def serve(*endpoints, manager=manager, idempotency=None, **options):
        idempotency = Idempotency(keys, **({"caller": caller} | (idempotency or {})))
        options = {"exception_handlers": exception_handlers, **options}
        return client_of(app_of(manager, *endpoints, atomic=True, idempotency=idempotency, **options))

    return serve
