"""Cancel a call at each of its suspensions in turn, in every way that asyncio and anyio have."""

from __future__ import annotations

import asyncio
import types
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import contextmanager
from typing import Any

import anyio


class Suspensions:
    """Count the suspensions of every task of the loop, and call `fire` at those that were chosen.

    Helper tasks count too: a cancellation of the caller is to be tried at each step of a COMMIT that runs in one.
    """

    def __init__(self, *chosen: int) -> None:
        self.count = 0
        self.fire: Callable[[], object] = lambda: None
        self._chosen = chosen

    @property
    def fired(self) -> bool:
        return bool(self._chosen) and self.count >= self._chosen[0]

    @contextmanager
    def counted(self) -> Any:
        """Watch the tasks that are made in the block."""
        loop = asyncio.get_running_loop()
        loop.set_task_factory(self._make_task)
        try:
            yield self
        finally:
            loop.set_task_factory(None)

    def _make_task(self, loop: asyncio.AbstractEventLoop, coro: Any, **options: Any) -> asyncio.Task[Any]:
        async def watched() -> Any:
            return await self._drive(coro)

        return asyncio.Task(watched(), loop=loop, **options)

    @types.coroutine
    def _drive(self, coro: Coroutine[Any, Any, Any]) -> Any:
        resume, argument = coro.send, None
        while True:
            try:
                waits_for = resume(argument)
            except StopIteration as end:
                return end.value
            self.count += 1
            if self.count in self._chosen:
                self.fire()
            try:
                resume, argument = coro.send, (yield waits_for)
            except BaseException as error:  # noqa: BLE001  # handed on to whom it is meant for
                resume, argument = coro.throw, error


Call = Callable[[], Awaitable[object]]
Way = Callable[[Call, Suspensions], Awaitable[None]]


async def by_task(call: Call, points: Suspensions) -> None:
    """`task.cancel()`."""
    task = asyncio.current_task()
    assert task is not None
    points.fire = task.cancel
    await call()


async def by_asyncio_timeout(call: Call, points: Suspensions) -> None:
    """`asyncio.timeout()`."""
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(None) as timeout:
        points.fire = lambda: timeout.reschedule(loop.time())
        await call()


async def by_task_group(call: Call, points: Suspensions) -> None:
    """A sibling in an `asyncio.TaskGroup` fails."""
    alarm = asyncio.Event()
    points.fire = alarm.set

    async def sibling() -> None:
        await alarm.wait()
        raise RuntimeError("sibling")

    async with asyncio.TaskGroup() as group:
        other = group.create_task(sibling())
        await group.create_task(call())
        other.cancel()


async def by_anyio_scope(call: Call, points: Suspensions) -> None:
    """`anyio.CancelScope.cancel()`."""
    with anyio.CancelScope() as scope:
        points.fire = scope.cancel
        await call()


async def by_move_on_after(call: Call, points: Suspensions) -> None:
    """`anyio.move_on_after()`."""
    with anyio.move_on_after(None) as scope:
        points.fire = lambda: setattr(scope, "deadline", anyio.current_time())
        await call()


async def by_fail_after(call: Call, points: Suspensions) -> None:
    """`anyio.fail_after()`."""
    with anyio.fail_after(None) as scope:
        points.fire = lambda: setattr(scope, "deadline", anyio.current_time())
        await call()


async def by_anyio_group(call: Call, points: Suspensions) -> None:
    """The cancel scope of an `anyio` task group, the call in a child task."""
    async with anyio.create_task_group() as group:
        points.fire = group.cancel_scope.cancel
        group.start_soon(call)


WAYS: dict[str, Way] = {
    "task": by_task,
    "asyncio.timeout": by_asyncio_timeout,
    "TaskGroup": by_task_group,
    "anyio scope": by_anyio_scope,
    "move_on_after": by_move_on_after,
    "fail_after": by_fail_after,
    "anyio group": by_anyio_group,
}
