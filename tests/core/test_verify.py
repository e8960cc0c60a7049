"""C2, the quiet days: what verification leaves in the database while no answer is lost."""

from __future__ import annotations

import pytest
from sqlalchemy import event, text
from sqlalchemy.exc import IntegrityError

from sqla_uow import Status, UnitOfWorkManager, _verify
from tests.models import Account, Note

MARKED = ("sqlite", "asyncmy", "aiomysql")
COUNT = "SELECT count(*) FROM sqla_uow_commits"


@pytest.fixture
async def unmarked(db):
    """The test's database, before anybody has made the marker table in it, and after."""
    await db.run("DROP TABLE IF EXISTS sqla_uow_commits")
    yield db
    await db.run("DROP TABLE IF EXISTS sqla_uow_commits")


@pytest.mark.drivers(*MARKED)
async def test_the_first_unit_makes_the_marker_table(unmarked):
    """Also on SQLite, whose only writer is this unit, and with a pool that has no second connection."""
    engine = unmarked.engine(pool_size=1, max_overflow=0, pool_timeout=5)
    manager = UnitOfWorkManager(engine, ambiguous_commit="verify")
    for key in (1, 2):
        async with manager.begin() as unit:
            unit.session.add(Account(id=key))
        assert unit.status is Status.COMMITTED
    assert await unmarked.rows("SELECT id FROM account ORDER BY id") == [(1,), (2,)]
    assert await unmarked.scalar(COUNT) == 2


@pytest.mark.drivers(*MARKED)
async def test_markers_whose_outcome_is_known_are_deleted(unmarked, monkeypatch):
    """They go in batches, with a later unit's transaction."""
    monkeypatch.setattr(_verify, "_PURGE_AT", 2)
    manager = UnitOfWorkManager(unmarked.engine(), ambiguous_commit="verify")
    counts = []
    for key in range(1, 6):
        async with manager.begin() as unit:
            unit.session.add(Account(id=key))
        counts.append(await unmarked.scalar(COUNT))
    assert counts == [1, 2, 1, 2, 1]


@pytest.mark.drivers("sqlite")
async def test_markers_stay_due_when_their_deletion_is_rolled_back(unmarked, monkeypatch):
    """A unit that fails at its COMMIT deleted nothing; the next one does."""
    monkeypatch.setattr(_verify, "_PURGE_AT", 1)
    engine = unmarked.engine()
    manager = UnitOfWorkManager(engine, ambiguous_commit="verify")
    event.listen(engine.sync_engine, "connect", lambda raw, _: raw.cursor().execute("PRAGMA foreign_keys=ON"))
    async with manager.begin() as unit:
        unit.session.add(Account(id=1))
    with pytest.raises(IntegrityError):
        async with manager.begin() as unit:
            await unit.session.execute(text("PRAGMA defer_foreign_keys=ON"))
            unit.session.add(Note(account_id=99))
    assert await unmarked.scalar(COUNT) == 1
    async with manager.begin() as unit:
        unit.session.add(Account(id=2))
    assert await unmarked.scalar(COUNT) == 1


@pytest.mark.drivers("asyncmy", "aiomysql")
async def test_a_marker_table_that_cannot_be_made_rolls_the_unit_back(unmarked):
    """An ending that fails before COMMIT is a rollback: no row, no connection kept, the error to the caller."""
    engine = unmarked.engine()
    manager = UnitOfWorkManager(engine, ambiguous_commit="verify")
    async with engine.connect():  # the pool's first connection, with what a dialect asks for at its first
        pass

    @event.listens_for(engine.sync_engine, "do_connect")
    def refuse(*_):
        raise ConnectionRefusedError

    with pytest.raises(ConnectionRefusedError):
        async with manager.begin() as unit:
            unit.session.add(Account(id=1))
    assert unit.status is Status.ROLLED_BACK
    assert engine.pool.checkedout() == 0
    assert await unmarked.rows("SELECT id FROM account") == []
