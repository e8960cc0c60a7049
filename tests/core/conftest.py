"""What several tests of the core begin with."""

from __future__ import annotations

import pytest

from tests.kit.losses import Wire
from tests.servers import Proxy


@pytest.fixture
async def wire(db):
    """An account behind a proxy."""
    await db.run("INSERT INTO account (id, balance) VALUES (1, 0)")
    with Proxy("127.0.0.1", db.port) as proxy:
        wire = Wire(db, proxy)
        yield wire
        proxy.forward_all()
        await wire.engine.dispose()
