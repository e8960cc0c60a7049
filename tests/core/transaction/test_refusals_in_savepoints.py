"""What ends a transaction is refused inside a savepoint, too, and the savepoint's end does not make that good."""

from __future__ import annotations

import contextlib

import pytest
from sqlalchemy import text

from sqla_uow import Status, UnitOfWorkManager, current_session, errors, transactional
from tests.kit.models import Note


async def _commit_as_sql(session):
    await session.execute(text("COMMIT"))


async def _commit(session):
    await session.commit()


async def _ddl(session):
    await session.execute(text("CREATE TABLE beside (id integer)"))


@pytest.mark.parametrize("end", [_commit_as_sql, _commit, _ddl])
async def test_a_refusal_inside_a_nested_call(db, end):
    """Whoever wrote it believes that something is committed: the unit is not."""
    if end is _ddl and db.family != "mysql":
        pytest.skip("only MariaDB commits before DDL")
    manager = UnitOfWorkManager(db.engine(pool_size=1, max_overflow=0))

    @transactional(using=manager, propagation="nested")
    async def part():
        current_session().add(Note(text="inside"))
        await current_session().flush()
        await end(current_session())

    with manager.activate(), pytest.raises(errors.RollbackOnlyError) as caught:
        async with manager.begin() as unit:
            unit.session.add(Note(text="before"))
            await unit.session.flush()
            with contextlib.suppress(errors.PropagationError):
                await part()
    assert type(caught.value.__cause__) is errors.PropagationError
    assert unit.status is Status.ROLLED_BACK
    assert await db.rows("SELECT text FROM note") == []
