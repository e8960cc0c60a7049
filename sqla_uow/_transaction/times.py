"""How long a transaction waits for its connection, idles, and takes to commit; measured only if an observer wants to know."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Idle", "Times"]


class Times:
    """How long a transaction waited for its connection, and how long its COMMIT took.

    Args:
        clock: of the policy.
    """

    __slots__ = ("clock", "commit_began", "commit_ended", "connection_seconds")

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock: Callable[[], float] = clock
        self.connection_seconds: float | None = None
        self.commit_began: float | None = None
        self.commit_ended: float | None = None

    def commit_seconds(self) -> float | None:
        """Return how long COMMIT took: until now, if it was given up and still goes on."""
        if self.commit_began is None:
            return None
        return (self.clock() if self.commit_ended is None else self.commit_ended) - self.commit_began


class Idle:
    """How long a transaction has been open with nothing in flight.

    Args:
        clock: of the policy.
        patience: seconds of idling that nobody wants to know of.
        tell: called with the seconds if it was longer.
    """

    __slots__ = ("_clock", "_patience", "_since", "_tell")

    def __init__(self, clock: Callable[[], float], patience: float, tell: Callable[[float], None]) -> None:
        self._clock = clock
        self._patience = patience
        self._tell = tell
        self._since: float | None = None

    def begins(self) -> None:
        """A statement was answered."""
        self._since = self._clock()

    def ends(self) -> None:
        """The next statement is about to be sent, or the unit ends."""
        since, self._since = self._since, None
        if since is not None and (idle := self._clock() - since) >= self._patience:
            self._tell(idle)
