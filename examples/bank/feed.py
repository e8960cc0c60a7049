"""Who is told, within this process, that something was committed.

Only numbers are passed on.  Whoever hears of one reads the row in a unit of its own, so that what it shows is committed,
and numbers that pile up while it is busy are read at once.  A service of several processes would
send the numbers through its database or a broker; nothing else would change.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["FEED", "Feed", "Listener"]

_MOST_ENTRIES = 50  # a listener that is slower than the bank misses older ones, and can read the ledger
_MOST_ACCOUNTS = 500


class Listener:
    """What one listener has not been told yet."""

    def __init__(self) -> None:
        self._accounts: set[int] = set()
        self._entries: list[int] = []
        self._something = asyncio.Event()
        self._closed = False

    def add(self, accounts: Iterable[int], entry: int | None) -> None:
        """Note what has changed."""
        self._accounts.update(accounts)
        if entry is not None:
            self._entries = [*self._entries, entry][-_MOST_ENTRIES:]
        self._something.set()

    def close(self) -> None:
        """Let `wait` return False from now on."""
        self._closed = True
        self._something.set()

    async def wait(self) -> bool:
        """Wait until there is something to tell, and say whether anybody is still there to be told."""
        await self._something.wait()
        return not self._closed

    def take(self) -> tuple[list[int], list[int]]:
        """Return the numbers of accounts and entries to tell of now; what is more remains for the next time."""
        accounts = sorted(self._accounts)[:_MOST_ACCOUNTS]
        self._accounts.difference_update(accounts)
        entries, self._entries = self._entries, []
        if not self._accounts and not self._closed:
            self._something.clear()
        return accounts, entries


class Feed:
    """Passes on what is published to everybody who listens now."""

    def __init__(self) -> None:
        self._listeners: set[Listener] = set()

    @contextlib.contextmanager
    def listening(self) -> Iterator[Listener]:
        """Listen until the end of the block."""
        listener = Listener()
        self._listeners.add(listener)
        try:
            yield listener
        finally:
            self._listeners.discard(listener)

    def publish(self, *, accounts: Iterable[int], entry: int | None = None) -> None:
        """Tell everybody which accounts have changed, and which entry was booked."""
        for listener in self._listeners:
            listener.add(accounts, entry)


FEED = Feed()
