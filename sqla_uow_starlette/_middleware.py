"""`UnitOfWorkMiddleware`: what each request and WebSocket connection runs in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqla_uow import UnitOfWorkManager
from sqla_uow_starlette._request import Connection, Request

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

__all__ = ["UnitOfWorkMiddleware"]


class UnitOfWorkMiddleware:
    """Pure ASGI middleware: opens a scope for each request and WebSocket connection.

    In the scope `current_session()` reads, outside any transactional function; it ends before the response starts, so that
    a streaming body or a background task gets `NoUnitError`.  `@transactional` functions commit before they return, so
    before there is a response.

    Args:
        app: the application.
        manager: whose scopes they are.  For several managers add the middleware several times.

    Raises:
        TypeError, ValueError: what was passed cannot work, with what would.
    """

    def __init__(self, app: ASGIApp, *, manager: UnitOfWorkManager[Any]) -> None:
        if not isinstance(manager, UnitOfWorkManager):
            raise TypeError(
                f"UnitOfWorkMiddleware got manager={manager!r}; pass the UnitOfWorkManager that the requests are to use"
            )
        self.app = app
        self.manager = manager

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection; what is neither a request nor a WebSocket passes through."""
        if scope["type"] == "http":
            await Request(self.app, self.manager)(scope, receive, send)
        elif scope["type"] == "websocket":
            await Connection(self.app, self.manager)(scope, receive, send)
        else:
            await self.app(scope, receive, send)
