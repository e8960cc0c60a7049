"""What one attempt leaves to the next, and what is said when there is none."""

from __future__ import annotations

import asyncio
import contextlib

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from sqla_uow import RetryPolicy, UnitOfWorkManager, current_session, current_unit, errors, transactional
from sqla_uow.testing import FaultPlan
from tests.kit.models import Account, Note

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


async def test_which_attempt_is_the_last(manager):
    """The body can ask, and needs to: what cannot be done again is done in none but this one."""
    said = []

    @transactional(retries=1)
    async def work():
        said.append(current_unit().is_last_attempt)
        current_session().add(Note(text="of each attempt"))

    with FaultPlan(manager, "conflict", at="commit"):
        await work()
    async with manager.begin() as unit:
        said.append(unit.is_last_attempt)
    assert said == [False, True, True]


@pytest.mark.drivers("asyncpg", "asyncmy")
async def test_an_attempt_that_is_made_the_last_beside_another(db, manager):
    """It waits for locks for ever then, which only PostgreSQL has been told otherwise."""
    runs, let_go = asyncio.Event(), asyncio.Event()

    @transactional(retries=1)
    async def work(*, waits):
        current_session().add(Note(text="of one"))
        await current_session().flush()
        if waits:
            runs.set()
            await let_go.wait()
        current_unit().is_last_attempt = True
        current_session().add(Note(text="of the same"))

    first = asyncio.create_task(work(waits=True))
    async with asyncio.timeout(10):
        await runs.wait()
        await work(waits=False)
        let_go.set()
        await first
    assert await db.scalar("SELECT count(*) FROM note") == 4


async def test_a_swallowed_conflict_and_an_error_of_the_body(trouble):
    """D2: the conflict forces all to run again, whatever the body made of it."""
    manager, runs = UnitOfWorkManager(trouble.engine()), []

    @transactional(using=manager, retries=1, isolation=trouble.isolation, retry=AT_ONCE)
    async def work():
        runs.append(1)
        if len(runs) == 1:
            await trouble.settle()
            with contextlib.suppress(Exception):
                await trouble.strike(current_session(manager))
            raise KeyError

    await work()
    assert len(runs) == 2
