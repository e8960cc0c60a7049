"""The same request once more: its body as it was read, and a scope as it was given."""

from __future__ import annotations

from copy import copy, deepcopy
from typing import TYPE_CHECKING, Any

import anyio

if TYPE_CHECKING:
    from starlette.types import Message, Receive, Scope

    from sqla_uow import UnitOfWork

__all__ = ["Body", "copied"]


def copied(scope: Scope) -> Scope:
    """Return a scope for one attempt: what it puts into `state` and `session` is not seen by the next."""
    copies = dict(scope)
    if "state" in scope:
        copies["state"] = copy(scope["state"])
    if "session" in scope:  # plain data, also inside
        copies["session"] = deepcopy(scope["session"])
    return copies


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
