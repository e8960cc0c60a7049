"""Objects are let go when their unit ends, however it does."""

from __future__ import annotations

import pytest

from sqla_uow import UnitOfWorkManager, current_session, errors, transactional
from tests.kit.models import Account


@pytest.mark.parametrize("doomed", [False, True], ids=["committed", "rolled back"])
async def test_of_a_unit_that_sent_nothing(db, doomed):
    """Another unit may have them."""
    manager = UnitOfWorkManager(db.engine())
    async with manager.begin() as unit:
        account = Account(id=1)
        unit.session.add(account)
    async with manager.begin() as unit:
        unit.session.add(account)  # unchanged, so there is nothing to send
        if doomed:
            unit.doom()
    async with manager.begin() as unit:
        unit.session.add(account)
        account.balance = 7
    assert await db.rows("SELECT balance FROM account") == [(7,)]


@pytest.mark.drivers("asyncpg", "asyncmy")
async def test_of_an_attempt_whose_commit_is_found_not_to_be_there(wire):
    """What it has loaded has lost its change, and the next attempt must not use it."""
    loaded = []

    @transactional(using=UnitOfWorkManager(wire.engine, ambiguous_commit="verify"), retries=1)
    async def work():
        if loaded:
            current_session().add(loaded[0])
        else:
            loaded.append(await current_session().get_one(Account, 1))
            loaded[0].balance = 7

    lost = wire.on_commit("cut", applied=False)
    with pytest.raises(errors.InstanceReuseError):
        await work()
    assert lost.fired
    assert await wire.balance() == 0
