"""How many instructions a call takes, by valgrind: the same figure on a machine that is busy as on one that is not.

What the server computes is not in it, nor what waiting costs.  Each side runs in a process of its own,
``python -m benchmarks.instructions URL KEY``, which tells valgrind where the calls begin and end by calling libc's
`getloadavg`: nothing else does.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import middleware, overhead, versions

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    Call = Callable[[], Awaitable[object]]

__all__ = ["report"]

WARM_UP, CALLS = 20, 40
MARK = "getloadavg"
CASES = ("no SQL", "one SELECT", "ten SELECTs", "one SELECT, SERIALIZABLE with retries")


async def every_call(url: str, stack: contextlib.AsyncExitStack) -> dict[str, dict[str, Call]]:
    """Return what is compared in each case: the one by hand, and ours."""
    calls = {f"transaction, {what}": sides for what, (sides, _) in (await overhead.every_case(url, stack)).items()}
    apps = await middleware.applications(url, stack)
    for what in middleware.BASELINES:
        path, sides = middleware.compared(what, apps)
        calls[f"request, {what}"] = {name: middleware.in_process(app, path) for name, app in sides.items()}
    calls[f"transaction, {versions.CASE}"] = await versions.every_call(url, stack)
    cases = {f"transaction, {what}" for what in (*CASES, versions.CASE)}
    wanted = cases | {f"request, {what}" for what in middleware.BASELINES}
    return {what: dict(_ours(sides)) for what, sides in calls.items() if what in wanted}


def _ours(sides: dict[str, Call]) -> Iterator[tuple[str, Call]]:
    baseline = next(iter(sides))
    return ((name, call) for name, call in sides.items() if name == baseline or name.startswith("sqla_uow"))


async def run(url: str, key: str) -> None:
    """Call one side, and mark the calls that count."""
    what, name = key.split(": ")
    async with contextlib.AsyncExitStack() as stack:
        call = (await every_call(url, stack))[what][name]
        for _ in range(WARM_UP):
            await call()
        gc.collect()
        gc.disable()  # when it comes by is not up to the side
        getattr(os, MARK)()
        for _ in range(CALLS):
            await call()
        getattr(os, MARK)()


async def names(url: str) -> dict[str, list[str]]:
    """Return the sides of each case."""
    async with contextlib.AsyncExitStack() as stack:
        return {what: list(sides) for what, sides in (await every_call(url, stack)).items()}


def count(url: str, key: str) -> float:
    """Return how many instructions one call of a side takes."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "counted"
        tool = ["valgrind", "--tool=callgrind", f"--dump-before={MARK}", f"--callgrind-out-file={out}"]
        program = [sys.executable, "-m", "benchmarks.instructions", url, key]
        environment = {**os.environ, "PYTHONHASHSEED": "0"}
        done = subprocess.run([*tool, *program], capture_output=True, text=True, check=False, env=environment)  # noqa: S603  # ours
        between = out.with_suffix(".2")  # the first is what came before the calls
        if done.returncode or not between.exists():
            raise SystemExit(f"benchmarks: {key} failed under valgrind: {done.stderr[-2000:]}")
        found = re.search(r"^(?:totals|summary): (\d+)", between.read_text(), re.MULTILINE)
    assert found is not None  # noqa: S101  # it is in each of callgrind's files
    return int(found[1]) / CALLS


def report(url: str) -> dict[str, dict[str, dict[str, float]]]:
    """Measure, print a line for each side as soon as it is known, and return the figures."""
    if shutil.which("valgrind") is None:
        raise SystemExit("benchmarks: valgrind not found on PATH; Debian: apt-get install valgrind")
    figures: dict[str, dict[str, dict[str, float]]] = {}
    for what, sides in asyncio.run(names(url)).items():
        print(f"{what:44}{'instructions':>14}{'ratio':>8}")
        case = figures[what] = {}
        for name in sides:
            taken = count(url, f"{what}: {name}")
            ratio = taken / next(iter(case.values()))["instructions"] if case else 1.0
            case[name] = {"instructions": taken, "ratio": ratio}
            print(f"  {name:42}{taken:>14,.0f}{ratio:>8.2f}", flush=True)
    return figures


if __name__ == "__main__":
    asyncio.run(run(sys.argv[1], sys.argv[2]))
