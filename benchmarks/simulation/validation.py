"""Real processes and simulated ones side by side, at 1, 2 and 4."""

from __future__ import annotations

import asyncio
import os
import statistics
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from benchmarks import contention, processes
from benchmarks.simulation import calibration
from benchmarks.simulation.run import Situation, play, simulate
from benchmarks.simulation.server import Settings
from benchmarks.simulation.sides import SIDES

if TYPE_CHECKING:
    from benchmarks.contention_sides import Cell
    from benchmarks.simulation.costs import ClientCosts, Costs

__all__ = ["CELLS", "PROCESSES", "compare"]

PROCESSES = (1, 2, 4)
CELLS = "10/0/8,100/0/8,1000/0/8,10000/0/8"
SIDE = "full jitter"
"""Whose costs are those of every loop by hand."""
SEEDS = (1, 2)
CORES = os.cpu_count() or 1
ROUNDS = 3
"""In which the others on the machine are looked for; the waits for a core are then within a few per cent."""


class Measured(NamedTuple):
    """What was measured with one number of processes.

    Attributes:
        costs: of a transaction, by cell and side.
        tables: how the server reads each cell's table.
        slices: of each process, by cell and side.
        load: runnable threads on the machine, the average over the last minute.
    """

    costs: dict[Cell, dict[str, Costs]]
    tables: dict[Cell, calibration.Table]
    slices: dict[tuple[Cell, str], list[list[contention.Meter]]]
    load: float


def compare(url: str, cells: str, seconds: float) -> dict[str, Any]:
    """Calibrate, measure and simulate; print both with their ratio."""
    wanted = contention.cells(cells)
    urls = asyncio.run(_databases(url, wanted))
    measured: dict[int, Measured] = {}
    for count in PROCESSES:  # all that is measured first, in as few minutes as can be
        measured[count] = _measure({urls[cell]: cell for cell in wanted}, seconds, count)
        print(f"{count} processes are measured; load average {measured[count].load:.1f}", flush=True)
    print(
        f"{'processes x cell':22}{'':14}{'measured/s':>11}{'slices':>12}{'simulated/s':>12}{'ratio':>7}{'gave up':>15}"
        f"{'attempts':>12}{'others':>8}"
    )
    return {str(count): _compare(count, one) for count, one in measured.items()}


def _measure(places: dict[str, Cell], seconds: float, count: int) -> Measured:
    slices = processes.together(places, seconds, count, with_locks=False)
    costs = asyncio.run(calibration.costs({url: cell.rows for url, cell in places.items()}))
    tables = {cell: asyncio.run(calibration.table(url)) for url, cell in places.items()}
    return Measured({cell: costs[url] for url, cell in places.items()}, tables, slices, os.getloadavg()[0])


def _compare(count: int, measured: Measured) -> dict[str, Any]:
    """Simulate what was measured with so many processes."""
    calm = max(measured.tables, key=lambda cell: cell.rows)
    figures: dict[str, Any] = {}
    others = 0.0
    for (cell, side), parts in measured.slices.items():
        costs = measured.costs[cell]["sqla_uow" if side == "sqla_uow" else SIDE]
        batched = _batched(measured.slices[calm, side], costs.client)
        situation = Situation(
            cell=cell, processes=count, costs=costs, batched=batched, cores=CORES, build=SIDES[side],
            settings=Settings(**measured.tables[cell]._asdict()),
        )  # fmt: skip
        meters = [contention.added(slices) for slices in parts]
        others = _others(situation, others, _share_waited(meters))
        row = Row(
            contention.outcome(meters), _mean(replace(situation, others=others)), _by_slice(parts), others,
        )  # fmt: skip
        print(f"{count} x {cell!s:18}{side:14}{row}", flush=True)
        figures[f"{cell} {side}"] = row.as_dict() | {"waited": _share_waited(meters), "batched": batched}
    return {
        "load": measured.load, "outcomes": figures,
        "tables": {str(cell): table._asdict() for cell, table in measured.tables.items()},
        "costs": {str(cell): {side: one.as_dict() for side, one in costs.items()} for cell, costs in measured.costs.items()},
    }  # fmt: skip


class Row(NamedTuple):
    """One cell and side, as it is and on paper."""

    measured: contention.Outcome
    simulated: contention.Outcome
    slices: list[float]
    others: float

    @property
    def ratio(self) -> float:
        return self.simulated.commits / self.measured.commits

    def __str__(self) -> str:
        real, model = self.measured, self.simulated
        return (
            f"{real.commits:>11.0f}{f'{min(self.slices):.0f}-{max(self.slices):.0f}':>12}{model.commits:>12.0f}"
            f"{self.ratio:>7.2f}{f'{real.gave_up:.1%}/{model.gave_up:.1%}':>15}"
            f"{f'{real.attempts:.2f}/{model.attempts:.2f}':>12}{self.others:>8.1f}"
        )

    def as_dict(self) -> dict[str, Any]:
        """Return it for ``--json``."""
        return {
            "measured": self.measured._asdict(), "simulated": self.simulated._asdict(), "slices": self.slices,
            "ratio": self.ratio, "others": self.others,
        }  # fmt: skip


def _share_waited(meters: list[contention.Meter]) -> float:
    """Return how long the processes waited for a core for each second that they computed."""
    return sum(meter.waited for meter in meters) / sum(meter.computed for meter in meters)


def _others(situation: Situation, others: float, waited: float) -> float:
    """Return beside how many threads of others the simulated processes wait as long for a core as the real ones did."""
    for _ in range(ROUNDS):
        threads = play(replace(situation, others=others, slices=1)).threads
        simulated = sum(thread.waited for thread in threads) / sum(thread.computed for thread in threads)
        others = max(0.0, others + CORES * (waited - simulated))
    return others


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


def _batched(parts: list[list[contention.Meter]], client: ClientCosts) -> float:
    """Return what a client computes for a transaction with other workers beside it, of what it does with one worker."""
    meters = [contention.added(slices) for slices in parts]
    each = sum(meter.computed for meter in meters) / sum(meter.runs for meter in meters)
    return each / (client.start + client.begin + 2 * client.statement + client.end)


def _by_slice(parts: list[list[contention.Meter]]) -> list[float]:
    """Return the commits a second of each slice, of all processes together."""
    return [sum(len(meter.latencies) / meter.seconds for meter in slices) for slices in zip(*parts, strict=True)]
