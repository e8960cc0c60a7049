"""R2: an outage does not multiply the load."""

from __future__ import annotations

import asyncio
import socket
import time
from types import SimpleNamespace

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from sqla_uow import RetryPolicy, UnitOfWorkManager, current_session, errors, transactional
from sqla_uow._retry.budget import LARGEST, PER_CALL, PER_SECOND, Budget


def test_a_fifth_of_the_calls_and_ten_a_second():
    """R2: whoever finds it spent is told how long to wait, or that it would be too long."""
    budget = Budget(now=0.0)
    assert [budget.reserve(0.0, patience=0.0) for _ in range(int(LARGEST))] == [0.0] * int(LARGEST)
    assert budget.reserve(0.0, patience=0.05) is None
    assert budget.reserve(0.0, patience=0.2) == pytest.approx(0.1)
    assert budget.reserve(0.0, patience=0.2) == pytest.approx(0.2)
    assert budget.reserve(0.0, patience=0.2) is None
    for _ in range(20):
        budget.earn()
    assert budget.reserve(0.0, patience=0.0) == 0.0
    assert budget.reserve(3600.0, patience=0.0) == 0.0
    assert [budget.reserve(3600.0, patience=0.0) for _ in range(20)].count(None) == 1


@pytest.mark.drivers("asyncpg", "asyncmy")
async def test_calls_while_the_database_is_away(db):
    """R2: a hundred callers with five retries each make far fewer attempts than six hundred, and are told why."""
    with socket.socket() as nobody:  # bound, so that nobody else listens there, and not listening
        nobody.bind(("127.0.0.1", 0))
        await calls_refused(UnitOfWorkManager(db.engine(port=nobody.getsockname()[1], pool_size=100)))


@pytest.mark.drivers("asyncpg", "asyncmy")
async def test_a_call_earns_once_and_only_if_it_may_be_run_again(db, monkeypatch):
    """R2: neither its own retries fill the budget up again, nor calls that never take from it."""
    monkeypatch.setattr("sqla_uow._attempts.retry_or_raise.time", SimpleNamespace(monotonic=lambda: 0.0))
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        manager = UnitOfWorkManager(db.engine(port=nobody.getsockname()[1]), retry=RetryPolicy(base=0, cap=0))

        async def attempts(retries):
            """Return how many are made."""
            with pytest.raises((errors.ConflictError, OSError, DBAPIError)):
                async for attempt in manager.attempts(retries=retries):
                    async with attempt as unit:
                        await unit.session.execute(text("SELECT 1"))
            return unit.attempt

        assert await attempts(retries=50) == 1 + LARGEST
        assert [await attempts(retries=0) for _ in range(10)] == [1] * 10
        assert await attempts(retries=5) == 1
        assert 2 in [await attempts(retries=1) for _ in range(5)]


async def calls_refused(manager):
    """Call from a hundred tasks at once."""
    attempts = []

    @transactional(using=manager, retries=5, retry=RetryPolicy(cap=0.05))
    async def count():
        attempts.append(1)
        await current_session(manager).execute(text("SELECT 1"))

    began = time.monotonic()
    results = await asyncio.gather(*(count() for _ in range(100)), return_exceptions=True)
    took = time.monotonic() - began
    assert {type(one) for one in results} == {errors.ConflictError}
    assert 100 < len(attempts) <= 100 + LARGEST + 100 * PER_CALL + took * PER_SECOND
    spent = [str(one) for one in results if "too many calls wait" in str(one)]
    assert spent
    assert spent[0].endswith("call it again later, when the database answers")
