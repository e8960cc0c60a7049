"""Alembic's operations on a database of the test's, without a folder of migrations."""

from __future__ import annotations

import pytest
from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext

from sqla_uow.alembic import install


@pytest.fixture
def operate(db):
    """Run `steps(op)` in one transaction, as a migration is."""
    install()
    engine = db.engine()

    async def run(steps, **options):
        def migrate(connection):
            context = MigrationContext.configure(connection, opts=options)
            return steps(Operations(context))

        async with engine.begin() as connection:
            return await connection.run_sync(migrate)

    return run
