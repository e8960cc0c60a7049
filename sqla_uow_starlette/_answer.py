"""Who answers a failure that the application could not see: its own handlers, then ours."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from starlette.middleware.errors import ServerErrorMiddleware
from starlette.middleware.exceptions import ExceptionMiddleware

from sqla_uow_starlette._problems import exception_handlers

if TYPE_CHECKING:
    from collections.abc import Mapping

    from starlette.types import ASGIApp, Scope

__all__ = ["answering"]


def answering(error: Exception, scope: Scope, outer: Any) -> ASGIApp:
    """Return an application that answers `error` as it would have been answered if the endpoint had raised it.

    First comes the innermost application that the request reached, then `outer`.  Their `Exception` and 500 handlers and
    their debug pages belong to Starlette's `ServerErrorMiddleware`, so the error is raised on to it.  Ours are the last.

    Args:
        error: the failure.
        scope: the one that the request was handled with.
        outer: the application around the middleware, None if the middleware is outermost.
    """

    async def fail(*_connection: object) -> None:
        raise error

    handlers, by_status = scope.get("starlette.exception_handlers", ({}, {}))
    app: ASGIApp = ExceptionMiddleware(fail, {**handlers, **by_status})
    if outer is not None:
        app = ExceptionMiddleware(app, _specific(_handlers_of(outer)))
        return app if _has_general(outer) else ExceptionMiddleware(app, exception_handlers)
    inner = scope.get("app")
    if not _has_general(inner):
        return ExceptionMiddleware(app, exception_handlers)
    handlers = _handlers_of(inner)
    return ServerErrorMiddleware(
        app, handlers.get(500) or handlers.get(Exception), debug=bool(getattr(inner, "debug", False))
    )


def _handlers_of(app: Any) -> Mapping[Any, Any]:
    handlers: Mapping[Any, Any] = getattr(app, "exception_handlers", {})
    return handlers


def _specific(handlers: Mapping[Any, Any]) -> dict[Any, Any]:
    """Leave out what Starlette gives to its `ServerErrorMiddleware`."""
    return {key: handler for key, handler in handlers.items() if key not in (500, Exception)}


def _has_general(app: Any) -> bool:
    return bool(getattr(app, "debug", False)) or not {500, Exception}.isdisjoint(_handlers_of(app))
