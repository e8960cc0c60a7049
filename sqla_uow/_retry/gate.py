"""Where the calls of one function wait for their turn, while they get in each other's way."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from typing import TYPE_CHECKING

from sqla_uow._retry.controller import FIRST_WIDTH, Controller
from sqla_uow.typing import Contention

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

__all__ = ["UNKNOWN", "Gate", "Slot", "together"]

STALL_SECONDS = (0.1, 2.0)
"""If no call has finished for so long, more are let in: those that run may be slow, or wait for those that do not.

The first number is for a function about which nothing is known yet: as many again come in.  The second is for a function
that is held back for a reason: one more comes in."""

UNKNOWN = Contention(FIRST_WIDTH, 0, 0, 0.0)
"""What is known of a function that was not called yet."""


class Slot:
    """The right of one attempt to run."""

    __slots__ = ("_began", "_gate", "_seconds")

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self._began = gate.clock()
        self._seconds: float | None = None

    def free(self, *, committed: bool) -> None:
        """Give it back; called as soon as the transaction has ended, before its hooks."""
        if self._seconds is None:
            self._seconds = self._gate.clock() - self._began
            self._gate.left(self._began, self._seconds, committed=committed)

    def conflicted(self) -> None:
        """Say that a conflict had ended the attempt."""
        self._gate.conflicted(self._began, self._seconds or 0.0)


class Gate:
    """Where the calls of one function wait for their turn: first come, first served, a retry before a first run.

    Args:
        who: the function, for the log.
        clock: monotonic seconds.
    """

    __slots__ = ("_again", "_backing_off", "_controller", "_loop", "_moved", "_queue", "_running", "_timer", "clock")

    def __init__(self, who: str, clock: Callable[[], float]) -> None:
        self.clock: Callable[[], float] = clock
        self._controller = Controller(clock, who)
        self._loop = asyncio.get_running_loop()
        self._queue: deque[asyncio.Future[bool]] = deque()
        self._again: deque[asyncio.Future[bool]] = deque()
        self._running = 0
        self._backing_off = 0
        self._moved = False
        self._timer: asyncio.TimerHandle | None = None

    def state(self) -> Contention:
        """Return what users see of it."""
        width = self._controller.width
        limit = None if width == math.inf else int(width)
        return Contention(limit, self._running, self._waiting(), self._controller.wasted_share)

    def lock_wait(self, attempt: int) -> float | None:
        """Return how long the attempt that has just come in should wait for locks, in seconds; None is for ever."""
        return self._controller.lock_wait(attempt, self._running)

    def try_enter(self) -> Slot | None:
        """Let the attempt in if nothing holds it back: one comparison without contention."""
        if self._running < self._controller.width and not (self._queue or self._again or self._backing_off):
            self._running += 1
            return Slot(self)
        return None

    async def enter(self, deadline: float | None, *, again: bool) -> Slot | None:
        """Wait for a turn.

        Args:
            deadline: on `clock`, or None.
            again: it is a retry.

        Returns:
            None if the deadline has passed.
        """
        queue = self._again if again else self._queue
        turn: asyncio.Future[bool] = self._loop.create_future()
        queue.append(turn)
        late = None if deadline is None else self._loop.call_later(deadline - self.clock(), _too_late, turn)
        if self._timer is None:
            self._watch()
        try:
            return Slot(self) if await turn else None
        except asyncio.CancelledError:
            if not turn.cancelled() and turn.result():  # let in and cancelled in the same turn of the loop
                self._running -= 1
                self._admit()
            raise
        finally:
            if turn in queue:
                queue.remove(turn)
            if late is not None:
                late.cancel()

    async def back_off(self, wait: Callable[[float], Awaitable[object]], seconds: float) -> None:
        """Wait before a retry.

        With other processes in the way nobody else is let in meanwhile: the process backs off, and not this call alone.
        """
        together = self._controller.crowded
        self._backing_off += together
        try:
            await wait(seconds)
        finally:
            if together:
                self._backing_off -= 1
                self._admit_soon()

    def left(self, began: float, seconds: float, *, committed: bool) -> None:
        """Let the next one in; the one that leaves began then, and took so long."""
        self._running -= 1
        self._moved = True
        if committed:
            self._controller.committed(began, seconds, self._running, self._waiting())
            self._admit()
        else:
            self._admit_soon()

    def conflicted(self, began: float, seconds: float) -> None:
        """Count what the attempt that has left took as wasted."""
        self._controller.conflicted(began, seconds, self._running, self._waiting())
        self._admit_soon()

    def _waiting(self) -> int:
        return len(self._queue) + len(self._again)

    def _admit(self) -> None:
        while self._queue or self._again:
            if self._running >= self._controller.width or not self._let_in(first_runs=not self._backing_off):
                break

    def _admit_soon(self) -> None:
        """Let others in, but where a failed attempt backs off, or begins again, at once: behind that."""
        if self._controller.crowded:
            self._loop.call_soon(self._admit)
        else:
            self._admit()

    def _let_in(self, *, first_runs: bool = True) -> bool:
        for queue in (self._again, self._queue) if first_runs else (self._again,):
            while queue:
                turn = queue.popleft()
                if not turn.done():  # else cancelled, or too late
                    self._running += 1
                    turn.set_result(True)
                    return True
        return False

    def _watch(self) -> None:
        self._moved = False
        self._timer = self._loop.call_later(STALL_SECONDS[not self._controller.opening], self._look)

    def _look(self) -> None:
        self._timer = None
        if self._waiting():
            if not self._moved:
                for _ in range(self._running if self._controller.opening else 1):
                    self._let_in()
            self._watch()


def _too_late(turn: asyncio.Future[bool]) -> None:
    if not turn.done():
        turn.set_result(False)


def together(states: list[Contention]) -> Contention:
    """Return the state of a function whose calls run in several event loops."""
    if len(states) == 1:
        return states[0]
    return Contention(
        None if any(state.width is None for state in states) else sum(state.width or 0 for state in states),
        sum(state.running for state in states),
        sum(state.waiting for state in states),
        max(state.wasted for state in states),
    )
