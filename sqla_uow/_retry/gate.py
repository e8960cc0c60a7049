"""Where the calls of a group wait for their turn, while they get in each other's way."""

from __future__ import annotations

import asyncio
import enum
import heapq
import itertools
import math
from collections import deque
from typing import TYPE_CHECKING

from sqla_uow._retry.controller import Controller
from sqla_uow.typing import Contention

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

__all__ = ["ANY", "Entry", "Gate"]

STALL_SECONDS = 2.0
"""If no call has finished for so long, one more is let in: those that run may wait for those that do not."""
ANY = 1 << 30
"""So many may run beside an attempt that has not failed often."""


class Entry(enum.Enum):
    """What came of waiting."""

    IN = "it runs"
    LATE = "its time was up"
    MOVED = "the gate is none any more; ask again which one it is"


class Gate:
    """Where the calls of one group wait for their turn: first come, first served, a retry before a first run.

    An attempt that has failed often runs beside few others, and the last one alone: it would give up because of them.

    Args:
        clock: monotonic seconds.
    """

    __slots__ = (
        "_again", "_backing_off", "_into", "_loop", "_moved", "_numbers", "_queue", "_running", "_shy", "_timer", "_waiting",
        "clock", "controller",
    )  # fmt: skip

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock: Callable[[], float] = clock
        self.controller: Controller = Controller(clock)
        self._loop = asyncio.get_running_loop()
        self._queue: deque[tuple[int, asyncio.Future[Entry]]] = deque()
        self._again: list[
            tuple[int, int, asyncio.Future[Entry]]
        ] = []  # a heap: who may have fewest beside it comes first
        self._numbers = itertools.count()
        self._running = self._waiting = 0
        self._shy: list[int] = []  # of those that run, how many each may have beside it
        self._backing_off = 0
        self._moved = False
        self._timer: asyncio.TimerHandle | None = None
        self._into: Gate | None = None  # the one that has taken over its calls

    def state(self) -> Contention:
        """Return what users see of it."""
        width = self.controller.width
        limit = None if width == math.inf else int(width)
        return Contention(limit, self._running, self._waiting, self.controller.wasted_share)

    def is_idle(self) -> bool:
        """Say whether nobody runs and nobody waits."""
        return not self._running and not self._waiting

    def lock_wait(self, attempt: int) -> float | None:
        """Return how long the attempt that has just come in should wait for locks, in seconds; None is for ever."""
        return self.controller.lock_wait(attempt, self._running)

    # -- in

    def try_enter(self, beside: int) -> bool:
        """Let an attempt in if nothing holds it back.

        Args:
            beside: how many others may run meanwhile.
        """
        if self._queue or self._again or self._backing_off or not self._has_room(beside):
            return False
        self._come_in(beside)
        return True

    async def enter(self, beside: int, until: float | None, *, again: bool) -> Entry:
        """Wait for a turn.

        Args:
            beside: how many others may run meanwhile.
            until: in the time of the loop, or None.
            again: it is a retry.
        """
        turn: asyncio.Future[Entry] = self._loop.create_future()
        self._waiting += 1
        if again:
            heapq.heappush(self._again, (beside, next(self._numbers), turn))
        else:
            self._queue.append((beside, turn))
        late = None if until is None else self._loop.call_at(until, _too_late, turn)
        if self._timer is None:
            self._watch()
        entry = None
        try:
            entry = await turn
            return entry
        finally:
            if late is not None:
                late.cancel()
            if (
                entry is None and not turn.cancelled() and turn.result() is Entry.IN
            ):  # let in and cancelled in the same turn of the loop
                self._successor()._go_out(beside)
            elif entry is not Entry.IN:
                self._waiting -= 1
            if entry is not Entry.IN:  # the next one may have waited behind it
                self._successor()._admit()

    def _has_room(self, beside: int) -> bool:
        running = self._running
        return running < self.controller.width and running <= beside and (not self._shy or running <= min(self._shy))

    def _come_in(self, beside: int) -> None:
        self._running += 1
        if beside < ANY:
            self._shy.append(beside)

    def _go_out(self, beside: int) -> None:
        self._running -= 1
        if beside < ANY:
            self._shy.remove(beside)

    # -- out

    def left(self, began: float, seconds: float, beside: int, *, committed: bool) -> None:
        """Let the next one in; the one that leaves began then, and took so long."""
        gate = self._successor()
        gate._go_out(beside)
        gate._moved = True
        if committed:
            gate.controller.committed(began, seconds, gate._running, gate._waiting)
            gate._admit()
        else:
            gate._admit_soon()

    def conflicted(self, began: float, seconds: float) -> None:
        """Count what the attempt that has left took as wasted."""
        gate = self._successor()
        gate.controller.conflicted(began, seconds, gate._running, gate._waiting)
        gate._admit_soon()

    async def back_off(self, wait: Callable[[float], Awaitable[object]], seconds: float) -> None:
        """Wait before a retry.

        With other processes in the way nobody else is let in meanwhile: the process backs off, and not this call alone.
        """
        if not self.controller.crowded:
            await wait(seconds)
            return
        self._backing_off += 1
        try:
            await wait(seconds)
        finally:
            self._backing_off -= 1
            self._admit_soon()

    # -- its end

    def end(self, into: Gate | None = None) -> None:
        """Let everybody go on: to another gate, which takes over those that run, or without any."""
        self._into = into
        if into is not None:
            into._running += self._running
            into._shy += self._shy
        for turn in (*(turn for _, turn in self._queue), *(turn for _, _, turn in sorted(self._again))):
            if not turn.done():
                turn.set_result(Entry.MOVED)
        self._queue.clear()
        self._again.clear()

    def _successor(self) -> Gate:
        gate = self
        while gate._into is not None:
            gate = gate._into
        return gate

    # -- who comes in next

    def _admit(self) -> None:
        while self._let_in(first_runs=not self._backing_off):
            pass

    def _admit_soon(self) -> None:
        """Let others in, but where a failed attempt backs off, or begins again, at once: behind that."""
        if self.controller.crowded:
            self._loop.call_soon(self._admit)
        else:
            self._admit()

    def _let_in(self, *, first_runs: bool = True, room: bool = True) -> bool:
        """Let the first one in if there is room for it; `room=False` does not ask."""
        while self._again and self._again[0][2].done():  # cancelled, or too late
            heapq.heappop(self._again)
        while self._queue and self._queue[0][1].done():
            self._queue.popleft()
        if self._again:
            beside, _, turn = self._again[0]
        elif self._queue and first_runs:
            beside, turn = self._queue[0]
        else:
            return False
        if room and not self._has_room(beside):
            return False
        self._waiting -= 1
        self._come_in(beside)
        turn.set_result(Entry.IN)
        return True

    def _watch(self) -> None:
        self._moved = False
        self._timer = self._loop.call_later(STALL_SECONDS, self._look)

    def _look(self) -> None:
        self._timer = None
        if self._waiting:
            if not self._moved:
                self._let_in(room=False)
            self._watch()


def _too_late(turn: asyncio.Future[Entry]) -> None:
    if not turn.done():
        turn.set_result(Entry.LATE)
