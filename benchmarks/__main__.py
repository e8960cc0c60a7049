"""Run one benchmark: ``python -m benchmarks NAME --database sqlite|postgresql|mariadb``."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shlex
import sys
import tempfile
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import distributions
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sqlalchemy

from benchmarks import (
    contention,
    instructions,
    keys,
    memory,
    middleware,
    overhead,
    processes,
    transaction_peers,
    web_peers,
)
from benchmarks.contention_sides import Cell
from benchmarks.simulation import study, validation
from benchmarks.simulation.costs import Costs
from tests.servers import MariaDB, PostgreSQL

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DEPENDENCIES = ("sqlalchemy", "asyncpg", "asyncmy", "aiosqlite", "starlette", "uvicorn")
CELLS = {"contention": contention.CELLS, "processes": processes.CELLS, "simulation": validation.CELLS}
NAMES = ["overhead", "instructions", "middleware", "keys", "memory", "contention", "processes", "simulation"]
SERVERS = {"postgresql": (PostgreSQL, "asyncpg"), "mariadb": (MariaDB, "asyncmy")}


@contextlib.contextmanager
def database(name: str) -> Iterator[str]:
    """Yield the URL of a throwaway database."""
    if name == "sqlite":
        with tempfile.TemporaryDirectory() as folder:
            yield f"sqlite+aiosqlite:///{Path(folder) / 'benchmark.db'}"
        return
    kind, driver = SERVERS[name]
    reason = kind.unavailable()
    if reason is not None:
        raise SystemExit(f"benchmarks: {reason}")
    with kind() as server:
        yield server.url(driver, database=server.create_database())


def about(name: str, database_name: str) -> dict[str, str]:
    """Return what figures depend on: what was run, where, with which versions, and when."""
    installed = {one.name.lower().replace("_", "-"): one.version for one in distributions()}
    names = [*DEPENDENCIES, *transaction_peers.PEERS, *web_peers.PEERS]
    versions = ", ".join(f"{one} {installed[one]}" for one in dict.fromkeys(names) if one in installed)
    said = sys.argv[1:]
    for option in ("--json", "--costs"):  # where somebody's files are is nobody else's business
        if option in said:
            del said[said.index(option) : said.index(option) + 2]
    today = datetime.now(UTC).date()
    return {
        "name": name,
        "database": database_name,
        "command": f"python -m benchmarks {shlex.join(said)}",
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, {versions}; {today}",
    }


def main() -> None:
    """Parse the command line, measure, print a table, and write the figures where asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--database", choices=["sqlite", *SERVERS], default="sqlite")
    parser.add_argument(
        "--rounds", type=int, default=40, help="overhead, middleware, keys: interleaved rounds; default: 40"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=6.0,
        help="contention, processes, simulation: for each side of a cell; default: 6",
    )
    parser.add_argument(
        "--cells",
        help="contention, processes, simulation: rows/pause in ms/workers[/ordered|/skew|/four], with commas between",
    )
    parser.add_argument(
        "--sides",
        metavar="NAMES",
        help="contention: who is compared, with commas between, such as 'sqla_uow,full jitter'; default: all",
    )
    parser.add_argument(
        "--processes", type=int, default=processes.PROCESSES, help="processes: how many; default: %(default)s"
    )
    parser.add_argument(
        "--costs",
        type=Path,
        metavar="FILE",
        help="simulation: what --json has kept; nothing is measured again, and 1 to 1,000 processes are simulated with that",
    )
    parser.add_argument(
        "--largest", type=int, default=max(study.PROCESSES), help="simulation: processes at most; default: %(default)s"
    )
    parser.add_argument("--units", type=int, default=100_000, help="memory: how many end; default: 100000")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    arguments = parser.parse_args()
    if arguments.name == "simulation" and arguments.database != "postgresql":
        parser.error(f"simulation models PostgreSQL, not {arguments.database}; use --database postgresql")
    if arguments.rounds < 1:
        parser.error(f"--rounds {arguments.rounds} measures nothing; use 1 or more")
    cells = arguments.cells or CELLS.get(arguments.name, contention.CELLS)
    try:
        contention.cells(cells)
    except ValueError:
        parser.error(f"--cells {cells!r} is no list of rows/pause/workers; an example is 10/0/32,1000/5/8/ordered")
    print(f"{arguments.database}, Python {platform.python_version()}, SQLAlchemy {sqlalchemy.__version__}")
    figures: object
    if arguments.costs is not None:
        figures = simulate_many(json.loads(arguments.costs.read_text())["figures"]["validation"], arguments.largest)
        write(arguments, figures)
        return
    with database(arguments.database) as url:
        figures = run(arguments, url, cells)
    write(arguments, figures)


def run(arguments: argparse.Namespace, url: str, cells: str) -> object:
    """Run the benchmark that was asked for; return its figures."""
    if arguments.name == "simulation":
        return simulate_many(validation.compare(url, cells, arguments.seconds), arguments.largest)
    runs: dict[str, Callable[[], object]] = {
        "overhead": partial(overhead.report, url, arguments.rounds),
        "instructions": partial(instructions.report, url),
        "middleware": partial(middleware.report, url, arguments.rounds),
        "keys": partial(keys.report, url, arguments.rounds),
        "memory": partial(memory.report, url, arguments.units),
        "contention": partial(
            contention.report,
            url,
            cells,
            arguments.seconds,
            partial(contention.measure, only=None if arguments.sides is None else arguments.sides.split(",")),
        ),
        "processes": partial(
            contention.report, url, cells, arguments.seconds, partial(processes.measure, processes=arguments.processes)
        ),
    }
    return runs[arguments.name]()


def simulate_many(validated: dict[str, Any], largest: int) -> dict[str, Any]:
    """Simulate 1 to so many processes with the costs of the first round, of the largest table."""
    kept = validated[min(validated, key=int)]["costs"]
    costs = {side: Costs.of(one) for side, one in kept[max(kept, key=lambda cell: Cell.parse(cell).rows)].items()}
    scale = study.study(costs, largest)
    return {"validation": validated, "scale": scale, "costs": {side: one.as_dict() for side, one in costs.items()}}


def write(arguments: argparse.Namespace, figures: object) -> None:
    """Write the figures where asked."""
    if arguments.json is not None:
        kept = {"about": about(arguments.name, arguments.database), "figures": figures}
        arguments.json.write_text(json.dumps(kept, indent=2) + "\n")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("benchmarks: interrupted")
