"""Whose turn it is to write one SQLite database.

SQLite has one writer.  Its own way to wait is to sleep and look again, up to 100 ms at a time, in no order.  The writers
of one event loop need not: they queue here, first come first served, before they take a connection.  Writers of other loops
and processes are waited for by SQLite's busy timeout.  A shared in-memory connection has one *user*, so readers queue too,
and so do other loops.
"""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, Protocol

from sqla_uow._tasks.per_loop import PerLoop
from sqla_uow.errors import PropagationError

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["WriterQueue"]

TURN_SECONDS = 30.0
"""How long a writer without a deadline waits, like a pool for a connection: a unit that waits for its own waiter ends."""
OTHER_LOOP_SECONDS = 5.0
"""How long the user of another event loop is waited for, as SQLite's busy timeout is by default."""
LOOK_SECONDS = 0.002
"""Pause between two looks whether another event loop has done with the connection."""


class Writer(Protocol):
    """A transaction that waits for its turn."""

    @property
    def name(self) -> str: ...


class _Line:
    """The line of one event loop: a fair lock, and its holder."""

    __slots__ = ("holder", "lock", "loop")

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.loop = asyncio.get_running_loop()
        self.holder: Writer | None = None


class WriterQueue:
    """A fair lock with a holder, in each event loop; belongs to one pool.

    Args:
        everyone: all share one connection, so that readers wait for writers, and one event loop for the other.
    """

    __slots__ = ("_line_outside", "_lines", "_outside", "everyone")

    def __init__(self, *, everyone: bool) -> None:
        self.everyone: bool = everyone
        self._lines = PerLoop(_Line)
        self._outside = threading.Lock()  # guards the next
        self._line_outside: _Line | None = None  # whose head has the one connection

    def is_taken(self) -> bool:
        """Say whether a unit of any event loop has the turn of its line."""
        return any(line.lock.locked() for line in self._lines.everywhere())

    async def take(self, unit: Writer, enclosing: Iterable[Writer]) -> None:
        """Wait for the turn, unless `unit` has it already: its connection may have failed, and its body tries again.

        Raises:
            PropagationError: a unit around this one has it, so that it would never come.
            TimeoutError: it did not come within 30 s, or 5 s for the user of another event loop.
        """
        line = self._lines.here()
        if line.holder is unit:
            return
        for one in self._lines.everywhere():
            # Also of another loop: the thread that it waits for runs this one.
            if one.holder is not None and any(outer is one.holder for outer in enclosing):
                raise PropagationError(self._never(unit, one.holder))
        try:
            async with asyncio.timeout(TURN_SECONDS):
                await line.lock.acquire()
        except TimeoutError as error:
            raise TimeoutError(
                f"{unit.name} waited {TURN_SECONDS:g} s for its turn to write to SQLite; shorten the units before it"
            ) from error
        if self.everyone:
            try:
                await self._wait_for_other_loops(unit, line)
            except BaseException:
                line.lock.release()
                raise
        line.holder = unit

    async def _wait_for_other_loops(self, unit: Writer, line: _Line) -> None:
        """Look again and again: what wakes a waiter of asyncio must not come from another thread."""
        try:
            async with asyncio.timeout(OTHER_LOOP_SECONDS):
                while not self._claim(line):  # noqa: ASYNC110  # an asyncio.Event is of one loop
                    await asyncio.sleep(LOOK_SECONDS)
        except TimeoutError as error:
            raise TimeoutError(
                f"{unit.name} waited {OTHER_LOOP_SECONDS:g} s for SQLite's only connection, which a unit of another event "
                "loop uses; give each loop an engine of its own, or shorten that unit"
            ) from error

    def _claim(self, line: _Line) -> bool:
        with self._outside:
            if self._line_outside is not None and not self._line_outside.loop.is_closed():
                return False
            self._line_outside = line
            return True

    def give_back(self, unit: Writer) -> None:
        """Let the next one in, if `unit` has the turn."""
        try:
            line = self._lines.here()
        except RuntimeError:  # no event loop runs any more; so nobody waits in its line
            return
        if line.holder is unit:
            line.holder = None
            if self._line_outside is line:
                self._line_outside = None
            line.lock.release()

    def _never(self, unit: Writer, holder: Writer) -> str:
        if self.everyone:
            what, remedy = "in-memory SQLite database's only connection", "or end it first"
        else:
            what, remedy = "SQLite database's only write lock", "end it first, or make the inner one read_only=True"
        return (
            f"{unit.name} would wait for ever for this {what}, which {holder.name} around it holds; "
            f"join the outer unit, {remedy}"
        )
