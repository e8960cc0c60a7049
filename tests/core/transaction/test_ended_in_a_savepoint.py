"""A statement that ends the transaction inside a savepoint takes that along: no rollback to it can be meant to help."""

from __future__ import annotations

import contextlib

import pytest
from sqlalchemy import text

from sqla_uow import Status, UnitOfWorkManager, current_session, errors, transactional
from tests.kit.models import Note

pytestmark = pytest.mark.drivers("asyncmy", "aiomysql")


async def test_a_procedure_that_commits_inside_a_nested_call(db):
    """It is what the unit fails with, not the savepoint that is missing then."""
    await db.run("CREATE PROCEDURE ends() BEGIN COMMIT; END")
    manager = UnitOfWorkManager(db.engine(pool_size=1, max_overflow=0))

    @transactional(propagation="nested")
    async def part():
        await current_session().execute(text("CALL ends()"))

    with manager.activate(), pytest.raises(errors.RollbackOnlyError) as caught:
        async with manager.begin() as unit:
            unit.session.add(Note(text="before"))
            await unit.session.flush()
            with contextlib.suppress(errors.PropagationError):
                await part()
    assert type(caught.value.__cause__) is errors.PropagationError
    assert "ended its transaction, so what was sent before is committed" in str(caught.value.__cause__)
    assert unit.status is Status.ROLLED_BACK
