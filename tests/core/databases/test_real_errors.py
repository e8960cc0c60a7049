"""Real failures of real servers, each provoked: classified by code, and retried to success."""

from __future__ import annotations

import contextlib
import logging

import pytest
from sqlalchemy.exc import SQLAlchemyError

from sqla_uow import RetryPolicy, Status, UnitOfWorkManager, current_unit, errors, transactional
from tests.kit.troubles import LOST, STALE, UnseenDeadlock

AT_ONCE = RetryPolicy(base=0, cap=0)


@pytest.fixture
async def trouble(db, kind):
    """Provide the trouble, on tables that it can strike."""
    await db.run(
        "INSERT INTO account (id, balance) VALUES (1, 0), (2, 0)",
        "INSERT INTO versioned (id, value, version) VALUES (1, 0, 1)",
    )
    trouble = kind(db)
    yield trouble
    await trouble.settle()


# -- how user code may meet it


async def let_through(trouble, session):
    """Do nothing about it."""
    await trouble.strike(session)


async def swallow(trouble, session):
    """Catch it and return normally."""
    with contextlib.suppress(SQLAlchemyError):
        await trouble.strike(session)


async def wrap(trouble, session):
    """Raise something else from it."""
    try:
        await trouble.strike(session)
    except SQLAlchemyError as error:
        raise KeyError("of the application") from error


async def wrap_from_none(trouble, session):
    """Raise something else, and cut the chain."""
    try:
        await trouble.strike(session)
    except SQLAlchemyError:
        raise KeyError("of the application") from None


async def swallow_around_nested(trouble, session):
    """Catch it outside a nested function, whose savepoint is rolled back."""
    with contextlib.suppress(SQLAlchemyError):
        await transactional(propagation="nested")(trouble.strike)(session)


async def swallow_around_begin_nested(trouble, session):
    """Catch it outside the session's own savepoint."""
    with contextlib.suppress(SQLAlchemyError):
        async with session.begin_nested():
            await trouble.strike(session)


async def swallow_in_begin_nested(trouble, session):
    """Catch it inside the session's own savepoint, which is then released."""
    async with session.begin_nested():
        await swallow(trouble, session)


WAYS = (let_through, swallow, wrap, swallow_around_nested, swallow_around_begin_nested, swallow_in_begin_nested)


def ways_of(trouble):
    """A savepoint recovers a stale version; who says `from None` says that it is another failure, except of conflicts."""
    if trouble.reason == STALE:
        return WAYS[:3]
    return WAYS if trouble.reason == LOST else (*WAYS, wrap_from_none)


class Job:
    """A function that meets the trouble in its first runs, in a new way each time, and then does its work."""

    def __init__(self, trouble, ways, *, retries):
        self.trouble = trouble
        self.ways = list(ways)
        self.hooks = []
        self.units = []
        self.manager = UnitOfWorkManager(trouble.engine(pool_size=1, max_overflow=0), retries=retries, retry=AT_ONCE)

    async def __call__(self):
        with self.manager.activate():
            return await transactional(isolation=self.trouble.isolation)(self.body)()

    async def body(self):
        await self.trouble.settle()
        unit = current_unit()
        self.units.append(unit)
        unit.after_commit(self.hooks.append, len(self.units))
        if len(self.units) <= len(self.ways):
            await self.ways[len(self.units) - 1](self.trouble, unit.session)
        else:
            await self.trouble.write(unit.session)

    async def rows(self):
        """Return how many rows were written, also after the next user of the pool's only connection has committed."""
        await self.trouble.settle()
        before = await self.trouble.db.scalar("SELECT count(*) FROM note")
        async with self.manager.begin() as unit:
            await self.trouble.write(unit.session)
        return before, await self.trouble.db.scalar("SELECT count(*) FROM note") - 1


async def test_is_retried_however_user_code_meets_it(trouble, caplog):
    """R2, D2, R7, T47: let through, swallowed, wrapped, in a savepoint of either kind: it runs again, and commits once."""
    caplog.set_level(logging.INFO, "sqla_uow")
    ways = ways_of(trouble)
    job = Job(trouble, ways, retries=len(ways))
    await job()
    assert [unit.status for unit in job.units] == [Status.ROLLED_BACK] * len(ways) + [Status.COMMITTED]
    assert job.hooks == [len(ways) + 1]
    assert await job.rows() == (1, 1)
    why = f"{trouble.reason} {trouble.code}" if trouble.code else trouble.reason
    messages = [record.getMessage() for record in caplog.records if record.levelno == logging.INFO]
    assert [why in message for message in messages] == [True] * len(ways)


async def test_that_outlives_its_retries_is_a_conflict_error(trouble):
    """R7: also with `retries=0`: attempts, reason and code as attributes, the database's error as the cause."""
    job = Job(trouble, [let_through], retries=0)
    with pytest.raises(errors.ConflictError) as caught:
        await job()
    error = caught.value
    assert isinstance(error, errors.StaleVersionError) is (trouble.reason == STALE)
    assert (error.attempts, error.reason, len(job.units)) == (1, trouble.reason, 1)
    assert trouble.code in (None, error.code)
    assert isinstance(error.__cause__, SQLAlchemyError)
    assert job.hooks == []
    assert await job.rows() == (0, 0)


@pytest.mark.drivers("asyncmy", "aiomysql")
async def test_a_deadlock_that_only_a_missing_savepoint_tells_of(db):
    """D3, T22: MariaDB rolled back everything, so the savepoint is gone: 1305, with the 1213 in its context."""
    await db.run("INSERT INTO account (id, balance) VALUES (1, 0), (2, 0)")
    trouble = UnseenDeadlock(db)
    job = Job(trouble, [swallow_everything_around_begin_nested], retries=1)
    await job()
    assert [unit.status for unit in job.units] == [Status.ROLLED_BACK, Status.COMMITTED]
    assert await job.rows() == (1, 1)


async def swallow_everything_around_begin_nested(trouble, session):
    """Catch whatever it is outside the session's own savepoint."""
    with contextlib.suppress(Exception):
        async with session.begin_nested():
            await trouble.strike(session)
