"""What has to come to its end though the one who waits for it is cancelled."""

from __future__ import annotations

import asyncio
from typing import TypeVar

__all__ = ["to_the_end"]

T = TypeVar("T")


async def to_the_end(task: asyncio.Task[T]) -> T:
    """Return what the task returns; if we are cancelled, let it end first."""
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        raise
