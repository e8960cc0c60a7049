"""The same request once more: its body as it was read, and a scope that is as it was."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio

if TYPE_CHECKING:
    from collections.abc import Mapping

    from starlette.types import Message, Receive, Scope

    from sqla_uow import UnitOfWork

__all__ = ["Body", "Given"]


class Given:
    """What a request was given: its scope, and the dicts, lists and sets in it.

    They are the same objects in each attempt, and to those around the middleware, who may hold any of them; only their
    content is put back.  What is in them besides, connections say, cannot be known how to put back.

    Args:
        scope: of the request.
        shared: what the lifespan gave to all requests; what others do to that meanwhile is not undone.
    """

    def __init__(self, scope: Scope, shared: Mapping[str, Any]) -> None:
        self._seen: set[int] = {id(value) for value in shared.values()}
        self._contents: list[tuple[Any, Any, dict[str, Any] | None]] = []
        self._note(scope, dict)

    def _note(self, container: Any, kind: Any) -> None:
        if id(container) in self._seen:
            return
        self._seen.add(id(container))
        content: Any = kind(container)
        # A class of dicts may have attributes as well: a session knows by one whether it was modified.
        own: dict[str, Any] | None = getattr(container, "__dict__", None)
        self._contents.append((container, content, None if own is None else dict(own)))
        for value in content.values() if kind is dict else content:
            if isinstance(value, dict):
                self._note(value, dict)
            elif isinstance(value, list):
                self._note(value, list)
            elif isinstance(value, set):
                self._note(value, set)

    def restore(self) -> None:
        """Put the content back that everything had."""
        for container, content, own in self._contents:
            container.clear()
            (container.extend if type(content) is list else container.update)(content)
            if own is not None:
                container.__dict__.clear()
                container.__dict__.update(own)


class Body:
    """Records the request's body as the application reads it, up to a limit of bytes.

    What is read beyond it, and a client that leaves, make the attempt that sees it the last.

    Attributes:
        overflowed: whether more was read than may be recorded.
        left: whether the client has left.
    """

    def __init__(self, receive: Receive, limit: int) -> None:
        self._receive = receive
        self._limit = limit
        self._recorded = bytearray()
        self._read = False
        self._complete = False
        self.overflowed = False
        self.left = False

    def replaying(self, unit: UnitOfWork[Any]) -> Receive:
        """Return `receive()` for one attempt: what was recorded in one message, then what follows."""
        pending = self._read

        async def receive() -> Message:
            nonlocal pending
            if pending:
                pending = False
                return {"type": "http.request", "body": bytes(self._recorded), "more_body": not self._complete}
            message = await self._receive()
            self._note(message, unit)
            return message

        return receive

    async def client_left(self) -> bool:
        """Look, without waiting, whether the client has left; what is found before that is recorded."""
        while not self.left and len(self._recorded) <= self._limit:
            message: Message | None = None
            with anyio.CancelScope() as at_once:
                at_once.cancel()
                message = await self._receive()
            if message is None:
                break
            self._record(message)
        return self.left

    def _note(self, message: Message, unit: UnitOfWork[Any]) -> None:
        """Record what the application is given, if it may be needed again."""
        if unit.is_last_attempt:
            return
        self._record(message)
        if len(self._recorded) > self._limit:
            self._recorded.clear()
            self.overflowed = True
        unit.is_last_attempt = self.left or self.overflowed

    def _record(self, message: Message) -> None:
        if message["type"] == "http.disconnect":
            self.left = True
        elif message["type"] == "http.request":
            self._read = True
            self._recorded += message.get("body", b"")
            self._complete = not message.get("more_body", False)
