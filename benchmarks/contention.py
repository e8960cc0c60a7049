"""Transfers between two of a few rows under SERIALIZABLE, one hot row, write skew: what contention leaves of the throughput.

Every side runs the same SQL on the same server for some seconds after a warm-up, one side after the other.  A commit
counts when its caller has seen it; a call that gave up counts as that.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from typing import TYPE_CHECKING, NamedTuple

from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from benchmarks.contention_sides import Cell, Side, every_side
from sqla_uow import UnitOfWorkManager

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy.ext.asyncio import AsyncEngine

__all__ = ["CELLS", "SLICE", "WARM_UP", "Meter", "Outcome", "added", "cells", "measure", "outcome", "prepare", "report"]

WARM_UP = 2.0
SLICE = 1.5
CELLS = (
    "10/0/32,100/0/32,1000/0/32,10000/0/32,10/0/8,10/0/128,100/0/128,1000/0/128,10000/0/128,10/5/32,100/5/32,1000/5/32,"
    "1/0/32,10/0/32/ordered,10/0/32/skew,100/0/32/skew,2/0/32,10/0/32/four,40/0/32/four"
)
"""rows / pause in the body, ms / workers; one row is read and written back."""


class Outcome(NamedTuple):
    """What one side did in one cell.

    Attributes:
        commits: a second.
        gave_up: the share of calls that were not committed.
        p99: seconds that a call took which was.
        attempts: a call.
        cold: commits a second in the first second that ever ran, and in the next; they count nowhere else.
    """

    commits: float
    gave_up: float
    p99: float
    attempts: float
    cold: tuple[float, ...] = ()


class Meter:
    """What one side has done so far, over all its slices.

    Args:
        clock: seconds.
        chance: chooses the rows.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter, chance: random.Random | None = None) -> None:
        self._clock = clock
        self._chance = chance or random.Random()  # noqa: S311  # no secret
        self.seconds = 0.0
        self.computed = 0.0  # by this process
        self.latencies: list[float] = []
        self.gave_up = 0
        self.runs = 0

    async def slice(self, side: Side, cell: Cell, seconds: float, *, counts: bool) -> None:
        """Let the workers call it for some seconds."""
        end = self._clock() + seconds
        side.runs = 0
        latencies: list[float] = []
        gave_up = 0

        async def worker() -> None:
            nonlocal gave_up
            while (started := self._clock()) < end:
                payer, payee = self._chance.sample(range(1, cell.rows + 1), 2) if cell.rows > 1 else (1, 1)
                committed = await side.call(cell, payer, payee)
                if committed:
                    latencies.append(self._clock() - started)
                else:
                    gave_up += 1

        started, computed = self._clock(), time.process_time()
        await asyncio.gather(*(worker() for _ in range(cell.workers)))
        if counts:
            self.seconds += self._clock() - started  # to the end of the last call: a stall counts
            self.computed += time.process_time() - computed
            self.latencies += latencies
            self.gave_up += gave_up
            self.runs += side.runs


def added(slices: list[Meter]) -> Meter:
    """Return what one side has done in several slices as one meter."""
    whole = Meter()
    for one in slices:
        whole.seconds += one.seconds
        whole.computed += one.computed
        whole.latencies += one.latencies
        whole.gave_up += one.gave_up
        whole.runs += one.runs
    return whole


def outcome(meters: list[Meter]) -> Outcome:
    """Return the figures of one side, which ran in several processes or in one."""
    latencies = sorted(latency for meter in meters for latency in meter.latencies)
    gave_up = sum(meter.gave_up for meter in meters)
    calls = len(latencies) + gave_up
    return Outcome(
        sum(len(meter.latencies) / meter.seconds for meter in meters),
        gave_up / (calls or 1),
        latencies[int(len(latencies) * 0.99)] if latencies else float("inf"),
        sum(meter.runs for meter in meters) / (calls or 1),
    )


async def prepare(engine: AsyncEngine, rows: int, beside: int = 0) -> None:
    """Fill the table, with room for new versions as in one that has been in use.

    Args:
        engine: its database.
        rows: that will be used.
        beside: how many more that will not be.
    """
    postgresql = engine.dialect.name == "postgresql"
    # In a full page a new version has no room: for seconds nearly all updates would write into the index, and SERIALIZABLE takes
    # that for a write of all its rows.
    room = " WITH (fillfactor = 50)" if postgresql else ""
    async with engine.begin() as connection:
        await connection.execute(text("DROP TABLE IF EXISTS account"))
        await connection.execute(text(f"CREATE TABLE account (id INTEGER PRIMARY KEY, balance INTEGER NOT NULL){room}"))
        await connection.execute(
            text("INSERT INTO account VALUES (:id, 0)"), [{"id": number} for number in range(1, rows + beside + 1)]
        )
        if postgresql:
            # else the planner knows nothing of the table and scans it, and SERIALIZABLE takes that for a read of every row
            await connection.exec_driver_sql("ANALYZE account")


def measure(url: str, cell: Cell, seconds: float, only: list[str] | None = None) -> dict[str, Outcome]:
    """Measure one cell.

    Args:
        url: of a database.
        cell: which.
        seconds: for each side.
        only: the sides; None is every one.

    Raises:
        SystemExit: there is no such side.
    """
    return asyncio.run(_measure(url, cell, seconds, only))


async def _measure(url: str, cell: Cell, seconds: float, only: list[str] | None) -> dict[str, Outcome]:
    """Run the sides: cold for two seconds, then slices in turns, so that they share the machine's moods."""
    logging.getLogger("sqla_uow").setLevel(logging.ERROR)
    engine = create_async_engine(url, pool_size=cell.workers, max_overflow=0, pool_timeout=120)
    await prepare(engine, cell.rows)
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(engine.dispose)
        compared = _chosen(await every_side(engine, stack), only)
        stack.enter_context(UnitOfWorkManager(engine).activate())
        cold: dict[str, tuple[float, float]] = {}
        for name, side in compared.items():
            halves = (Meter(), Meter())
            for half in halves:
                await half.slice(side, cell, WARM_UP / 2, counts=True)
            cold[name] = (outcome([halves[0]]).commits, outcome([halves[1]]).commits)
        meters = {name: Meter() for name in compared}
        for _ in range(max(1, round(seconds / SLICE))):
            for name, side in compared.items():
                await meters[name].slice(side, cell, SLICE, counts=True)
    return {name: outcome([meter])._replace(cold=cold[name]) for name, meter in meters.items()}


def _chosen(compared: dict[str, Side], only: list[str] | None) -> dict[str, Side]:
    if only is None:
        return compared
    unknown = [repr(name) for name in only if name not in compared]
    if unknown:
        raise SystemExit(f"benchmarks: no side is called {' or '.join(unknown)}; there are {', '.join(compared)}")
    return {name: compared[name] for name in only}


def cells(text_of_cells: str) -> list[Cell]:
    """Parse several cells, with commas between them."""
    return [Cell.parse(one) for one in text_of_cells.split(",")]


def report(
    url: str,
    which: str,
    seconds: float,
    measured: Callable[[str, Cell, float], dict[str, Outcome]],
) -> dict[str, dict[str, dict[str, float]]]:
    """Measure the cells, print a line for each side as soon as it is known, and return the figures."""
    figures = {}
    print(f"{'rows/pause/workers':22}{'':18}{'commits/s':>10}{'gave up':>9}{'p99, ms':>9}{'attempts':>10}{'cold':>14}")
    for cell in cells(which):
        name = str(cell)
        outcomes = measured(url, cell, seconds)
        for side, outcome in outcomes.items():
            print(
                f"{name:22}{side:18}{outcome.commits:>10.0f}{outcome.gave_up:>9.1%}{outcome.p99 * 1000:>9.0f}"
                f"{outcome.attempts:>10.2f}{'/'.join(f'{rate:.0f}' for rate in outcome.cold):>14}",
                flush=True,
            )
        figures[name] = {side: outcome._asdict() for side, outcome in outcomes.items()}
    return figures
