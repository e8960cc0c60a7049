"""A request or a WebSocket connection in a scope of its own."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Any, cast

from sqla_uow.errors import ReadOnlyError
from sqla_uow_starlette._answer import answering

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from sqla_uow import Scope as UnitScope
    from sqla_uow import UnitOfWorkManager

__all__ = ["Connection", "Refused", "Request", "in_scope"]


class Refused(BaseException):
    """Raised by `send()` to unwind an application whose response must not leave; it never leaves the middleware.

    No `Exception`, so that no handler makes another response of it, and no background task begins.
    """


class Request:
    """One request: its scope is open until its response starts."""

    def __init__(self, app: ASGIApp, manager: UnitOfWorkManager[Any]) -> None:
        self.app = app
        self.manager = manager
        self.failure: Exception | None = None
        self.started = False
        self.scope: UnitScope
        self.forward: Send

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application; answer in its place where it was refused."""
        self.forward = send
        outer = scope.get("app")
        async with self.manager.scope() as self.scope:
            await self.run(scope, receive)
        if self.failure is not None:
            await in_scope(answering(self.failure, scope, outer), self.manager, scope, receive, send)

    async def run(self, scope: Scope, receive: Receive) -> None:
        """Run the application.

        Raises:
            Exception: what it raised, if it was not refused.
        """
        task = cast("asyncio.Task[object]", asyncio.current_task())
        cancelling = task.cancelling()
        try:
            await self.app(scope, receive, self.send)
        except BaseException:
            if self.failure is None or task.cancelling() > cancelling:
                raise

    async def send(self, message: Message) -> None:
        """Pass a message on; before the first of the response, end what the request has open."""
        if self.failure is not None:
            raise Refused
        if message["type"] == "http.response.start" and not self.started:
            await self.before_start(message)
            self.started = True
        await self.forward(message)

    async def before_start(self, message: Message) -> None:
        """Close the scope.

        Raises:
            Refused: an object that was read was changed, too; a success would tell of a write that does not happen.
        """
        try:
            await self.scope.close()
        except ReadOnlyError as error:
            if message["status"] < 400:  # noqa: PLR2004  # an error's own story is the better one
                self.failure = error
                raise Refused from None


async def in_scope(app: ASGIApp, manager: UnitOfWorkManager[Any], scope: Scope, receive: Receive, send: Send) -> None:
    """Run an application that answers a failure: it may read, and nothing is refused."""
    async with manager.scope() as unit_scope:

        async def closing(message: Message) -> None:
            if message["type"] == "http.response.start":
                with suppress(ReadOnlyError):  # the failure is what the client has to know
                    await unit_scope.close()
            await send(message)

        await app(scope, receive, closing)


class Connection:
    """One WebSocket connection: its scope rests while the application waits for the next message."""

    def __init__(self, app: ASGIApp, manager: UnitOfWorkManager[Any]) -> None:
        self.app = app
        self.manager = manager

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application."""
        async with self.manager.scope() as unit_scope:

            async def resting() -> Message:
                await unit_scope.rest()
                return await receive()

            await self.app(scope, resting, send)
