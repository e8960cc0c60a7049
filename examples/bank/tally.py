"""What is counted, and how: by what anybody can see of the library from outside."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field

from sqlalchemy.exc import DBAPIError

__all__ = ["FUNCTIONS", "Row", "Tally"]

FUNCTIONS = ("transfer", "deposit", "swap_on_call")


@dataclass
class Row:
    """One function's figures.

    Attributes:
        calls: how many were made.
        commits: how many returned, so that their transaction is committed.
        refused: how many of these said no.
        retries: how often an attempt was run again.
        conflicts: why attempts failed, by reason and code.
        gave_up: calls that failed in every attempt.
        failed: calls that ended in another error, by its class and code.
        cancelled: calls that Ctrl-C cut off.
        seconds: how long each commit took, retries and waits included.
    """

    calls: int = 0
    commits: int = 0
    refused: int = 0
    retries: int = 0
    conflicts: Counter[str] = field(default_factory=Counter)
    gave_up: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    cancelled: int = 0
    seconds: list[float] = field(default_factory=list)

    def percentile(self, share: float) -> float | None:
        """Return the seconds within which that share of the commits was done."""
        if not self.seconds:
            return None
        ordered = sorted(self.seconds)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


class Tally(logging.Handler):
    """The figures of one run.

    Retries are read off the records of the logger "sqla_uow": one for each, with function, attempt, number of attempts,
    reason and wait as its arguments.

    Attributes:
        deposits: how many were acknowledged.
        deposited: how much they put in.
        unknown: how much was put in, or not, by deposits whose COMMIT was never answered.
    """

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.rows = {name: Row() for name in FUNCTIONS}
        self.deposits = 0
        self.deposited = 0
        self.unknown = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Count a retry."""
        if record.levelno != logging.INFO or not isinstance(record.args, tuple) or len(record.args) != 5:  # noqa: PLR2004
            return
        who, _attempt, _attempts, reason, _wait = record.args
        row = self.rows.get(str(who).removesuffix("()"))
        if row is not None:
            row.retries += 1
            row.conflicts[str(reason)] += 1

    def acknowledge(self, amount: int) -> None:
        """Count a deposit that is committed."""
        self.deposits += 1
        self.deposited += amount


def name_of(error: BaseException) -> str:
    """Return the error's class and the database's own code."""
    origin = error.orig if isinstance(error, DBAPIError) else None
    first = origin.args[0] if origin is not None and origin.args else None
    code = (
        getattr(origin, "sqlite_errorname", None)
        or (first if isinstance(first, int) else None)
        or getattr(origin, "sqlstate", None)
    )
    return type(error).__name__ if code is None else f"{type(error).__name__} {code}"
