"""`has_written`, and that the read session, which writes nothing, takes no hooks."""

from __future__ import annotations

import pytest
from sqlalchemy import delete, insert, select, text, update

from sqla_uow import (
    UnitOfWorkManager,
    after_commit,
    after_rollback,
    before_commit,
    current_session,
    current_unit,
    errors,
    transactional,
)
from tests.kit.models import Account

NAMES = ("after_commit", "before_commit", "after_rollback")
FUNCTIONS = {"after_commit": after_commit, "before_commit": before_commit, "after_rollback": after_rollback}


@pytest.fixture
async def manager(db):
    """A manager, activated, over one account."""
    await db.run("INSERT INTO account (id, balance) VALUES (1, 10)")
    manager = UnitOfWorkManager(db.engine())
    with manager.activate():
        yield manager


@pytest.mark.drivers("sqlite")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("state", ["new", "read", "gave way", "scope ended"])
async def test_hooks_of_a_read_session(manager, name, state):
    """They would never run: refused by the function, by the unit of the context, and by one that was kept."""

    @transactional
    async def work():
        pass

    async with manager.scope():
        unit = current_unit()
        if state != "new":
            await unit.session.get_one(Account, 1)
        if state == "gave way":
            await work()
        roads = [
            getattr(unit, name),
            getattr(current_unit(), name),
            FUNCTIONS[name],
            getattr(current_unit(manager), name),
        ]
        if state != "scope ended":
            for road in roads:
                with pytest.raises(errors.NoUnitError) as caught:
                    road(print)
                assert str(caught.value) == (
                    f"{name}() was called outside a unit of work; call it inside a @transactional function"
                )
    with pytest.raises(errors.NoUnitError):
        getattr(unit, name)(print)


@pytest.mark.drivers("sqlite")
async def test_a_hook_that_reads_may_register_further_ones(manager):
    """In a scope the read session is what a hook sees; what it registers runs behind it all the same."""
    seen = []

    async def first():
        seen.append((await current_session().get_one(Account, 1)).balance)
        after_commit(seen.append, "second")

    @transactional
    async def work():
        after_commit(first)

    async with manager.scope():
        await work()
    assert seen == [10, "second"]


async def add():
    """Flush a new object."""
    current_session().add(Account(id=9))
    await current_session().flush()


async def change():
    """Flush a change."""
    (await current_session().get_one(Account, 1)).balance = 5
    await current_session().flush()


async def bulk():
    """Send statements of SQLAlchemy's that write."""
    await current_session().execute(insert(Account).values(id=8))
    await current_session().execute(update(Account).values(balance=3))
    await current_session().execute(delete(Account))


async def by_text():
    """Write by text."""
    await current_session().execute(text("UPDATE account SET balance = 4"))


async def failing():
    """Send one that fails."""
    with pytest.raises(Exception, match="account"):
        await current_session().execute(text("INSERT INTO account (id, balance) VALUES (1, 1)"))


@pytest.mark.parametrize("write", [add, change, bulk, by_text, failing])
async def test_a_unit_that_has_written(manager, write):
    """It knows it at once, and still when it has ended, however it ended."""
    async with manager.begin() as unit:
        assert not unit.has_written
        await current_session().scalar(select(Account.balance))
        current_session().add(Account(id=7))
        assert not unit.has_written  # not sent yet
        current_session().expunge_all()
        await write()
        assert unit.has_written
        unit.doom()
    assert unit.has_written


async def test_a_unit_that_has_not(manager):
    """Reading, by SQLAlchemy's own and by text, a savepoint and none at all."""
    async with manager.begin() as unit:
        await current_session().scalar(select(Account.balance))
        await current_session().scalar(text("SELECT 1"))
        async with manager.begin(propagation="nested"):
            await current_session().get_one(Account, 1)
        assert not unit.has_written
    assert not unit.has_written
    async with manager.scope():
        await current_session().get_one(Account, 1)
        assert not current_unit().has_written
