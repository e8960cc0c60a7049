"""`cancel_at`: a call is cancelled at each of its awaits in turn."""

from __future__ import annotations

import asyncio
import types
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Generator

__all__ = ["cancel_at"]


async def cancel_at(nth: int, call: Coroutine[Any, Any, object], /) -> bool:
    """Run a call in a task of its own and cancel it at its nth await, counted from 1.

    ::

        nth = 1
        while await cancel_at(nth, transfer(1, 2, Decimal(10))):
            nth += 1
            ...  # look at what is in the database

    An await counts if it makes the task wait; the await of COMMIT does.

    Args:
        nth: the number of the await, from 1.
        call: the coroutine that the async function returned, not awaited yet.

    Returns:
        True if the call was cancelled; False if it came to its end before.

    Raises:
        Exception: what the call raised, except its cancellation.
        TypeError: `call` is something else, such as the function itself.
        ValueError: `nth` is not a whole number from 1.
    """
    if not isinstance(call, Coroutine):
        raise TypeError(f"cancel_at() got {call!r}; call an async function there, cancel_at(1, transfer(1, 2))")
    if not isinstance(nth, int) or nth < 1:
        call.close()
        raise ValueError(f"cancel_at() got {nth!r}; use a whole number, from 1")
    steps = _Steps(nth)
    task = asyncio.create_task(steps.run(call))
    try:
        await asyncio.wait({task})
    finally:
        task.cancel()
    if not task.cancelled() and (error := task.exception()) is not None:
        raise error
    return steps.cancelled


class _Steps:
    """Counts the suspensions of a coroutine, and cancels its task at one of them."""

    def __init__(self, nth: int) -> None:
        self._left = nth
        self.cancelled = False

    async def run(self, call: Coroutine[Any, Any, object]) -> None:
        await self._drive(call)

    @types.coroutine
    def _drive(self, call: Coroutine[Any, Any, object]) -> Generator[Any, Any, object]:
        resume: Any = call.send
        argument: Any = None
        while True:
            try:
                waits_for = resume(argument)
            except StopIteration as end:
                return end.value
            self._left -= 1
            if self._left == 0:
                task = asyncio.current_task()
                assert task is not None
                self.cancelled = True
                task.cancel()
            try:
                resume, argument = call.send, (yield waits_for)
            except BaseException as error:  # handed on to whom it is meant for
                resume, argument = call.throw, error
