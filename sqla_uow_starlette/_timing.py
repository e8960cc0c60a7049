"""`Server-Timing`: what the units of a request took, for the developer tools of a browser."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import quote

from starlette.datastructures import MutableHeaders

from sqla_uow.events import Observer

if TYPE_CHECKING:
    from starlette.types import Message, Send

    from sqla_uow.events import OutcomeEvent, RetryEvent

__all__ = ["Timing"]


class Timing(Observer):
    """What the calls of one request took so far.

    Args:
        manager: its name; "default" is left out of the header.
    """

    def __init__(self, manager: str) -> None:
        self._suffix = "" if manager == "default" else "-" + quote(manager, safe="")
        self._seconds = 0.0
        self._commit_seconds: float | None = None
        self._attempts = 0

    def on_retry(self, event: RetryEvent, /) -> None:
        """Add the COMMIT of a run that failed there."""
        self._add_commit(event.commit_seconds)

    def on_outcome(self, event: OutcomeEvent, /) -> None:
        """Add a call that has ended."""
        self._seconds += event.elapsed
        self._attempts += event.attempt
        self._add_commit(event.commit_seconds)

    def _add_commit(self, seconds: float | None) -> None:
        if seconds is not None:
            self._commit_seconds = (self._commit_seconds or 0.0) + seconds

    def telling(self, send: Send) -> Send:
        """Return a `send()` that adds the header where a response starts."""

        async def tell(message: Message) -> None:
            if message["type"] == "http.response.start" and self._attempts:
                headers = MutableHeaders(raw=list(message.get("headers", ())))
                headers.append("server-timing", self._value())
                message = {**message, "headers": headers.raw}
            await send(message)

        return tell

    def _value(self) -> str:
        """Return the header's value; https://www.w3.org/TR/server-timing/, durations in milliseconds."""
        metrics = [f"uow{self._suffix};dur={self._seconds * 1000:.1f}"]
        if self._commit_seconds is not None:
            metrics.append(f"commit{self._suffix};dur={self._commit_seconds * 1000:.1f}")
        metrics.append(f'attempts{self._suffix};desc="{self._attempts}"')
        return ", ".join(metrics)
