"""An asyncio loop whose time is virtual: it jumps to the next timer instead of waiting for it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, TypeVar
from unittest import mock

from sqla_uow._attempts import retry_or_raise

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

__all__ = ["VirtualLoop", "run"]

T = TypeVar("T")


class _Jump:
    """Stands where a loop has its selector: nothing is ever ready to be read, but waiting is over at once."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop

    def select(self, timeout: float | None) -> list[Any]:
        if timeout is None:
            raise RuntimeError("every task waits for another one, and no timer is left; one of them is never woken up")
        if timeout > 0:
            self._loop.jump()
        return []


class VirtualLoop(asyncio.BaseEventLoop):
    """Runs coroutines, timers and `asyncio.sleep` as they are, in the order that a real loop would, in no time."""

    _selector: Any
    _scheduled: list[asyncio.TimerHandle]
    _clock_resolution: float

    def __init__(self) -> None:
        super().__init__()
        self._now = 0.0
        self._clock_resolution = 1e-9
        self._selector = _Jump(self)
        self.trouble: list[BaseException] = []
        self.set_exception_handler(self._note)

    def time(self) -> float:
        """Return the virtual seconds since the loop was made."""
        return self._now

    def jump(self) -> None:
        """Go to the next timer."""
        self._now = max(self._now, self._scheduled[0].when())

    def _note(self, _loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Keep what a callback raised, which a loop only logs."""
        self.trouble.append(context.get("exception") or RuntimeError(context["message"]))
        self.stop()

    def _process_events(self, event_list: list[Any]) -> None:
        """Do nothing: there are no files."""

    def _write_to_self(self) -> None:
        """Do nothing: no other thread has to wake it up."""


class _Clock:
    """Stands where the library has the module `time`, for the one clock that cannot be handed to it."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.monotonic = now


def run(main: Callable[[VirtualLoop], Coroutine[Any, Any, T]]) -> T:
    """Run a coroutine to its end in a loop of its own."""
    loop = VirtualLoop()
    # The budget for retries after failures to connect belongs to an engine, whose managers may have several clocks.
    with mock.patch.object(retry_or_raise, "time", _Clock(loop.time)):
        try:
            result = loop.run_until_complete(main(loop))
        except RuntimeError as stopped:
            raise (loop.trouble or [stopped])[0] from None
        else:
            if loop.trouble:
                raise loop.trouble[0]
            return result
        finally:
            loop.close()
