"""Real processes and simulated ones side by side, at 1, 2 and 4."""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from benchmarks import contention, processes
from benchmarks.simulation import calibration
from benchmarks.simulation.costs import Costs
from benchmarks.simulation.run import Situation, simulate
from benchmarks.simulation.server import Settings
from benchmarks.simulation.sides import SIDES

if TYPE_CHECKING:
    from benchmarks.contention_sides import Cell
    from benchmarks.simulation.costs import ClientCosts

__all__ = ["CELLS", "PROCESSES", "compare"]

PROCESSES = (1, 2, 4)
CELLS = "10/0/8,100/0/8,1000/0/8,10000/0/8"
SIDE = "full jitter"
"""Whose costs are those of every loop by hand."""
ALONE = "one at a time"
"""The side whose calls share no turn of the loop."""
SEEDS = (1, 2)
CORES = os.cpu_count() or 1
STAT = Path("/proc/stat")
BESIDE = 10_000
"""Rows that nobody touches.  A table of nothing but a hundred rows is scanned by each statement, until there are so many old
versions that it no longer is: half-way through."""


class Measured(NamedTuple):
    """What was measured with one number of processes.

    Attributes:
        costs: of a transaction, by cell and side.
        tables: how the server reads each cell's table.
        slices: of each process, by cell and side.
        others: threads of others that computed on the machine, before this did anything.
    """

    costs: dict[Cell, dict[str, Costs]]
    tables: dict[Cell, calibration.Table]
    slices: dict[tuple[Cell, str], list[list[contention.Meter]]]
    others: float


def compare(url: str, cells: str, seconds: float) -> dict[str, Any]:
    """Calibrate, measure and simulate; print both with their ratio."""
    wanted = contention.cells(cells)
    urls = asyncio.run(_databases(url, wanted))
    measured: dict[int, Measured] = {}
    for count in PROCESSES:  # all that is measured first, in as few minutes as can be
        measured[count] = _measure({urls[cell]: cell for cell in wanted}, seconds, count)
        print(f"{count} processes are measured; {measured[count].others:.1f} threads of others", flush=True)
    print(
        f"{'processes x cell':22}{'':14}{'measured/s':>11}{'slices':>12}{'simulated/s':>12}{'ratio':>7}{'gave up':>15}"
        f"{'attempts':>12}"
    )
    return {str(count): _compare(count, one) for count, one in measured.items()}


def _others(seconds: float = 2.0) -> float:
    """Return how many threads compute on this machine while this process waits."""
    before, started = _computed(), time.perf_counter()
    time.sleep(seconds)
    return (_computed() - before) / (time.perf_counter() - started)


def _computed() -> float:
    """Return the seconds that all cores together have computed; ``man 5 proc_stat`` names the columns."""
    user, nice, system, _idle, _iowait, irq, softirq, stolen = map(int, STAT.read_text().split(maxsplit=9)[1:9])
    return (user + nice + system + irq + softirq + stolen) / os.sysconf("SC_CLK_TCK")


def _measure(places: dict[str, Cell], seconds: float, count: int) -> Measured:
    others = _others()
    rows = {url: cell.rows for url, cell in places.items()}
    for url, cell in places.items():
        asyncio.run(processes.prepare(url, cell, BESIDE))
    before = asyncio.run(calibration.costs(rows))
    slices = processes.together(places, seconds, count, with_locks=False)
    after = asyncio.run(calibration.costs(rows))
    costs = {
        url: {side: Costs.mean([cost, after[url][side]]) for side, cost in sides.items()}
        for url, sides in before.items()
    }
    tables = {cell: asyncio.run(calibration.table(url)) for url, cell in places.items()}
    return Measured({cell: costs[url] for url, cell in places.items()}, tables, slices, others)


def _compare(count: int, measured: Measured) -> dict[str, Any]:
    """Simulate what was measured with so many processes."""
    calm = max(measured.tables, key=lambda cell: cell.rows)
    figures: dict[str, Any] = {}
    # A process that calls without a pause computes a little less for each than one that is watched at every message.
    unwatched = _computed_of(measured.slices[calm, ALONE], measured.costs[calm][SIDE].client)
    for (cell, side), parts in measured.slices.items():
        costs = measured.costs[cell]["sqla_uow" if side == "sqla_uow" else SIDE]
        batched = _computed_of(measured.slices[calm, side], costs.client) / unwatched
        situation = Situation(
            cell=cell, processes=count, costs=costs.of_client(unwatched), batched=batched, cores=CORES,
            others=measured.others, build=SIDES[side], settings=Settings(**measured.tables[cell]._asdict()),
        )  # fmt: skip
        meters = [contention.added(slices) for slices in parts]
        row = Row(contention.outcome(meters), _mean(situation), _by_slice(parts))
        print(f"{count} x {cell!s:18}{side:14}{row}", flush=True)
        figures[f"{cell} {side}"] = row.as_dict() | {"unwatched": unwatched, "batched": batched}
    return {
        "others": measured.others, "outcomes": figures,
        "tables": {str(cell): table._asdict() for cell, table in measured.tables.items()},
        "costs": {str(cell): {side: one.as_dict() for side, one in costs.items()} for cell, costs in measured.costs.items()},
    }  # fmt: skip


class Row(NamedTuple):
    """One cell and side, as it is and on paper."""

    measured: contention.Outcome
    simulated: contention.Outcome
    slices: list[float]

    @property
    def ratio(self) -> float:
        return self.simulated.commits / self.measured.commits

    def __str__(self) -> str:
        real, model = self.measured, self.simulated
        return (
            f"{real.commits:>11.0f}{f'{min(self.slices):.0f}-{max(self.slices):.0f}':>12}{model.commits:>12.0f}"
            f"{self.ratio:>7.2f}{f'{real.gave_up:.1%}/{model.gave_up:.1%}':>15}"
            f"{f'{real.attempts:.2f}/{model.attempts:.2f}':>12}"
        )

    def as_dict(self) -> dict[str, Any]:
        """Return it for ``--json``."""
        return {
            "measured": self.measured._asdict(), "simulated": self.simulated._asdict(), "slices": self.slices,
            "ratio": self.ratio,
        }  # fmt: skip


def _mean(situation: Situation) -> contention.Outcome:
    outcomes = [simulate(replace(situation, seed=seed)) for seed in SEEDS]
    return contention.Outcome(*(statistics.mean(figures) for figures in list(zip(*outcomes, strict=True))[:4]))


async def _databases(url: str, cells: list[Cell]) -> dict[Cell, str]:
    """Make a database for each cell."""
    engine = create_async_engine(url, isolation_level="AUTOCOMMIT")
    made = {}
    async with engine.connect() as connection:
        for number, cell in enumerate(cells):
            await connection.execute(text(f"CREATE DATABASE place{number}"))
            made[cell] = engine.url.set(database=f"place{number}").render_as_string(hide_password=False)
    await engine.dispose()
    return made


def _computed_of(parts: list[list[contention.Meter]], client: ClientCosts) -> float:
    """Return what the processes computed for a transaction, as a share of what it costs by the calibration."""
    meters = [contention.added(slices) for slices in parts]
    each = sum(meter.computed for meter in meters) / sum(meter.runs for meter in meters)
    return each / (client.start + client.begin + 2 * client.statement + client.end)


def _by_slice(parts: list[list[contention.Meter]]) -> list[float]:
    """Return the commits a second of each slice, of all processes together."""
    return [sum(len(meter.latencies) / meter.seconds for meter in slices) for slices in zip(*parts, strict=True)]
