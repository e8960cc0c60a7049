"""Tables and managers for versioned models."""

from __future__ import annotations

import pytest

from sqla_uow import UnitOfWorkManager
from tests.versioning import tables


@pytest.fixture
async def versioned(db):
    """The tables of tests.versioning.tables in a fresh database, and a manager over it, not activated."""
    engine = db.engine()
    bases = [tables.Base, tables.DataclassBase] + [tables.XminBase] * (db.family == "postgresql")
    async with engine.begin() as connection:
        for base in bases:
            await connection.run_sync(base.metadata.create_all)
    return UnitOfWorkManager(engine)
