"""What is asked of the simulation: 1 to 1,000 processes, retries and back-off, pools against `max_connections`."""

from __future__ import annotations

import logging
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.contention_sides import Cell
from benchmarks.simulation.run import Situation, play
from benchmarks.simulation.server import Settings
from benchmarks.simulation.sides import SIDES, Ours

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from benchmarks.simulation.costs import Costs

__all__ = ["QUESTIONS", "study"]

PROCESSES = (1, 4, 16, 64, 250, 1000)
ROWS = {"10 rows": 10, "1,000 rows": 1000, "100,000 rows": 100_000}
WORKERS = 2
DELAY = 0.00025
"""Seconds that a message is on its way: another machine of the same building."""
SERVER = Settings(max_connections=10_000)
"""The rows are in a large table, so that each is found through the index, and there is room for a new version beside it."""
SECONDS = {10: (3.0, 10.0), 1000: (1.0, 2.0), 100_000: (0.5, 1.0)}
"""By rows, seconds before it counts, and seconds that do: where little is committed, for longer."""
CORES = 4
"""Of the server; each process has one of its own, elsewhere."""
QUESTIONS = ("processes", "settings", "pools")


class Asked(NamedTuple):
    """One simulation: of which question, for which case, by whom."""

    question: str
    case: str
    side: str
    situation: Situation


def study(costs: Mapping[str, Costs], largest: int) -> dict[str, dict[str, dict[str, Any]]]:
    """Simulate all that is asked, on all cores; print a line for each.

    Args:
        costs: of a transaction, by side.
        largest: what is asked of more processes is left out.

    Returns:
        the figures by question, case and side.
    """
    figures: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in QUESTIONS}
    print(f"{'':44}{'commits/s':>10}{'gave up':>9}{'p99, s':>9}{'attempts':>10}")
    asked = [one for one in _asked(costs) if one.situation.processes <= largest]
    with ProcessPoolExecutor(os.cpu_count(), initializer=_calm) as pool:
        for one, answer in zip(asked, pool.map(_answer, [one.situation for one in asked]), strict=True):
            figures[one.question].setdefault(one.case, {})[one.side] = answer
            print(
                f"{one.case + ', ' + one.side:44}{answer['commits']:>10.0f}{answer['gave_up']:>9.1%}{answer['p99']:>9.2f}"
                f"{answer['attempts']:>10.2f}",
                flush=True,
            )
    return figures


def _calm() -> None:
    os.nice(10)
    logging.getLogger("sqla_uow").setLevel(logging.CRITICAL)


def _answer(situation: Situation) -> dict[str, Any]:
    played = play(situation)
    return played.outcome._asdict() | {"errors": played.server.errors}


def _asked(costs: Mapping[str, Costs]) -> Iterator[Asked]:
    """Yield everything; what takes longest first, so that no core is left with it at the end."""
    yield from _pools(costs)
    for processes in reversed(PROCESSES):
        for name, rows in ROWS.items():
            for side in ("sqla_uow", "full jitter", "lock first"):
                situation = _situation(costs, side, processes, Cell(rows, 0, WORKERS))
                yield Asked("processes", f"{name}, {processes} processes", side, situation)
    yield from _settings(costs)


def _settings(costs: Mapping[str, Costs]) -> Iterator[Asked]:
    """Yield what else can be set or written where many processes want ten rows."""
    for processes in (16, 64):
        case, cell = f"10 rows, {processes} processes", Cell(10, 0, WORKERS)
        for retries, cap in ((5, 0.1), (5, 1.0), (10, 1.0), (20, 0.1), (20, 1.0), (20, 5.0)):
            build = partial(Ours, retries=retries, cap=cap)
            situation = _situation(costs, "sqla_uow", processes, cell, build=build)
            yield Asked("settings", case, f"retries={retries}, cap={cap:g}", situation)
        off = _situation(costs, "sqla_uow", processes, cell, build=partial(Ours, contention="off"))
        yield Asked("settings", case, 'contention="off"', off)
        ordered = _situation(costs, "sqla_uow", processes, cell._replace(ordered=True))
        yield Asked("settings", case, "rows in one order", ordered)
        soon = replace(SERVER, deadlock_timeout=0.1)
        yield Asked(
            "settings", case, "deadlock_timeout=100ms", _situation(costs, "sqla_uow", processes, cell, settings=soon)
        )
        yield Asked("settings", case, "lock first", _situation(costs, "lock first", processes, cell))


def _pools(costs: Mapping[str, Costs]) -> Iterator[Asked]:
    """Yield pools of several sizes for 64 processes of eight workers, where the server takes 200 connections."""
    for size in (1, 2, 3, 4, 8):
        situation = _situation(
            costs, "sqla_uow", 64, Cell(100_000, 0, 8), pool_size=size, pool_timeout=30.0,
            settings=Settings(max_connections=200),
        )  # fmt: skip
        yield Asked("pools", "100,000 rows, 64 processes of 8 callers", f"pool_size={size}", situation)


def _situation(costs: Mapping[str, Costs], side: str, processes: int, cell: Cell, **more: Any) -> Situation:
    mine = costs["sqla_uow" if side == "sqla_uow" else "full jitter"]
    warm_up, length = SECONDS[cell.rows]
    asked: dict[str, Any] = {"build": SIDES[side], "settings": SERVER, "warm_up": warm_up, "length": length} | more
    return Situation(
        cell=cell, processes=processes, costs=replace(mine, delay=DELAY), cores=CORES, shared=False, slices=1, pause=0.0, **asked,
    )  # fmt: skip
