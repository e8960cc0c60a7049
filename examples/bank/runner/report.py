"""What is printed."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from rich.console import Console

    from examples.bank.runner.audit import Finding
    from examples.bank.runner.tally import Tally

__all__ = ["findings", "progress", "table", "without"]

_BETWEEN = "lets others write between a call's read and its write."
_WHY = {
    "sqlite": "SQLAlchemy leaves the BEGIN to Python's sqlite3, which sends it only before a write: "
    "what a call reads, it reads outside its transaction.",
    "postgresql": f"READ COMMITTED, PostgreSQL's default, {_BETWEEN}",
    "mysql": f"REPEATABLE READ, MariaDB's default, {_BETWEEN}",
    "mariadb": f"REPEATABLE READ, MariaDB's default, {_BETWEEN}",
}
"""Why a plain transaction is not enough there."""


@contextlib.contextmanager
def progress(console: Console, total: int) -> Iterator[Callable[[], None]]:
    """Show a bar, or a line now and then where there is no terminal; yields what counts one call."""
    if console.is_terminal:
        columns = (TextColumn("calls"), BarColumn(None), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console) as bar:
            task = bar.add_task("calls", total=total)
            yield lambda: bar.advance(task)
        return
    made, step = 0, min(250, -(-total // 5))

    def count() -> None:
        nonlocal made
        made += 1
        if made % step == 0:
            console.print(f"{made} of {total} calls")

    yield count


def table(tally: Tally) -> Table:
    """Lay out the figures: a column for each function, a line for each reason why an attempt failed."""
    rows = tally.rows.values()
    shown = Table(box=SIMPLE_HEAD)
    shown.add_column("")
    for name in tally.rows:
        shown.add_column(name, justify="right")

    def line(label: str, figures: Iterable[object]) -> None:
        shown.add_row(label, *map(str, figures))

    line("calls", (row.calls for row in rows))
    line("commits", (row.done for row in rows))
    line("refused, 409", (row.refused for row in rows))
    line("told that another was first, 412", (row.outrun for row in rows))
    line("attempts", (row.attempts for row in rows))
    for reason in sorted({reason for row in rows for reason in row.conflicts}):
        line(f"  failed by {reason}", (row.conflicts[reason] for row in rows))
    line("gave up, 503", (row.gave_up for row in rows))
    for error in sorted({error for row in rows for error in row.failed}):
        line(f"ended in {error}", (row.failed[error] for row in rows))
    if any(row.cancelled for row in rows):
        line("cut off", (row.cancelled for row in rows))
    line("p50, ms", (_ms(row.percentile(0.5)) for row in rows))
    line("p99, ms", (_ms(row.percentile(0.99)) for row in rows))
    return shown


def findings(found: list[Finding]) -> Iterator[str]:
    """Say of each rule whether it holds."""
    for rule, holds, figures in found:
        yield f"{'holds ' if holds else 'BROKEN'}  {rule}: {figures}"


def without(dialect: str, *, holds: bool) -> Iterator[str]:
    """Say what the load without the library has shown."""
    if holds:
        yield "nothing broke this time; more --calls or --workers, or fewer --accounts, will do it"
        return
    yield (
        f"it broke, and no caller was told so. {_WHY.get(dialect, '')} Two calls read the same balance, and the later "
        "write undoes the earlier one (lost update); two edits begin at the same version, and the later one saves what "
        "its person never saw; two clerks leave, each because the other one stays (write skew). The same load without --without-library keeps every rule."
    )


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1000:.1f}"
