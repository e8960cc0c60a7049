"""The engine's own level, in the spellings that SQLAlchemy takes."""

from __future__ import annotations

import pytest
from sqlalchemy import text

from sqla_uow import UnitOfWorkManager, current_session, errors, transactional
from sqla_uow._databases.levels import LEVELS, is_weaker_or_same


@pytest.mark.drivers("asyncpg", "asyncmy")
@pytest.mark.parametrize("spelled", ["REPEATABLE READ", "REPEATABLE_READ", "repeatable read"])
async def test_the_level_of_an_engine(db, spelled):
    """A call that asks for this one joins, one that asks for more is refused."""
    manager = UnitOfWorkManager(db.engine(isolation_level=spelled))

    @transactional(using=manager, isolation="REPEATABLE READ")
    async def as_much():
        return await current_session().scalar(text("SELECT 1"))

    @transactional(using=manager, isolation="SERIALIZABLE")
    async def more():
        """Run nothing."""

    async with manager.begin():
        assert await as_much() == 1
    async with manager.begin() as unit:
        with pytest.raises(errors.IsolationConflictError, match="SERIALIZABLE"):
            await more()
        unit.doom()


def test_a_level_that_the_standard_does_not_have():
    """A database's own, SNAPSHOT say, is not passed off as any of them."""
    assert not any(is_weaker_or_same(asked, "SNAPSHOT") for asked in LEVELS)
    assert not any(is_weaker_or_same("SNAPSHOT", given) for given in LEVELS)
