"""Waiting for what sets no event: something in a server, a pool or another task."""

from __future__ import annotations

import asyncio
import inspect
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable


async def until(condition: Callable[[], Any], *, seconds: float = 10, pause: float = 0.01) -> None:
    """Look until the condition, a function that may be async, holds.

    Args:
        condition: what is looked at.
        seconds: after which it is a `TimeoutError`.
        pause: seconds between two looks; 0 is one in each turn of the loop.
    """
    async with asyncio.timeout(seconds):
        while not await _value(condition()):  # noqa: ASYNC110  # of what has no event
            await asyncio.sleep(pause)


async def until_free(engine: Any) -> None:
    """Wait until nothing is checked out of the engine's pool."""
    await until(lambda: not engine.pool.checkedout())


def eventually(condition, timeout=10.0):
    """Poll without an event loop until the condition holds; return whether it does."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


async def _value(answer: Any) -> Any:
    return await answer if inspect.isawaitable(answer) else answer
