"""What one attempt leaves to the next, and what is said when there is none."""

from __future__ import annotations

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from sqla_uow import RetryPolicy, UnitOfWorkManager, current_session, errors, transactional
from sqla_uow.testing import FaultPlan
from tests.models import Account, Note

AT_ONCE = RetryPolicy(base=0, cap=0)


@pytest.fixture
def manager(db):
    """The manager of a fresh database, activated."""
    manager = UnitOfWorkManager(db.engine(), retry=AT_ONCE)
    with manager.activate():
        yield manager


@pytest.mark.parametrize("failed", [False, True], ids=["open", "failed"])
async def test_objects_of_the_scope_in_a_second_attempt(db, manager, failed):
    """What was read around the function stays refused, whatever the first attempt has left to it."""
    await db.run("INSERT INTO account (id, balance) VALUES (1, 10)")
    runs = []

    @transactional(retries=1)
    async def work(account):
        runs.append(1)
        current_session().add(Note(text="of each attempt"))
        if len(runs) == 2:
            current_session().add(account)

    async with manager.scope():
        account = await current_session().get_one(Account, 1)
        if failed:  # closed then, with all of its objects, when the function begins
            with pytest.raises(DBAPIError):
                await current_session().execute(text("SELECT nonsense"))
        with pytest.raises(errors.ReadOnlyError), FaultPlan(manager, "conflict", at="commit"):
            await work(account)
    assert runs == [1, 1]
    assert await db.rows("SELECT id FROM note") == []


async def test_what_is_said_of_an_only_attempt(manager, caplog):
    """In the singular."""

    @transactional
    async def work():
        current_session().add(Note(text="undone"))

    with (
        pytest.raises(errors.ConflictError, match=r"failed in its only attempt"),
        FaultPlan(manager, "conflict", at="commit"),
    ):
        await work()
    assert any("gave up after 1 attempt and " in message for message in caplog.messages)
