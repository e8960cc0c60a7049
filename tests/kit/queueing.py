"""A call that waits for its turn until its deadline has passed."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager

import pytest

from sqla_uow.errors import TransactionTimeoutError


@asynccontextmanager
async def a_turn_that_does_not_come(manager):
    """Let two calls hold all turns, a third one time out in the queue, and the two end behind the block."""
    leave = asyncio.Event()

    async def hold(seconds=None):
        async for attempt in manager.attempts(retries=1, timeout=seconds):
            async with attempt:
                await leave.wait()

    running = [asyncio.create_task(hold()) for _ in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(TransactionTimeoutError):
        await hold(0.05)
    yield
    leave.set()
    await asyncio.gather(*running)
