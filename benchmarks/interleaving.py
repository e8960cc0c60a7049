"""Times several ways of doing the same thing in turns, so that they share the machine's moods."""

from __future__ import annotations

import statistics
import sys
import time
from operator import sub, truediv
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    Call = Callable[[], Awaitable[object]]

__all__ = ["Figure", "compare", "left_out", "report"]

_WARM_UP = 2


class Figure(NamedTuple):
    """What one side took: the median of its rounds, and the medians of what each round says against the baseline's.

    Attributes:
        microseconds: for one call.
        ratio: to the baseline; 1.0 for the baseline itself.
        extra: microseconds over the baseline.
        cpu: microseconds that this process, with its threads, computed for one call: steadier on a machine in use.
        cpu_ratio: of these, to the baseline.
    """

    microseconds: float
    ratio: float
    extra: float
    cpu: float
    cpu_ratio: float


async def compare(sides: Mapping[str, Call], calls: int, rounds: int) -> dict[str, Figure]:
    """Time every side in every round; the first is the baseline.

    A side's ratio is taken round by round, because the machine's speed drifts.  Each round begins with another side.

    Args:
        sides: what is called, by name.
        calls: how often in a round.
        rounds: how many are counted, after some to warm up.
    """
    names = list(sides)
    wall: dict[str, list[float]] = {name: [] for name in names}
    cpu: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + _WARM_UP):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            took, computed = await _time(sides[name], calls)
            if number >= _WARM_UP:
                wall[name].append(took)
                cpu[name].append(computed)
    base = names[0]
    return {name: _figure(wall[name], wall[base], cpu[name], cpu[base]) for name in names}


def _figure(wall: list[float], base: list[float], cpu: list[float], base_cpu: list[float]) -> Figure:
    return Figure(
        statistics.median(wall),
        statistics.median(map(truediv, wall, base)),
        statistics.median(map(sub, wall, base)),
        statistics.median(cpu),
        statistics.median(map(truediv, cpu, base_cpu)),
    )


async def _time(call: Call, calls: int) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(calls):
        await call()
    return (time.perf_counter() - wall) / calls * 1e6, (time.process_time() - cpu) / calls * 1e6


def _print_table(title: str, figures: Mapping[str, Figure]) -> None:
    """Print a line for each side."""
    print(f"{title:34}{'us':>10}{'a second':>10}{'ratio':>8}{'extra us':>10}{'cpu us':>10}{'ratio':>8}")
    for name, figure in figures.items():
        print(
            f"  {name:32}{figure.microseconds:>10.1f}{1e6 / figure.microseconds:>10.0f}{figure.ratio:>8.2f}"
            f"{figure.extra:>10.1f}{figure.cpu:>10.1f}{figure.cpu_ratio:>8.2f}",
            flush=True,
        )


def report(measured: Mapping[str, Mapping[str, Figure]]) -> dict[str, dict[str, dict[str, float]]]:
    """Print a table for each case; return the figures by name."""
    for what, sides in measured.items():
        _print_table(what, sides)
    return {what: {side: figure._asdict() for side, figure in sides.items()} for what, sides in measured.items()}


def left_out(name: str, error: ImportError) -> None:
    """Say in one line that a peer is not installed."""
    print(f"benchmarks: {name} is left out ({error}); install the dependency group peers", file=sys.stderr)
