"""A row that is found to be stale only under COMMIT, by what a listener of SQLAlchemy's `before_commit` writes."""

from __future__ import annotations

from sqlalchemy import event
from sqlalchemy.orm.attributes import set_committed_value

from sqla_uow import RetryPolicy, UnitOfWorkManager, current_session, transactional
from tests.kit.models import Versioned


async def test_it_is_run_again(db):
    """As it is where the unit's own flush finds it."""
    await db.run("INSERT INTO versioned (id, value, version) VALUES (1, 0, 1)")
    manager = UnitOfWorkManager(db.engine(), retry=RetryPolicy(base=0, cap=0))
    runs = []

    @transactional(using=manager, retries=1)
    async def work():
        session = current_session(manager)
        row = await session.get_one(Versioned, 1)
        runs.append(row)

        def write(_session):
            if len(runs) == 1:  # as if another had written it since, which SQLite would not let it
                set_committed_value(row, "version", 99)
            row.value = 7

        event.listen(session.sync_session, "before_commit", write, once=True)

    await work()
    assert len(runs) == 2
    assert await db.rows("SELECT value, version FROM versioned") == [(7, 2)]
