"""What an open scope and an open unit keep in memory, and what units that have ended leave behind: nothing.

Bytes are tracemalloc's, of what Python allocated; a session is weighed alone, because an application without the library
has it too.  SQL opens a connection, whose memory is the driver's, so none is sent while bytes are counted.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import tracemalloc
from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from sqla_uow import UnitOfWorkManager, current_session, transactional

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

__all__ = ["report"]

OPEN = 200
"""How many are open at once."""
STEPS = 5
"""Over how many steps the units that have ended are counted."""
SELECT = text("SELECT 1")


class Left(NamedTuple):
    """What there is after some units have ended.

    Attributes:
        units: how many have ended so far.
        bytes: allocated by Python, over the start.
        objects: known to the garbage collector, over the start.
    """

    units: int
    bytes: int
    objects: int


@contextlib.contextmanager
def traced() -> Any:
    """Trace allocations inside only: it makes all else several times slower."""
    gc.collect()
    tracemalloc.start()
    try:
        yield
    finally:
        tracemalloc.stop()


async def open_at_once(what: Callable[[contextlib.AsyncExitStack], Awaitable[object]]) -> float:
    """Return the bytes for one of many that are open at once, each in a task of its own, as requests are."""
    opened, release = asyncio.Semaphore(0), asyncio.Event()

    async def one() -> None:
        async with contextlib.AsyncExitStack() as stack:
            kept = await what(stack)
            opened.release()
            await release.wait()
            del kept

    with traced():
        tasks = [asyncio.create_task(one()) for _ in range(OPEN)]
        for _ in tasks:
            await opened.acquire()
        gc.collect()
        size = tracemalloc.get_traced_memory()[0]
    release.set()
    await asyncio.gather(*tasks)
    return size / OPEN


async def sizes(manager: UnitOfWorkManager) -> dict[str, float]:
    """Return the bytes for one scope, one unit, and one session, over those of a task that has none."""

    async def nothing(_stack: contextlib.AsyncExitStack) -> None:
        """Open nothing: the task alone."""

    async def session(stack: contextlib.AsyncExitStack) -> AsyncSession:
        return await stack.enter_async_context(AsyncSession(manager.engine))

    async def scope(stack: contextlib.AsyncExitStack) -> object:
        return await stack.enter_async_context(manager.scope())

    async def scope_with_session(stack: contextlib.AsyncExitStack) -> object:
        await scope(stack)
        return current_session()

    async def unit(stack: contextlib.AsyncExitStack) -> object:
        return await stack.enter_async_context(manager.begin())

    async def unit_with_session(stack: contextlib.AsyncExitStack) -> object:
        return (await stack.enter_async_context(manager.begin())).session

    kinds = {
        "session": session, "scope": scope, "scope with its session": scope_with_session,
        "unit": unit, "unit with its session": unit_with_session,
    }  # fmt: skip
    with manager.activate():
        for kind in (nothing, *kinds.values()):
            await open_at_once(kind)  # what is made once
        task = await open_at_once(nothing)
        return {name: await open_at_once(kind) - task for name, kind in kinds.items()}


@transactional(retries=5, isolation="SERIALIZABLE")
async def read() -> None:
    """Read one row."""
    await current_session().execute(SELECT)


async def left_behind(manager: UnitOfWorkManager, units: int) -> list[Left]:
    """Run units one after the other, each in a scope and some in tasks; return what there is now and then."""

    async def some(number: int) -> None:
        for done in range(number):
            async with manager.scope():
                await (asyncio.create_task(read()) if done % 10 == 0 else read())

    found = []
    with manager.activate():
        await some(1000)  # what is made once
        with traced():
            before = len(gc.get_objects())
            for step in range(1, STEPS + 1):
                await some(units // STEPS)
                gc.collect()
                found.append(
                    Left(
                        step * (units // STEPS),
                        tracemalloc.get_traced_memory()[0],
                        len(gc.get_objects()) - before,
                    )
                )
    return found


async def measure(url: str, units: int) -> tuple[dict[str, float], list[Left]]:
    """Return the bytes of what is open, and what is left of what has ended."""
    manager = UnitOfWorkManager(create_async_engine(url))
    try:
        return await sizes(manager), await left_behind(manager, units)
    finally:
        await manager.engine.dispose()


def report(url: str, units: int) -> dict[str, Any]:
    """Measure, print the tables, and return the figures."""
    open_bytes, left = asyncio.run(measure(url, units))
    print(f"{'open':34}{'bytes':>10}")
    for name, size in open_bytes.items():
        print(f"  {name:32}{size:>10.0f}")
    print(f"{'units that have ended':34}{'bytes':>10}{'objects':>10}")
    for one in left:
        print(f"  {one.units:<32}{one.bytes:>10}{one.objects:>10}")
    return {"bytes": open_bytes, "left": [one._asdict() for one in left]}
