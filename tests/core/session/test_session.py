"""What the session of a unit does where SQLAlchemy's own does something."""

from __future__ import annotations

import pytest
from sqlalchemy import event, select, text
from sqlalchemy.util import greenlet_spawn

from sqla_uow import Status, UnitOfWorkManager, errors
from tests.kit.models import Note


@pytest.fixture
def manager(db):
    """The manager of a fresh database."""
    return UnitOfWorkManager(db.engine())


async def notes(db):
    """Return what is committed."""
    return [note for (note,) in await db.rows("SELECT text FROM note ORDER BY id")]


async def test_a_session_of_the_units_class_made_by_hand(db, manager):
    """It belongs to no unit, and does what SQLAlchemy's does."""
    async with manager.begin() as unit:
        kind = type(unit.session.sync_session)

    def use():
        session = kind(manager.engine.sync_engine)
        session.add(Note(text="undone"))
        session.flush()
        session.rollback()
        session.merge(Note(text="kept"))
        session.commit()
        session.reset()
        session.invalidate()

    await greenlet_spawn(use)
    assert await notes(db) == ["kept"]


async def test_a_session_whose_unit_has_ended(db, manager):
    """To close it once more, in whichever way, harms nobody."""
    async with manager.begin() as unit:
        unit.session.add(Note(text="kept"))
    for again in (unit.session.close, unit.session.reset, unit.session.invalidate):
        await again()
    assert unit.status is Status.COMMITTED
    assert await notes(db) == ["kept"]


async def test_what_a_listener_adds_while_it_commits(db, manager):
    """SQLAlchemy's own `before_commit` comes when the unit has flushed: what is added there is written as well."""
    async with manager.begin() as unit:
        unit.session.add(Note(text="body"))
        event.listen(
            unit.session.sync_session, "before_commit", lambda session: session.add(Note(text="listener")), once=True
        )
    assert await notes(db) == ["body", "listener"]


async def test_a_second_connection_of_the_units_engine(db, manager):
    """It is a plain one, beside the unit's."""
    async with manager.begin() as unit:
        await unit.session.execute(select(Note))

        def beside(session):
            with session.connection().engine.connect() as connection:
                return connection is not session.connection(), connection.scalar(text("SELECT 1"))

        assert await unit.session.run_sync(beside) == (True, 1)
    assert manager.engine.pool.checkedout() == 0


async def test_a_listener_that_asks_when_its_unit_is_rolled_back(db, caplog):
    """SQLAlchemy's `after_soft_rollback` may use the session: it begins anew, and that ends with the unit."""
    manager = UnitOfWorkManager(db.engine(pool_size=1, max_overflow=0, pool_timeout=5))
    asked = []

    def ask(session, _previous):
        asked.append(session.scalar(text("SELECT 1")))

    with pytest.raises(KeyError):
        async with manager.begin() as unit:
            unit.session.add(Note(text="undone"))
            await unit.session.flush()
            event.listen(unit.session.sync_session, "after_soft_rollback", ask)
            raise KeyError
    assert (asked, caplog.messages) == ([1], [])
    assert unit.status is Status.ROLLED_BACK
    assert manager.engine.pool.checkedout() == 0
    assert await notes(db) == []


async def test_a_connection_that_its_user_has_invalidated(db, manager):
    """Nothing can be committed on it: nothing is, the connection is gone, and no COMMIT is called unknown."""
    with pytest.raises(Exception) as caught:  # noqa: PT011  # looked at below
        async with manager.begin() as unit:
            unit.session.add(Note(text="lost"))
            await unit.session.flush()
            await (await unit.session.connection()).invalidate()
    assert not isinstance(caught.value, errors.AmbiguousCommitError)
    assert unit.status is Status.ROLLED_BACK
    assert await notes(db) == []
    assert manager.engine.pool.checkedout() == 0
