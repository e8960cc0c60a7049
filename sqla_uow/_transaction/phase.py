"""Where a transaction stands: new, active, committing, sent, ending, ended."""

from __future__ import annotations

import enum

__all__ = ["Phase"]


class Phase(enum.Enum):
    """Where the transaction stands; the order is the order of life."""

    NEW = "open", "new"
    ACTIVE = "open", "active"
    COMMITTING = "ending", "committing"  # ours to commit: flushes and the COMMIT itself pass
    SENT = "ending", "sent"  # COMMIT has been handed to the driver
    ENDING = "ending", "rolling back or closing"
    YIELDED = "over", "yielded"  # a read session that gave way: objects readable, SQL refused
    ENDED = "over", "ended"

    def __init__(self, stage: str, label: str) -> None:
        self.label: str = label
        # Attributes, because they are asked several times a statement: hashing a member runs Python code, and so does
        # looking one up by its name on Python 3.11.
        self.is_open: bool = stage == "open"
        self.is_active: bool = label == "active"
        self.is_ending: bool = stage == "ending"
        self.is_over: bool = stage == "over"
