"""What each event loop has for itself.

asyncio's locks and futures belong to one loop, while an engine and its manager belong to the process: a bot and a web
server in two threads share them.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["PerLoop"]

T = TypeVar("T")


class PerLoop(Generic[T]):
    """One thing for each event loop that asks for it.

    Args:
        make: makes it, when a loop asks for the first time.
    """

    __slots__ = ("_latest", "_make", "_of")

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        # Not weak: an asyncio.Lock holds its loop, and so would keep itself alive.
        self._of: dict[asyncio.AbstractEventLoop, T] = {}
        # One attribute for both, so that threads see both or none.
        self._latest: tuple[asyncio.AbstractEventLoop, T] | None = None

    def here(self) -> T:
        """Return what the running loop has."""
        loop = asyncio.get_running_loop()
        latest = self._latest
        if latest is not None and latest[0] is loop:
            return latest[1]
        mine = self._of.get(loop)
        if mine is None:
            for other in list(self._of):
                if other.is_closed():
                    self._of.pop(other, None)
            mine = self._of[loop] = self._make()
        self._latest = loop, mine
        return mine

    def everywhere(self) -> list[T]:
        """Return what the loops have, except those that are known to be closed."""
        return list(self._of.values())
