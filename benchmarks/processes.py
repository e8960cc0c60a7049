"""The transfers of `contention` from several processes at once, which know nothing of each other.

Each process has its own engine and its own width.  All of them run the same side at the same time: a barrier parts the
slices.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from typing import TYPE_CHECKING

from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from benchmarks import contention
from benchmarks.contention_sides import ByHand, full_jitter, sides
from sqla_uow import UnitOfWorkManager

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping
    from multiprocessing.synchronize import Barrier

    from sqlalchemy.ext.asyncio import AsyncEngine

    from benchmarks.contention_sides import Cell, Side

PROCESSES = 4
CELLS = "2/0/8,10/0/8,100/0/8,1000/0/8,10/5/8,1/0/8"
"""As for `contention`; the workers are those of one process."""
LOCKS = {
    "postgresql": ("SELECT pg_advisory_lock(1)", "SELECT pg_advisory_unlock(1)"),
    "mysql": ("SELECT GET_LOCK('benchmark', 60)", "SELECT RELEASE_LOCK('benchmark')"),
}

_barrier: Barrier


class OneForAll(ByHand):
    """One call at a time over all processes: a lock of the database's session, taken before BEGIN."""

    def __init__(self, engine: AsyncEngine, locks: AsyncEngine) -> None:
        super().__init__(engine, full_jitter)
        self.locks = locks.execution_options(isolation_level="AUTOCOMMIT")

    async def call(self, cell: Cell, payer: int, payee: int) -> bool:
        """Return whether it was committed."""
        async with self._locked():
            return await super().call(cell, payer, payee)

    @contextlib.asynccontextmanager
    async def _locked(self) -> AsyncIterator[None]:
        take, give_back = LOCKS[self.locks.dialect.name]
        async with self.locks.connect() as connection:
            await connection.execute(text(take))
            try:
                yield
            finally:
                await connection.execute(text(give_back))


async def one_process(
    places: Mapping[str, Cell], seconds: float, *, with_locks: bool
) -> dict[tuple[Cell, str], list[contention.Meter]]:
    """Run every side in turns, each together with the other processes; return a meter for each slice."""
    logging.getLogger("sqla_uow").setLevel(logging.ERROR)
    compared: dict[tuple[Cell, str], tuple[UnitOfWorkManager, Side]] = {}
    async with contextlib.AsyncExitStack() as stack:
        for url, cell in places.items():
            engine, locks = (
                create_async_engine(url, pool_size=cell.workers, max_overflow=0, pool_timeout=120) for _ in "12"
            )
            stack.push_async_callback(engine.dispose)
            stack.push_async_callback(locks.dispose)
            manager = UnitOfWorkManager(engine)
            own = {**sides(engine), "database lock": OneForAll(engine, locks)} if with_locks else sides(engine)
            compared |= {(cell, name): (manager, side) for name, side in own.items()}
        meters: dict[tuple[Cell, str], list[contention.Meter]] = {which: [] for which in compared}
        for number in range(1 + max(1, round(seconds / contention.SLICE))):
            for (cell, name), (manager, side) in compared.items():
                meter = contention.Meter()
                _barrier.wait()  # no other task runs here
                length = contention.SLICE if number else contention.WARM_UP
                with manager.activate():
                    await meter.slice(side, cell, length, counts=number > 0)
                if number:
                    meters[cell, name].append(meter)
    return meters


def be_one(
    places: Mapping[str, Cell],
    seconds: float,
    with_locks: bool,  # noqa: FBT001  # `submit` hands on positions
) -> dict[tuple[Cell, str], list[contention.Meter]]:
    """Run in a process of the pool."""
    return asyncio.run(one_process(places, seconds, with_locks=with_locks))


def meet_at(barrier: Barrier) -> None:
    """Keep what a process of the pool can only be given at its start."""
    global _barrier  # noqa: PLW0603  # see above
    _barrier = barrier


async def prepare(url: str, cell: Cell, beside: int = 0) -> None:
    """Fill the table, which has so many rows beside those of the cell."""
    engine = create_async_engine(url)
    await contention.prepare(engine, cell.rows, beside)
    await engine.dispose()


def together(
    places: Mapping[str, Cell], seconds: float, processes: int, *, with_locks: bool = True
) -> dict[tuple[Cell, str], list[list[contention.Meter]]]:
    """Let the processes run.

    Args:
        places: URLs of databases that are prepared, and the cell that is measured in each.
        seconds: for each side of a cell.
        processes: how many.
        with_locks: compare the lock of the database as well.

    Returns:
        by cell and side, for each process its slices.
    """
    spawn = multiprocessing.get_context("spawn")
    barrier = spawn.Barrier(processes)
    with ProcessPoolExecutor(processes, spawn, meet_at, (barrier,)) as pool:
        futures = [pool.submit(be_one, places, seconds, with_locks) for _ in range(processes)]
        parts = [future.result() for future in futures]
    return {which: [part[which] for part in parts] for which in parts[0]}


def measure(url: str, cell: Cell, seconds: float, processes: int = PROCESSES) -> dict[str, contention.Outcome]:
    """Measure one cell, and add up what the processes did."""
    asyncio.run(prepare(url, cell))
    measured = together({url: cell}, seconds, processes)
    return {
        name: contention.outcome([contention.added(slices) for slices in parts])
        for (_cell, name), parts in measured.items()
    }
