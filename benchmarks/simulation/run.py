"""One situation: so many processes call one side in one cell for some seconds, in slices as `processes` measures them."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from benchmarks import contention
from benchmarks.simulation import virtual
from benchmarks.simulation.client import Pool, Process
from benchmarks.simulation.machine import Cores, Thread
from benchmarks.simulation.server import Server, Settings
from benchmarks.simulation.sides import SIDES

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.contention_sides import Cell, Side
    from benchmarks.simulation.costs import Costs

__all__ = ["Played", "Situation", "play", "simulate"]


@dataclass(frozen=True, kw_only=True)
class Situation:
    """What is simulated.

    Attributes:
        cell: rows, pause, and workers of each process.
        processes: how many.
        costs: of the side, of one call at a time.
        batched: what is left of what a client computes where it has more to do; see `Thread`.
        settings: of the server.
        cores: of the server.
        shared: the processes compute on these, too; else each has a core of its own.
        others: threads of somebody else that compute there all the time.
        pool_size: connections of a process; None is one for each worker.
        pool_timeout: seconds to wait for one.
        warm_up: seconds that do not count.
        slices: how many count.
        length: seconds of each.
        pause: seconds between two of them, in which others are measured.
        build: makes the side.
        seed: of chance.
    """

    cell: Cell
    processes: int
    costs: Costs
    batched: float = 1.0
    settings: Settings = field(default_factory=Settings)
    cores: int = 2
    shared: bool = True
    others: float = 0.0
    pool_size: int | None = None
    pool_timeout: float = 120.0
    warm_up: float = contention.WARM_UP
    slices: int = 4
    length: float = contention.SLICE
    pause: float = 3 * contention.SLICE
    build: Callable[[Process, Costs, random.Random], Side] = SIDES["sqla_uow"]
    seed: int = 1


class Played(NamedTuple):
    """What came of a situation, and what was in it."""

    outcome: contention.Outcome
    server: Server
    sides: list[Side]
    meters: list[contention.Meter]


def simulate(situation: Situation) -> contention.Outcome:
    """Return what comes of it."""
    return play(situation).outcome


def play(situation: Situation) -> Played:
    """Return the server and the sides of all processes as well."""
    return virtual.run(partial(_play, situation))


async def _play(situation: Situation, loop: virtual.VirtualLoop) -> Played:
    chance = random.Random(situation.seed)  # noqa: S311  # no secret
    cell, costs = situation.cell, situation.costs
    cores = Cores(loop, situation.cores, situation.others)
    server = Server(loop, cores, situation.settings, chance)
    parts: list[tuple[Side, contention.Meter]] = []
    for _ in range(situation.processes):
        own = cores if situation.shared else Cores(loop, 1)
        pool = Pool(server, situation.pool_size or cell.workers, situation.pool_timeout)
        process = Process(server, Thread(loop, own, situation.batched), pool, chance)
        side = situation.build(process, costs, chance)
        parts.append((side, contention.Meter(loop.time, chance)))
    for number in range(1 + situation.slices):
        length = situation.length if number else situation.warm_up
        await asyncio.gather(*(meter.slice(side, cell, length, counts=number > 0) for side, meter in parts))
        if number < situation.slices:
            await asyncio.sleep(situation.pause)
    meters = [meter for _side, meter in parts]
    return Played(contention.outcome(meters), server, [side for side, _meter in parts], meters)
