"""The same request once more: its body as it was read, and a scope that is as it was."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from starlette.types import Message, Receive, Scope

    from sqla_uow import UnitOfWork

__all__ = ["Body", "Given"]

_TURNS = 20
"""Of the event loop, that a message may take which is there already; each middleware in between takes a few."""

_NOTHING = -1

_CONTAINERS = (dict, list, set)


class Given:
    """What a request was given: its scope, and the dicts, lists and sets in it.

    They are the same objects in each attempt, and to the code around the middleware, which may hold any of them; only their
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
        seen = self._seen
        if id(container) in seen:
            return
        seen.add(id(container))
        content: Any = kind(container)
        # A class of dicts may have attributes as well: a session knows by one whether it was modified.
        own: dict[str, Any] | None = None if type(container) is kind else getattr(container, "__dict__", None)
        self._contents.append((container, content, None if own is None else dict(own)))
        for value in content.values() if kind is dict else content:
            if isinstance(value, _CONTAINERS):
                self._note(value, next(each for each in _CONTAINERS if isinstance(value, each)))

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
        looking: what waits for the client to leave, if anything does.
        overflowed: whether more was read than may be recorded, so that there is no other attempt.
        left: whether the client has left.
    """

    __slots__ = ("_complete", "_limit", "_read", "_receive", "_recorded", "_size", "left", "looking", "overflowed")

    def __init__(self, receive: Receive, limit: int) -> None:
        self._receive = receive
        self._limit = limit
        self._recorded: list[bytes] = []
        self._size: int = 0
        self._read: bool = False
        self._complete: bool = False
        self.looking: asyncio.Task[Message] | None = None
        self.overflowed: bool = False
        self.left: bool = False

    def replaying(self, unit: UnitOfWork[Any] | None) -> Receive:
        """Return `receive()` for one attempt: what was recorded in one message, then what follows.

        Args:
            unit: the attempt's; None for the handler of a failure, to which a body that was too long is lost.
        """
        pending = self._read

        async def receive() -> Message:
            nonlocal pending
            if pending:
                pending = False
                if self._size > self._limit and unit is None:
                    return {
                        "type": "http.disconnect"
                    }  # what would follow it, if anything, comes when the client leaves
                return {"type": "http.request", "body": b"".join(self._recorded), "more_body": not self._complete}
            message = await self._next()
            self._record(message)
            if self._size > self._limit:
                self._recorded.clear()
            if unit is not None and not unit.is_last_attempt and self._limit != _NOTHING:
                self.overflowed = self._size > self._limit
                unit.is_last_attempt = self.left or self.overflowed
            return message

        return receive

    async def client_left(self) -> bool:
        """Look, without waiting long, whether the client has left; what is found before that is recorded.

        A `receive()` that is cancelled may have taken a message already, which would be lost: behind a `BaseHTTPMiddleware`,
        say.  So it goes on, for the next attempt.
        """
        while not self.left and self._size <= self._limit:
            self.looking = self.looking or asyncio.ensure_future(self._receive())
            for _ in range(_TURNS):
                await asyncio.sleep(0)
                if self.looking.done():
                    break
            else:
                break
            self._record(await self._next())
        return self.left

    def forget(self) -> None:
        """Keep nothing of it: the response starts, which may go on for hours, and nobody needs the body again."""
        self._limit = _NOTHING
        self._recorded.clear()

    async def close(self) -> None:
        """Look no longer."""
        looking, self.looking = self.looking, None
        if looking is not None:
            looking.cancel()
            looking.add_done_callback(_passed_over)
            await asyncio.wait({looking})

    async def _next(self) -> Message:
        looking = self.looking
        if looking is None:
            return await self._receive()
        await asyncio.wait({looking})  # cut off here, it is there for the next call
        if self.looking is not looking:  # another task has it
            return await self._next()
        self.looking = None
        return looking.result()

    def _record(self, message: Message) -> None:
        if message["type"] == "http.disconnect":
            self.left = True
        elif message["type"] == "http.request":
            self._read = True
            part = message.get("body", b"")
            self._size += len(part)
            self._recorded.append(part)
            self._complete = not message.get("more_body", False)


def _passed_over(looking: asyncio.Task[Message]) -> None:
    """Have nothing said of what it has failed with: the request is over."""
    if not looking.cancelled():
        looking.exception()
