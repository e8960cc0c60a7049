"""What is counted: what the client was told, and what the library says in its log."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import httpx

__all__ = ["FUNCTIONS", "Row", "Tally"]

FUNCTIONS = ("transfer", "deposit", "edit", "set_duty")
_BOOKING = ("transfer", "deposit")
_REQUESTS = {"POST /transfers": "transfer"}  # where the request is the transaction
_DONE, _REFUSED, _UNAVAILABLE = (200, 201), 409, 503


@dataclass
class Row:
    """One function's figures.

    Attributes:
        calls: how many were made.
        done: how many were answered with a success, so that their transaction is committed.
        refused: how many the bank said no to.
        outrun: how often an edit was told that somebody else was first (412), and began again.
        retries: how often an attempt was run again, inside the service.
        conflicts: why attempts failed, by reason and code.
        gave_up: calls that failed in every attempt (503).
        failed: calls that got another status, or no answer, by status or the error's class.
        cancelled: calls that Ctrl-C cut off.
        seconds: how long each success took, retries and waits included.
    """

    calls: int = 0
    done: int = 0
    refused: int = 0
    outrun: int = 0
    retries: int = 0
    conflicts: Counter[str] = field(default_factory=Counter)
    gave_up: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    cancelled: int = 0
    seconds: list[float] = field(default_factory=list)

    @property
    def attempts(self) -> int:
        """How often the service began: an edit that was told 412 began again, and so does a retry."""
        return self.calls + self.outrun + self.retries

    def count(self, status: int, seconds: float) -> None:
        """Count an answer."""
        if status in _DONE:
            self.done += 1
            self.seconds.append(seconds)
        elif status == _REFUSED:
            self.refused += 1
        elif status == _UNAVAILABLE:
            self.gave_up += 1
        else:
            self.failed[f"status {status}"] += 1

    def percentile(self, share: float) -> float | None:
        """Return the seconds within which that share of the successes was answered."""
        if not self.seconds:
            return None
        ordered = sorted(self.seconds)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


class Tally(logging.Handler):
    """The figures of one run.

    Retries are read off the records of the logger "sqla_uow": one for each, with function, attempt, number of attempts,
    reason and wait as its arguments.

    Attributes:
        booked: the numbers of the ledger's entries that the client was told of.
        refused: the references of what it was refused.
        edits: how many edits were acknowledged.
        unknown_edits: how many were sent and not answered, or not clearly.
    """

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.rows = {name: Row() for name in FUNCTIONS}
        self.booked: set[int] = set()
        self.refused: set[str] = set()
        self.edits = 0
        self.unknown_edits = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Count a retry."""
        if record.levelno != logging.INFO or not isinstance(record.args, tuple) or len(record.args) != 5:  # noqa: PLR2004  # as above
            return
        who, _attempt, _attempts, reason, _wait = record.args
        row = self.rows.get(_REQUESTS.get(str(who), str(who).removesuffix("()")))
        if row is not None:
            row.retries += 1
            row.conflicts[str(reason)] += 1

    def answered(self, function: str, arguments: dict[str, Any], answer: httpx.Response) -> None:
        """Remember what the client was told, to look afterwards whether it is so."""
        if answer.status_code in _DONE:
            if function == "edit":
                self.edits += 1
            elif function in _BOOKING:
                self.booked.add(answer.json()["id"])
        elif answer.status_code == _REFUSED:
            if function in _BOOKING:
                self.refused.add(arguments["reference"])
        elif answer.status_code != _UNAVAILABLE:
            self.never_answered(function)

    def never_answered(self, function: str) -> None:
        """Remember that it is not known whether a call was done."""
        self.unknown_edits += function == "edit"
