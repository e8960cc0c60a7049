"""Write what ``--json`` has kept as a page with a table and a plot for each benchmark.

``python -m benchmarks.report overhead.json contention.json`` writes ``docs/reference/performance-figures.md`` and
``docs/images/benchmark-*.svg``, called after file and database; what the simulation has kept is a page of its own,
``simulation-figures.md``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.simulation import figures as simulation
from benchmarks.tables import table, three_digits

DOCS = Path(__file__).parents[1] / "docs"
HEAD = """# Performance figures

Written by `python -m benchmarks.report`; [Performance](performance.md) says how they are measured and what they mean.
"""
TIMES = {"us": "microseconds", "ratio": "ratio", "extra us": "extra", "CPU us": "cpu", "CPU ratio": "cpu_ratio"}
CONTENTION = {"commits/s": "commits", "gave up": "gave_up", "p99, s": "p99", "attempts": "attempts"}
INSTRUCTIONS = {"instructions": "instructions", "ratio": "ratio"}
COLD = {"cold, 1st s": "first", "cold, 2nd s": "second"}


def sides(what: str, figures: dict[str, dict[str, Any]], columns: dict[str, str]) -> str:
    """Return the table of one case."""
    rows = [[what, *columns]]
    rows += [[side, *(three_digits(figure[key]) for key in columns.values())] for side, figure in figures.items()]
    return table(rows)


def memory(figures: dict[str, Any]) -> str:
    """Return the tables of `memory`."""
    opened = [["open", "bytes"], *([name, f"{size:.0f}"] for name, size in figures["bytes"].items())]
    left = [["units that have ended", "bytes left", "objects left"]]
    left += [[str(one["units"]), str(one["bytes"]), str(one["objects"])] for one in figures["left"]]
    return table(opened) + "\n\n" + table(left)


def plot(figures: dict[str, dict[str, dict[str, Any]]], key: str, title: str, to: Path) -> None:
    """Draw a bar for each side of each case."""
    # of the dependency group benchmarks, wanted only here
    from matplotlib import rcParams  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    rcParams["svg.hashsalt"] = "sqla_uow"  # the same figures give the same file
    figure = Figure(figsize=(8, 0.6 + sum(0.5 + 0.24 * len(case) for case in figures.values())), layout="constrained")
    heights = [1 + len(case) for case in figures.values()]
    axes = figure.subplots(len(figures), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for axis, (what, case) in zip(axes, figures.items(), strict=True):
        colours = ["tab:blue" if side.startswith("sqla_uow") else "silver" for side in case]
        bars = axis.barh(list(case), [one[key] for one in case.values()], color=colours)
        axis.bar_label(bars, fmt="%.4g", padding=3, fontsize=7)
        axis.invert_yaxis()
        axis.margins(x=0.12)
        axis.set_title(f"{what}: {title}", loc="left", fontsize=9)
        axis.tick_params(labelsize=7)
    figure.savefig(to, metadata={"Date": None})


def section(file: Path, kept: dict[str, Any], docs: Path) -> str:
    """Return what the page says of one benchmark; draw its plot."""
    about, figures = kept["about"], kept["figures"]
    name = about["name"]
    parts = [f"## {name}, {about['database']}", f"`{about['command']}`  \n{about['machine']}"]
    if name == "memory":
        return "\n\n".join([*parts, memory(figures)])
    for case in figures.values():
        for side in case.values():
            side.update(zip(COLD.values(), side.get("cold", ()), strict=False))
    columns, key, title = TIMES, "microseconds", "us"
    if name in ("contention", "processes"):
        columns, key, title = CONTENTION | (COLD if name == "contention" else {}), "commits", "commits/s"
    elif name == "instructions":
        columns, key, title = INSTRUCTIONS, "instructions", "instructions"
    picture = f"benchmark-{file.stem}-{about['database']}.svg"
    plot(figures, key, title, docs / "images" / picture)
    parts.append(f"![{name}: {title}](../images/{picture})")
    parts += [sides(what, case, columns) for what, case in figures.items()]
    return "\n\n".join(parts)


def write(files: list[Path], docs: Path) -> None:
    """Write the pages and their plots."""
    parts = [HEAD.rstrip()]
    for file in files:
        kept = json.loads(file.read_text())
        if kept["about"]["name"] == "simulation":
            (docs / "reference" / "simulation-figures.md").write_text(simulation.page(kept, docs))
        else:
            parts.append(section(file, kept, docs))
    if len(parts) > 1:
        (docs / "reference" / "performance-figures.md").write_text("\n\n".join(parts) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, help="what --json has written")
    parser.add_argument("--docs", type=Path, default=DOCS, help="the folder to write to; default: docs of the checkout")
    arguments = parser.parse_args()
    write(arguments.files, arguments.docs)
