"""What computes: the cores of a machine, and the one thread that a Python process has."""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

__all__ = ["Cores", "Thread"]


class Cores:
    """So many cores, which all that is computed at one time shares, as Linux lets it.

    Args:
        loop: whose time it is.
        count: how many.
        others: threads of somebody else that compute all the time.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, count: int, others: float = 0.0) -> None:
        self._loop = loop
        self._count = count
        self._others = others
        self._each = 0.0  # seconds that each piece has got since the beginning, had it been there
        self._at = 0.0
        self._pieces: list[tuple[float, int, Callable[[], object]]] = []  # with what each will have got at its end
        self._numbers = itertools.count()
        self._timer: asyncio.TimerHandle | None = None

    def compute(self, seconds: float, then: Callable[[], object]) -> None:
        """Compute for so long, and call `then`."""
        self._catch_up()
        heapq.heappush(self._pieces, (self._each + seconds, next(self._numbers), then))
        self._set_timer()

    async def work(self, seconds: float) -> None:
        """Wait until so much was computed."""
        over: asyncio.Future[None] = self._loop.create_future()
        self.compute(seconds, lambda: _wake(over))
        await over

    def _speed(self) -> float:
        return min(1.0, self._count / (len(self._pieces) + self._others))

    def _catch_up(self) -> None:
        now = self._loop.time()
        if self._pieces:
            self._each += (now - self._at) * self._speed()
        self._at = now

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        left = max(0.0, self._pieces[0][0] - self._each)
        self._timer = self._loop.call_later(left / self._speed(), self._end)

    def _end(self) -> None:
        """End the piece for which the timer was set, whatever has been lost in rounding."""
        self._catch_up()
        _all, _number, then = heapq.heappop(self._pieces)
        self._timer = None
        if self._pieces:
            self._set_timer()
        then()


class Thread:
    """The thread of a process with its event loop: one piece of work at a time, on whichever core is free.

    Args:
        loop: whose time it is.
        cores: where it computes.
        batched: what is left of a piece that had to wait for another one: a turn of the loop looks for messages once for all
            of its pieces.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, cores: Cores, batched: float = 1.0) -> None:
        self._loop = loop
        self._cores = cores
        self._batched = batched
        self._busy = False
        self._waiting: deque[tuple[float, asyncio.Future[None], float]] = deque()

    async def work(self, seconds: float, delay: float = 0.0) -> None:
        """Wait until so much was computed here, and for some seconds more that nobody computes in."""
        over: asyncio.Future[None] = self._loop.create_future()
        self._waiting.append((seconds * self._batched if self._busy else seconds, over, delay))
        if not self._busy:
            self._next()
        await over

    def _next(self) -> None:
        self._busy = True
        seconds, over, delay = self._waiting.popleft()
        self._cores.compute(seconds, lambda: self._end(over, delay))

    def _end(self, over: asyncio.Future[None], delay: float) -> None:
        if self._waiting:
            self._next()
        else:
            self._busy = False
        if delay:
            self._loop.call_later(delay, _wake, over)
        else:
            _wake(over)


def _wake(over: asyncio.Future[None]) -> None:
    if not over.done():
        over.set_result(None)
