"""Every benchmark runs, once and in small: the figures are for `python -m benchmarks` on a machine that has nothing else to do."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

from benchmarks import instructions
from tests.servers import PostgreSQL

pytestmark = pytest.mark.skipif(
    "SQLA_UOW_BENCHMARKS" not in os.environ, reason="takes a minute, and packages of its own: tox -e benchmarks"
)
ARGUMENTS = {
    "overhead": ["--rounds=1"],
    "middleware": ["--rounds=1"],
    "memory": ["--units=50"],
    "contention": ["--cells=2/0/2,2/0/2/skew", "--seconds=1"],
}


def run(module, *arguments):
    """Run a module as a person does."""
    return subprocess.run([sys.executable, "-m", module, *arguments], check=True, capture_output=True, text=True)


@pytest.mark.timeout(180)
def test_every_benchmark_measures_and_is_reported(tmp_path):
    """Deliverable 4: one command each; every side has figures, and page and plots are made of them."""
    for folder in ("reference", "images"):
        (tmp_path / folder).mkdir()
    kept = {name: tmp_path / f"{name}.json" for name in ARGUMENTS}
    for name, file in kept.items():
        run("benchmarks", name, *ARGUMENTS[name], "--json", str(file))
    run("benchmarks.report", *map(str, kept.values()), "--docs", str(tmp_path))
    page = (tmp_path / "reference/performance-figures.md").read_text()
    assert [line for line in page.splitlines() if line.startswith("## ")] == [
        f"## {name}, sqlite" for name in ARGUMENTS
    ]
    assert {file.name for file in (tmp_path / "images").iterdir()} == {
        f"benchmark-{name}-sqlite.svg" for name in ARGUMENTS if name != "memory"
    }
    for name in ("overhead", "middleware"):
        for sides in json.loads(kept[name].read_text())["figures"].values():
            assert "sqla_uow" in sides
            assert all(figure["microseconds"] > 0 for figure in sides.values())
    for sides in json.loads(kept["contention"].read_text())["figures"].values():
        assert sides["sqla_uow"]["commits"] > 0


@pytest.mark.timeout(60)
def test_only_some_sides_are_compared(tmp_path):
    """Some of them stall for minutes; a name that is nobody's is told, with those that there are."""
    file = tmp_path / "contention.json"
    one_cell = ("benchmarks", "contention", "--cells=2/0/2", "--seconds=1")
    run(*one_cell, "--sides=sqla_uow,full jitter", "--json", str(file))
    assert list(json.loads(file.read_text())["figures"]["2/0/2"]) == ["sqla_uow", "full jitter"]
    with pytest.raises(subprocess.CalledProcessError) as caught:
        run(*one_cell, "--sides=ours")
    assert caught.value.stderr.splitlines()[-1].startswith(
        "benchmarks: no side is called 'ours'; there are sqla_uow, full"
    )


@pytest.mark.timeout(300)
@pytest.mark.skipif(PostgreSQL.unavailable() is not None, reason=str(PostgreSQL.unavailable()))
def test_the_simulation_is_compared_and_reported(tmp_path):
    """Measured and simulated stand side by side for 1, 2 and 4 processes; the page has a table of each, and a plot."""
    for folder in ("reference", "images"):
        (tmp_path / folder).mkdir()
    arguments = ["--database=postgresql", "--cells=1000/0/2", "--seconds=1", "--largest=1"]
    run("benchmarks", "simulation", *arguments, "--json", str(tmp_path / "simulation.json"))
    run("benchmarks.report", str(tmp_path / "simulation.json"), "--docs", str(tmp_path))
    figures = json.loads((tmp_path / "simulation.json").read_text())["figures"]
    assert list(figures["validation"]) == ["1", "2", "4"]
    for one in figures["validation"].values():
        for row in one["outcomes"].values():
            assert row["measured"]["commits"] > 0
            assert 0.1 < row["ratio"] < 10  # what it is worth is for a machine that has nothing else to do
    assert "## Measured and simulated" in (tmp_path / "reference/simulation-figures.md").read_text()
    assert (tmp_path / "images/benchmark-simulation-postgresql.svg").stat().st_size > 0


@pytest.mark.skipif(
    shutil.which("valgrind") is None, reason="valgrind not found on PATH; Debian: apt-get install valgrind"
)
@pytest.mark.timeout(180)
def test_instructions_of_two_runs_are_the_same():
    """Deliverable 4: the figure is of the code and not of the machine's mood."""
    with PostgreSQL() as server:
        url = server.url("asyncpg")
        one, other = (instructions.count(url, "transaction, no SQL: sqla_uow") for _ in range(2))
    assert one > 0
    assert one == pytest.approx(other, rel=0.02)


@pytest.mark.timeout(180)
def test_nothing_is_left_behind_and_a_scope_is_small(tmp_path):
    """Deliverable 4: under 4 KiB per open scope; ended units leave no objects, so a leak of one per unit is seen."""
    units = 500
    run("benchmarks", "memory", f"--units={units}", "--json", str(tmp_path / "memory.json"))
    figures = json.loads((tmp_path / "memory.json").read_text())["figures"]
    assert figures["bytes"]["scope"] < 4096
    assert figures["left"][-1]["objects"] < units / 10
