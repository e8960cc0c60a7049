"""A call that waits for its turn until its deadline has passed."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager

import pytest

from sqla_uow._retry.groups import Group
from sqla_uow._unit.statistics import name_of
from sqla_uow.errors import TransactionTimeoutError


def has_conflicted(manager, function):
    """Have a function, a loop or a route have met its first conflict just now; return where it takes turns."""
    groups = manager._setup.groups.here()
    member = groups.member(_key(function), name_of)
    groups.conflict(member, None, manager.retry.clock)
    return member.group.gate


def narrow(manager, function, *, width=1):
    """Let so many calls of a function, a loop or a route run at a time, from now on, as if they had met conflicts."""
    groups, group = manager._setup.groups.here(), Group(manager.retry.clock)
    groups.hot.append(group)
    group.add(groups.member(_key(function), name_of))
    gate = group.gate
    gate.controller.opening = False
    gate.controller._best = width.bit_length() - 1
    gate.controller._go(gate.controller._best)
    return gate


def _key(function):
    return getattr(function, "__transactional__", None) or getattr(function, "__code__", None) or function


@asynccontextmanager
async def a_turn_that_does_not_come(manager):
    """Let two calls hold all turns, a third one time out in the queue, and the two end behind the block."""
    leave = asyncio.Event()

    async def hold(seconds=None):
        async for attempt in manager.attempts(retries=1, timeout=seconds):
            async with attempt:
                await leave.wait()

    narrow(manager, hold, width=2)
    running = [asyncio.create_task(hold()) for _ in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(TransactionTimeoutError):
        await hold(0.05)
    yield
    leave.set()
    await asyncio.gather(*running)
