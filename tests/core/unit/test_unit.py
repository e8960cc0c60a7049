"""A unit is one session, one transaction, one attempt."""

from __future__ import annotations

import pytest
from sqlalchemy import select

from sqla_uow import Status, UnitOfWorkManager, current_session, current_unit, errors, transactional
from tests.kit.models import Account


async def test_a_block_commits_at_its_end(db):
    """The row is there for another connection after the block, and not before."""
    manager = UnitOfWorkManager(db.engine())
    async with manager.begin() as unit:
        unit.session.add(Account(id=1, balance=5))
        await unit.session.flush()
        assert unit.status is Status.ACTIVE
        assert await db.rows("SELECT * FROM account") == []
    assert unit.status is Status.COMMITTED
    assert await db.rows("SELECT id, balance FROM account") == [(1, 5)]


async def test_an_exception_rolls_back_and_is_the_callers_own(db):
    """Roll back on an exception, and give that very exception back."""
    manager = UnitOfWorkManager(db.engine())
    failure = ValueError("mine")
    with pytest.raises(ValueError, match=r"^mine$") as caught:
        async with manager.begin() as unit:
            unit.session.add(Account(id=1))
            await unit.session.flush()
            raise failure
    assert caught.value is failure
    assert unit.status is Status.ROLLED_BACK
    assert await db.rows("SELECT * FROM account") == []


async def test_return_from_a_block_commits(db):
    """D4: never roll back on return."""
    manager = UnitOfWorkManager(db.engine())

    async def leave_early():
        async with manager.begin() as unit:
            unit.session.add(Account(id=1))
            return unit

    unit = await leave_early()
    assert unit.status is Status.COMMITTED
    assert await db.rows("SELECT id FROM account") == [(1,)]


async def test_a_unit_without_sql_takes_no_connection(db):
    """S2: no checkout; the pool never made a connection."""
    engine = db.engine()
    manager = UnitOfWorkManager(engine)
    async with manager.begin() as unit:
        assert unit.session is unit.session
        assert unit.status is Status.NEW
    assert unit.status is Status.COMMITTED
    assert engine.pool.checkedin() == 0


async def test_the_session_of_the_context_is_the_units(db):
    """`current_session` finds the unit of the decorated function, and nothing after it."""
    manager = UnitOfWorkManager(db.engine())
    seen = []

    @transactional
    async def work():
        seen.append(current_unit())
        assert current_session() is current_unit().session
        return await current_session().scalar(select(1))

    with manager.activate():
        assert await work() == 1
        with pytest.raises(errors.NoUnitError):
            current_session()
    assert seen[0].status is Status.COMMITTED
