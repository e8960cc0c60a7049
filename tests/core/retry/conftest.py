"""What tests of contention need of a server."""

from __future__ import annotations

import pytest


@pytest.fixture
async def quick_deadlocks(db):
    """Have PostgreSQL look for deadlocks after 50 ms instead of a second: a control without turns has many."""
    if db.family != "postgresql":
        yield
        return
    await db.run(f"ALTER DATABASE {db.name} SET deadlock_timeout = '50ms'")  # of sessions that begin now
    yield
    await db.run(f"ALTER DATABASE {db.name} RESET deadlock_timeout")
