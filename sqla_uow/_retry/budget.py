"""How many retries an outage may cause.

A database that is away fails every call at once; if each were run six times, it would come back to six times the load.
Conflicts are another matter: their calls take turns; see `gate`.
"""

from __future__ import annotations

import time
import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sqlalchemy.pool import Pool

__all__ = ["Budget", "budget_of"]

PER_CALL = 0.2
"""Retries that each call earns."""
PER_SECOND = 10.0
"""Retries that each second earns."""
LARGEST = 20.0
"""Retries that can be saved up."""


class Budget:
    """A token bucket for the retries of one engine after failures to connect and lost connections.

    Args:
        now: monotonic seconds.
    """

    __slots__ = ("_at", "_tokens")

    def __init__(self, now: float) -> None:
        self._tokens = LARGEST
        self._at = now

    def earn(self) -> None:
        """Count a call."""
        self._tokens = min(LARGEST, self._tokens + PER_CALL)

    def reserve(self, now: float, patience: float) -> float | None:
        """Take a retry out of the budget.

        Args:
            now: monotonic seconds.
            patience: seconds that the caller would wait for it.

        Returns:
            the seconds after which it may be made; None if that is too late, and nothing was taken.
        """
        self._tokens = min(LARGEST, self._tokens + max(0.0, now - self._at) * PER_SECOND)
        self._at = now
        wait = max(0.0, (1.0 - self._tokens) / PER_SECOND)
        if wait > patience:
            return None
        self._tokens -= 1.0
        return wait


_budgets: weakref.WeakKeyDictionary[Pool, Budget] = weakref.WeakKeyDictionary()


def budget_of(pool: Pool) -> Budget:
    """Return the budget of a pool: managers share one through copies of their engine."""
    return _budgets.setdefault(pool, Budget(time.monotonic()))
