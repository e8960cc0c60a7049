"""Many workers increment one row: nothing is lost, and every loser is told.

SQLA_UOW_LONG=1 runs 16 workers of 50 increments each instead of 8 of 25.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter

import pytest
from sqlalchemy import update

from sqla_uow import RetryPolicy, UnitOfWorkManager, current_session, current_unit, errors, transactional
from tests.kit.models import Account
from tests.versioning.tables import JoinedChild, Plain

WORKERS, TIMES = (16, 50) if os.environ.get("SQLA_UOW_LONG") else (8, 25)
PATIENT = {"retries": 1000, "retry": RetryPolicy(base=0.001, cap=0.02)}


@pytest.fixture
async def manager(db, versioned):
    """Row 1 of each model, a pool for all workers, and READ COMMITTED where there is a choice."""
    async with versioned.begin() as unit:
        unit.session.add_all([Plain(id=1), JoinedChild(id=1), Account(id=1, balance=0)])
    room = {} if db.family == "sqlite" else {"pool_size": WORKERS}
    isolation = None if db.family == "sqlite" else "READ COMMITTED"
    manager = UnitOfWorkManager(db.engine(**room), isolation=isolation)
    with manager.activate():
        yield manager


async def everyone(work):
    """Run the work of each worker as often as it is asked for, and count what came of it."""

    async def worker():
        for _ in range(TIMES):
            try:
                await work()
            except errors.StaleVersionError:
                outcomes["stale"] += 1
            else:
                outcomes["done"] += 1

    outcomes = Counter()
    await asyncio.gather(*(worker() for _ in range(WORKERS)))
    return outcomes


@pytest.mark.parametrize("model", [Plain, JoinedChild])
async def test_with_retries_nothing_is_lost(db, manager, model):
    """V1: the value and the version say how often it was incremented; on the servers there were conflicts to retry."""
    attempts = []

    @transactional(**PATIENT)
    async def increment():
        attempts.append(current_unit().attempt)
        (await current_session().get_one(model, 1)).value += 1

    assert await everyone(increment) == {"done": WORKERS * TIMES}
    assert await found(manager, model) == (WORKERS * TIMES, 1 + WORKERS * TIMES)
    assert db.family == "sqlite" or max(attempts) > 1


async def found(manager, model):
    """Return the row's value and version."""
    async with manager.begin(read_only=True) as unit:
        row = await unit.session.get_one(model, 1)
        return row.value, row.version


@pytest.mark.parametrize("model", [Plain, JoinedChild])
async def test_mixed_with_statements_nothing_is_lost(db, manager, model):
    """V3, T31: an ORM UPDATE statement counts, so that who has read the row before conflicts with it."""
    attempts, turns = [], iter(range(10**6))

    @transactional(**PATIENT)
    async def increment():
        attempts.append(current_unit().attempt)
        (await current_session().get_one(model, 1)).value += 1

    @transactional(**PATIENT)
    async def by_statement():
        await current_session().execute(update(model).where(model.id == 1).values(value=model.value + 1))

    async def one_of_both():
        await (increment, by_statement)[next(turns) % 2]()

    assert await everyone(one_of_both) == {"done": WORKERS * TIMES}
    assert await found(manager, model) == (WORKERS * TIMES, 1 + WORKERS * TIMES)
    assert db.family == "sqlite" or max(attempts) > 1


async def test_without_retries_every_loser_is_told(db, manager):
    """V1, R7: successes and StaleVersionErrors are all there is, and the value is the successes."""

    @transactional(retries=0)
    async def increment():
        (await current_session().get_one(Plain, 1)).value += 1

    outcomes = await everyone(increment)
    assert outcomes["done"] + outcomes["stale"] == WORKERS * TIMES
    assert (outcomes["stale"] > 0) is (db.family != "sqlite")
    assert await found(manager, Plain) == (outcomes["done"], 1 + outcomes["done"])


@pytest.mark.drivers("asyncpg", "psycopg", "asyncmy", "aiomysql")
async def test_without_a_version_increments_are_lost(db, manager):
    """The control: the same work on a model without a version is told of no conflict, and loses."""

    @transactional(**PATIENT)
    async def increment():
        (await current_session().get_one(Account, 1)).balance += 1

    assert await everyone(increment) == {"done": WORKERS * TIMES}
    assert await db.scalar("SELECT balance FROM account") < WORKERS * TIMES
