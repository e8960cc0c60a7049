"""What shall happen when a client sends certain bytes."""

import threading
from collections.abc import Callable
from typing import Literal

Action = Literal["cut", "hold"] | Callable[[], object]


class Trigger:
    """One action, once; made by `Proxy.on_client_bytes`.

    Args:
        needle: The bytes, in any case.
        action: What to do.
        after_server: Whether to do it when the server has answered.

    Attributes:
        answer: What the server has answered, as far as it came in one piece; empty before, and without `after_server`.
    """

    def __init__(self, needle: bytes, action: Action, *, after_server: bool) -> None:
        self.needle = needle.lower()
        self.action = action
        self.after_server = after_server
        self.answer = b""
        self._done = threading.Event()
        self._error: Exception | None = None
        self._let_go: Callable[[], None] | None = None

    def __repr__(self) -> str:
        return f"<Trigger on {self.needle!r}: {self.action!r}, after_server={self.after_server}, fired={self.fired}>"

    @property
    def fired(self) -> bool:
        """Whether the bytes are lost or held, or the callable has returned; true before the client can tell."""
        return self._done.is_set()

    def wait(self, timeout: float = 5.0) -> bool:
        """Block until the trigger has fired; from a coroutine, `await asyncio.to_thread(trigger.wait)`.

        Args:
            timeout: Seconds.

        Returns:
            Whether it has fired.

        Raises:
            Exception: What the callable has raised; its connection was cut.
        """
        fired = self._done.wait(timeout)
        if self._error:
            raise self._error
        return fired

    def release(self) -> None:
        """Forward what a fired "hold" has kept back, in order.

        Raises:
            RuntimeError: Nothing is held.
        """
        if self._let_go is None:
            raise RuntimeError(f"{self!r} holds nothing; wait() for one whose action is 'hold' before release()")
        self._let_go()

    def held(self, let_go: Callable[[], None]) -> None:
        """Be told, by the proxy, how to release what is held."""
        self._let_go = let_go

    def call(self) -> bool:
        """Run the callable, in the proxy's thread; False if it has raised, which `wait` will tell."""
        assert callable(self.action)
        try:
            self.action()
        except Exception as error:  # noqa: BLE001  -- raised in the test's thread, by wait()
            self._error = error
        return self._error is None

    def done(self) -> None:
        """Be told, by the proxy, that the action is done."""
        self._done.set()
