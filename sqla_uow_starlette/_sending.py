"""`send()` of one run of the application, which may be refused at the start of its response."""

from __future__ import annotations

import asyncio
import sys
import warnings
from typing import TYPE_CHECKING, Any

from starlette.middleware.errors import ServerErrorMiddleware

from sqla_uow.errors import LateCommitWarning, ReadOnlyError
from sqla_uow_starlette._naming import RequestName
from sqla_uow_starlette._problems import is_answered

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from sqla_uow import Scope as UnitScope
    from sqla_uow_starlette._replay import Body

__all__ = ["ERROR", "SERVER_ERROR", "Sender", "run", "unanswered"]

ERROR = 400
"""Responses of this status and above tell of an error."""
SERVER_ERROR = 500


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

    def __init__(self, scope: Scope, unit_scope: UnitScope, send: Send, body: Body) -> None:
        self.scope = scope
        self.body = body
        self.unit_scope = unit_scope
        self.forward = send
        self.started: bool = False
        self.refused: bool = False
        self.failure: Exception | None = None

    async def __call__(self, message: Message) -> None:
        """Pass a message on.

        Raises:
            Refused: the response must not leave.
        """
        if not self.started and message["type"] == "http.response.start" and not self.refused:
            await self.before_start(message["status"])
            self.started = True
            if not self.refused:
                self.body.forget()
        if self.refused:
            raise Refused
        await self.forward(message)

    async def before_start(self, status: int) -> None:
        """Close the scope; refuse a success if an object that was read was changed: nothing would write that."""
        if status == SERVER_ERROR and (error := unanswered()) is not None:
            failure = self.unit_scope.conflict_behind(error) or error
            if is_answered(failure):
                self.refuse(failure)
        await self.close(status)

    async def close(self, status: int) -> None:
        """End what the request has open, and tell of what ends too late."""
        if self.unit_scope.open_unit() is not None:
            _warn(self.scope)
        try:
            await self.unit_scope.close()
        except ReadOnlyError as error:
            if status < ERROR:  # an error has its own story to tell
                self.refuse(self.unsaved(error))

    def unsaved(self, error: ReadOnlyError) -> Exception:
        """Return what a change that nothing would write becomes."""
        return error

    def refuse(self, failure: Exception | None) -> None:
        """Let nothing leave any more."""
        self.refused = True
        self.failure = failure


async def run(app: ASGIApp, scope: Scope, receive: Receive, sender: Sender) -> None:
    """Run the application; what unwinds it after a refusal is ignored, but a cancellation goes on."""
    task: Any = asyncio.current_task()  # there is one: this is a coroutine
    cancelling = task.cancelling()
    try:
        await app(scope, receive, sender)
    except BaseException:
        if not sender.refused or task.cancelling() > cancelling:
            raise


def unanswered() -> Exception | None:
    """Return the exception that Starlette's plain 500 page is about to tell of, because no handler wanted it.

    That page of a mounted application comes before the handlers of the application around it are asked.
    """
    error = sys.exception()
    if not isinstance(error, Exception):
        return None
    traceback = error.__traceback__
    # Whoever handles it is the first in its traceback.
    if traceback is None or traceback.tb_frame.f_code is not ServerErrorMiddleware.__call__.__code__:
        return None
    page: ServerErrorMiddleware = traceback.tb_frame.f_locals["self"]
    return None if page.handler is not None or page.debug else error


def _warn(scope: Scope) -> None:
    """Warn, once for each endpoint under the usual filters, that a unit will commit behind the answer."""
    name, endpoint = RequestName(scope)(), scope.get("endpoint")
    code, names = getattr(endpoint, "__code__", None), getattr(endpoint, "__globals__", {})
    warnings.warn_explicit(
        f"{name} begins its response while a unit of it is open, whose COMMIT comes too late to tell the client; end "
        "the unit before, in a FastAPI dependency by Depends(..., scope='function')",
        LateCommitWarning,
        name if code is None else code.co_filename,
        1 if code is None else code.co_firstlineno,
        names.get("__name__"),
        names.setdefault("__warningregistry__", {}),
    )
