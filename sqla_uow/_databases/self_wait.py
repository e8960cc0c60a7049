"""A task that waits for itself: its inner unit for a lock of its outer one, or for a connection that only its kind can free.

The database sees no deadlock in it, as the outer unit waits for nothing there; so it would last until some timeout.  Only
units inside another one pay for the look: a timer, and after a second a question to the server which session blocks which.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import weakref
from typing import TYPE_CHECKING, Any, Protocol

from sqlalchemy import text
from sqlalchemy.engine import Engine
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.util import greenlet_spawn

from sqla_uow._databases.driver import raw_connection
from sqla_uow._log import log
from sqla_uow.errors import PropagationError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sqlalchemy.engine import Connection
    from sqlalchemy.ext.asyncio import AsyncConnection
    from sqlalchemy.pool import Pool

    from sqla_uow._databases.database import Database
    from sqla_uow._tasks.owner import Owner

__all__ = ["Watch", "connect_unless_stuck", "watch_locks"]

LOOK_SECONDS = 1.0
"""Pause between two looks at a unit inside another one that waits."""
CHILD_LOOKS = 5
"""So many later, where the inner unit runs in a task of its own: the outer one may not be waiting for that."""

# -- locks

_tasks: set[asyncio.Task[None]] = set()


class Waiter(Protocol):
    """A unit's transaction, as far as it is looked at here."""

    name: str
    owner: Owner
    database: Database
    connection: Connection | None
    self_wait: PropagationError | None

    @property
    def enclosing(self) -> Sequence[Waiter]: ...


class Watch:
    """Looks now and then whether a unit waits for a lock of a unit around it."""

    __slots__ = ("_looks", "_outer", "_timer", "_unit")

    def __init__(self, unit: Waiter, outer: list[Waiter]) -> None:
        self._unit = unit
        self._outer = outer
        self._looks = 0
        self._timer = unit.owner.loop.call_later(LOOK_SECONDS, self._look)

    def stop(self) -> None:
        """The unit ends."""
        self._timer.cancel()
        self._outer = []

    def _look(self) -> None:
        unit = self._unit
        waits = unit.owner.busy() is not None and unit.connection is not None
        self._looks = self._looks + 1 if waits else 0
        outer = [one for one in self._outer if one.connection is not None and one.owner.busy() is None]
        mine = [one for one in outer if one.owner.last is unit.owner.last or self._looks > CHILD_LOOKS]
        if not self._outer:
            return
        if waits and mine:
            task = unit.owner.loop.create_task(self._ask(mine), context=contextvars.Context())
            _tasks.add(task)
            task.add_done_callback(_tasks.discard)
        else:
            self._again()

    def _again(self) -> None:
        if self._outer:
            self._timer = self._unit.owner.loop.call_later(LOOK_SECONDS, self._look)

    async def _ask(self, outer: list[Waiter]) -> None:
        unit = self._unit
        try:
            async with asyncio.timeout(5 * LOOK_SECONDS):
                await self._ask_server(outer)
        except Exception as error:
            log(
                logging.WARNING, "%s has waited for %g s, and the server did not tell whether for a lock of %s around it (%s)",
                unit.name, LOOK_SECONDS, outer[0].name, type(error).__name__, function=unit.name, error=error,
            )  # fmt: skip
            return
        if unit.self_wait is None:
            self._again()

    async def _ask_server(self, outer: list[Waiter]) -> None:
        unit, connection = self._unit, self._unit.connection
        if connection is None:
            return
        engine = unit.database.sync_engine
        system, driver = unit.database.system, unit.database.driver
        pids = {
            driver.session_number(raw_connection(one.connection)): one for one in outer if one.connection is not None
        }
        inner = driver.session_number(raw_connection(connection))
        # Not from the pool: units that wait, as this one does, may hold it all.
        beside = AsyncEngine(Engine(engine.pool.recreate(), engine.dialect, engine.url))
        try:
            async with beside.connect() as spare:
                if not await spare.run_sync(driver.same_server, connection):
                    return  # behind a balancer; next time perhaps
                who = {"inner": inner, "outer": ", ".join(map(str, pids))}
                found = await _blocker(spare, system.blockers, who)
                if found is None or unit.connection is not connection or unit.owner.busy() is None:
                    return
                unit.self_wait = PropagationError(
                    f"{unit.name} waits for a lock that {pids[found].name} around it holds, and would wait for ever; "
                    "join the outer unit, or have the inner one touch no rows that the outer one has locked or written"
                )
                await spare.execute(text(system.stop_session.format(**who)))
        finally:
            await beside.dispose()


async def _blocker(spare: AsyncConnection, queries: Sequence[str], who: dict[str, Any]) -> int | None:
    for query in queries:
        found = await spare.scalar(text(query.format(**who)))
        if found is not None:
            return int(found)
    return None


def watch_locks(unit: Waiter) -> Watch | None:
    """Watch a unit whose connection has just begun; None where it can wait for none around it."""
    database = unit.database
    if not database.system.blockers:
        return None
    url = database.sync_engine.url
    outer = [
        other
        for other in unit.enclosing
        if other.connection is not None
        and (other.database.pool is database.pool or other.database.sync_engine.url == url)
    ]
    return Watch(unit, outer) if outer else None


# -- connections

_waiting: weakref.WeakKeyDictionary[Pool, set[Waiter]] = weakref.WeakKeyDictionary()


async def connect_unless_stuck(unit: Waiter, connect: Callable[[], Connection]) -> Connection:
    """Connect, beside a unit that has a connection already.

    Raises:
        PropagationError: all connections of the pool are held by units that wait for another one.
    """
    database = unit.database
    pool, capacity = database.pool, database.capacity()
    if capacity is None:
        return await greenlet_spawn(connect)
    waiting = _waiting.setdefault(pool, set())
    waiting.add(unit)
    loop, limit = asyncio.get_running_loop(), asyncio.timeout(None)

    def look() -> None:
        if unit not in waiting:
            return
        if len(_holders(waiting, pool)) >= capacity:
            limit.reschedule(loop.time())
        else:
            loop.call_later(LOOK_SECONDS, look)

    loop.call_later(LOOK_SECONDS, look)
    try:
        async with limit:
            return await greenlet_spawn(connect)
    except TimeoutError as error:
        if not limit.expired():
            raise
        raise PropagationError(
            f"{unit.name} needs a connection beside that of {unit.enclosing[0].name} around it, but all {capacity} of the pool "
            "are held by units that also wait for another one; make the pool larger than the number of calls at once "
            "times the depth of nesting beyond the first, or join the outer unit"
        ) from error
    finally:
        waiting.discard(unit)


def _holders(waiting: set[Waiter], pool: Pool) -> set[int]:
    return {
        id(outer)
        for unit in waiting
        for outer in unit.enclosing
        if outer.connection is not None and outer.database.pool is pool
    }
