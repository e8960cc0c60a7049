"""Whose turn it is to write one SQLite database.

SQLite has one writer.  Its own way to wait is to sleep and look again, up to 100 ms at a time, in no order.  The writers
of one process need not: they queue here, first come first served, before they take a connection.  Writers of other
processes are waited for by SQLite's busy timeout.  A shared in-memory connection has one *user*, so readers queue too.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from sqla_uow.errors import PropagationError

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["Turns"]

TURN_SECONDS = 30.0
"""How long a writer without a deadline waits, like a pool for a connection: a unit that waits for its own waiter ends."""


class Turns:
    """A fair lock with a holder; belongs to one pool."""

    __slots__ = ("_lock", "_loop", "everyone", "holder")

    def __init__(self, *, everyone: bool) -> None:
        self.everyone = everyone
        self.holder: object | None = None
        self._lock = asyncio.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None

    async def take(self, unit: object, enclosing: Iterable[object]) -> None:
        """Wait for the turn.

        Raises:
            PropagationError: a unit around this one has it, so that it would never come.
            TimeoutError: it did not come within 30 s.
        """
        loop = asyncio.get_running_loop()
        if self._loop is not loop:  # an engine used by one loop after another, as in tests; an asyncio.Lock is not
            self._loop, self._lock, self.holder = loop, asyncio.Lock(), None
        if self.holder is not None and any(one is self.holder for one in enclosing):
            raise PropagationError(
                "a unit was begun inside another that holds this SQLite database's only write lock, and would wait for "
                "ever; join the outer unit, end it first, or make the inner one read_only=True"
            )
        if self._lock.locked():
            async with asyncio.timeout(TURN_SECONDS):
                await self._lock.acquire()
        else:
            await self._lock.acquire()
        self.holder = unit

    def give_back(self, unit: object) -> None:
        """Let the next one in, if `unit` has the turn."""
        if self.holder is unit:
            self.holder = None
            self._lock.release()
