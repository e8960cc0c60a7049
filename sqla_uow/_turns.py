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

    from sqla_uow._transaction import Transaction

__all__ = ["Turns"]

TURN_SECONDS = 30.0
"""How long a writer without a deadline waits, like a pool for a connection: a unit that waits for its own waiter ends."""


class Turns:
    """A fair lock with a holder; belongs to one pool."""

    __slots__ = ("_lock", "_loop", "everyone", "holder")

    def __init__(self, *, everyone: bool) -> None:
        self.everyone: bool = everyone
        self.holder: Transaction | None = None
        self._lock = asyncio.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None

    async def take(self, unit: Transaction, enclosing: Iterable[Transaction]) -> None:
        """Wait for the turn, unless `unit` has it already: its connection may have failed, and its body tries again.

        Raises:
            PropagationError: a unit around this one has it, so that it would never come.
            TimeoutError: it did not come within 30 s.
        """
        loop = asyncio.get_running_loop()
        if self._loop is not loop:  # an engine used by one loop after another, as in tests; an asyncio.Lock is not
            self._loop, self._lock, self.holder = loop, asyncio.Lock(), None
        holder = self.holder
        if holder is unit:
            return
        if holder is not None and any(one is holder for one in enclosing):
            raise PropagationError(self._never(unit, holder))
        try:
            async with asyncio.timeout(TURN_SECONDS):
                await self._lock.acquire()
        except TimeoutError as error:
            raise TimeoutError(
                f"{unit.name} waited {TURN_SECONDS:g} s for its turn to write to SQLite; shorten the units before it"
            ) from error
        self.holder = unit

    def give_back(self, unit: Transaction) -> None:
        """Let the next one in, if `unit` has the turn."""
        if self.holder is unit:
            self.holder = None
            self._lock.release()

    def _never(self, unit: Transaction, holder: Transaction) -> str:
        if self.everyone:
            what, remedy = "in-memory SQLite database's only connection", "or end it first"
        else:
            what, remedy = "SQLite database's only write lock", "end it first, or make the inner one read_only=True"
        return (
            f"{unit.name} would wait for ever for this {what}, which {holder.name} around it holds; "
            f"join the outer unit, {remedy}"
        )
