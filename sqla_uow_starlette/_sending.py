"""`send()` of one run of the application, which may be refused at the start of its response."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from sqla_uow.errors import ReadOnlyError

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from sqla_uow import Scope as UnitScope

__all__ = ["ERROR", "Sender", "run"]

ERROR = 400
"""Responses of this status and above tell of an error."""


class Refused(BaseException):
    """Unwinds an application whose response must not leave; it never leaves the middleware.

    No `Exception`, so that no handler makes another response of it, and no background task begins.
    """


class Sender:
    """Passes messages on; before the first of a response, ends what the request has open.

    Attributes:
        refused: whether the response was refused; then the application is to be unwound.
        failure: why, if there is something to answer.
    """

    def __init__(self, unit_scope: UnitScope, send: Send) -> None:
        self.unit_scope = unit_scope
        self.forward = send
        self.started = False
        self.refused = False
        self.failure: Exception | None = None

    async def __call__(self, message: Message) -> None:
        """Pass a message on.

        Raises:
            Refused: the response must not leave.
        """
        if not self.started and message["type"] == "http.response.start" and not self.refused:
            await self.before_start(message["status"])
            self.started = True
        if self.refused:
            raise Refused
        await self.forward(message)

    async def before_start(self, status: int) -> None:
        """Close the scope; refuse a success if an object that was read was changed: nothing would write that."""
        try:
            await self.unit_scope.close()
        except ReadOnlyError as error:
            if status < ERROR:  # an error has its own story to tell
                self.refuse(error)

    def refuse(self, failure: Exception | None) -> None:
        """Let nothing leave any more."""
        self.refused = True
        self.failure = failure


async def run(app: ASGIApp, scope: Scope, receive: Receive, sender: Sender) -> None:
    """Run the application; what unwinds it after a refusal is no news, but a cancellation goes on."""
    task: Any = asyncio.current_task()  # there is one: this is a coroutine
    cancelling = task.cancelling()
    try:
        await app(scope, receive, sender)
    except BaseException:
        if not sender.refused or task.cancelling() > cancelling:
            raise
