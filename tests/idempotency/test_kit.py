"""Keys under what users test with."""

from __future__ import annotations

import asyncio

import pytest

from sqla_uow import transactional
from sqla_uow.testing import FaultPlan, rolled_back, run_twice
from tests.idempotency.test_claim import handler


async def test_a_test_that_is_rolled_back(db, manager, keys, balance):
    """Within it a key is there or free as it would be; behind it nothing is left."""
    handle = handler(keys)

    @transactional
    async def fail():
        assert await keys.claim("orders", "b")
        raise ZeroDivisionError

    async with rolled_back(manager):
        assert [await handle("a"), await handle("a")] == [True, False]
        try:
            await fail()
        except ZeroDivisionError:
            assert await handle("b")
    assert await db.scalar("SELECT count(*) FROM uow_idempotency") == 0
    assert await handle("a")
    assert await balance() == 1


async def test_a_body_that_runs_in_vain_first(manager, keys, balance):
    """The record of the run in vain goes with it."""
    handle = handler(keys, retries=1)
    assert await run_twice(handle)("a")
    assert not await run_twice(handle)("a")
    assert await balance() == 1


async def test_a_consumer_that_is_killed_before_it_acknowledges(manager, keys, balance):
    """A cancellation behind COMMIT is that: nobody is told, and the message comes again."""
    handle = handler(keys)
    with FaultPlan(manager, "cancel", at="after commit"), pytest.raises(asyncio.CancelledError):
        await asyncio.create_task(handle("a"))
    assert await balance() == 1
    assert not await handle("a")
    assert await balance() == 1
