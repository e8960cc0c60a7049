"""The page of the simulation: tables, and plots over the number of processes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmarks.tables import table, three_digits

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["page"]

HEAD = """# Figures of the simulation

Written by `python -m benchmarks.report`; [Many processes](../explanation/many-processes.md) says what they mean."""
LINES = {"commits": "commits/s", "gave_up": "gave up", "p99": "99th percentile, s"}
COLOURS = {"sqla_uow": "tab:blue", "full jitter": "tab:grey", "lock first": "tab:green"}
CLOSE = 0.2
"""How far the simulated throughput may be from the measured one."""


def page(kept: dict[str, Any], docs: Path) -> str:
    """Return the page; draw its plot."""
    about, figures = kept["about"], kept["figures"]
    picture = f"benchmark-simulation-{about['database']}.svg"
    scale = figures["scale"]
    plot(scale["processes"], docs / "images" / picture)
    parts = [
        HEAD,
        f"`{about['command']}`  \n{about['machine']}",
        "## Measured and simulated",
        validation(figures["validation"]),
    ]
    parts += ["## What was measured for it", costs(figures["validation"], figures["costs"])]
    parts += [
        "## 1 to 1,000 processes",
        f"![commits, give-ups and 99th percentile over processes](../images/{picture})",
    ]
    for question in scale.values():
        for case, sides in question.items():
            parts.append(outcomes(case, sides))
    return "\n\n".join(parts) + "\n"


def validation(rounds: dict[str, Any]) -> str:
    """Return the table of both; slices are the least and the most of any."""
    rows = [["processes x cell, side", "measured/s", "slices", "simulated/s", "ratio", "gave up", "attempts"]]
    for count, one in rounds.items():
        for which, row in one["outcomes"].items():
            real, model, slices = row["measured"], row["simulated"], row["slices"]
            rows.append(
                [
                    f"{count} x {which}",
                    f"{real['commits']:.0f}",
                    f"{min(slices):.0f} to {max(slices):.0f}",
                    f"{model['commits']:.0f}",
                    f"{row['ratio']:.2f}",
                    f"{real['gave_up']:.1%}, {model['gave_up']:.1%}",
                    f"{real['attempts']:.2f}, {model['attempts']:.2f}",
                ]
            )
    return table(rows) + "\n\n" + within(rounds)


def within(rounds: dict[str, Any]) -> str:
    """Say how many are close."""
    said = []
    for count, one in rounds.items():
        ratios = [row["ratio"] for row in one["outcomes"].values()]
        close = sum(abs(ratio - 1) <= CLOSE for ratio in ratios)
        middle = sorted(ratios)[len(ratios) // 2]
        said.append(f"{count}: {close} of {len(ratios)} within {CLOSE:.0%}, the median ratio is {middle:.2f}")
    return "Processes " + "; ".join(said) + "."


def costs(rounds: dict[str, Any], scale: dict[str, Any]) -> str:
    """Return the table of what was measured, in microseconds."""
    named = {
        f"{count} x {cell} {side}": cost
        for count, one in rounds.items()
        for cell, sides in one["costs"].items()
        for side, cost in sides.items()
    }
    named |= {f"below, {side}": cost for side, cost in scale.items()}
    rows: list[list[str]] = []
    for name, cost in named.items():
        parts = {f"client {what}": seconds for what, seconds in cost["client"].items()}
        parts |= {f"server {what}": seconds for what, seconds in cost["server"].items() if what != "connect"}
        rows = rows or [["us", *parts]]
        rows.append([name, *(f"{seconds * 1e6:.0f}" for seconds in parts.values())])
    return table(rows)


def outcomes(case: str, sides: dict[str, Any]) -> str:
    """Return the table of one case on paper."""
    rows = [[case, "commits/s", "gave up", "p99, s", "attempts"]]
    rows += [
        [
            side,
            three_digits(one["commits"]),
            f"{one['gave_up']:.1%}",
            three_digits(one["p99"]),
            three_digits(one["attempts"]),
        ]
        for side, one in sides.items()
    ]
    return table(rows)


def plot(cases: dict[str, dict[str, Any]], to: Path) -> None:
    """Draw a line for each side over the number of processes, for each number of rows."""
    # of the dependency group benchmarks, wanted only here
    from matplotlib import rcParams  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    rcParams["svg.hashsalt"] = "sqla_uow"  # the same figures give the same file
    points: dict[str, dict[int, dict[str, Any]]] = {}
    for case, sides in cases.items():
        rows, _, count = case.removesuffix(" processes").rpartition(", ")
        points.setdefault(rows, {})[int(count)] = sides
    figure = Figure(figsize=(9, 7), layout="constrained")
    grid = figure.subplots(len(LINES), len(points), squeeze=False, sharex=True)
    for column, (rows, by_count) in enumerate(points.items()):
        for line, (key, title) in enumerate(LINES.items()):
            axis = grid[line][column]
            counts = sorted(by_count)
            for side in by_count[counts[0]]:
                axis.plot(
                    counts, [by_count[count][side][key] for count in counts], marker="o", markersize=3, label=side,
                    color=COLOURS.get(side),
                )  # fmt: skip
            axis.set_xscale("log")
            if key == "gave_up":
                axis.set_ylim(-0.02, 1.02)
            else:
                axis.set_yscale("log")
            axis.tick_params(labelsize=7)
            axis.set_title(f"{rows}: {title}", loc="left", fontsize=9)
    grid[0][0].legend(fontsize=7)
    figure.supxlabel("processes of two callers each", fontsize=8)
    figure.savefig(to, metadata={"Date": None})
