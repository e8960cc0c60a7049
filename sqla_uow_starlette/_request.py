"""A request or a WebSocket connection in a scope of its own."""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from sqla_uow.errors import ReadOnlyError
from sqla_uow_starlette._answer import answering
from sqla_uow_starlette._naming import RequestName
from sqla_uow_starlette._position import Carrier, sent, telling
from sqla_uow_starlette._replay import Body
from sqla_uow_starlette._sending import Sender, run

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from sqla_uow import Scope as UnitScope
    from sqla_uow import UnitOfWorkManager
    from sqla_uow.events import Observer
    from sqla_uow_starlette._telling import Telling

__all__ = ["answer", "handle_connection", "handle_request"]

logger = logging.getLogger("sqla_uow_starlette")

_KEPT = 1024 * 1024
"""Bytes of a request's body."""


async def handle_request(
    app: ASGIApp,
    manager: UnitOfWorkManager[Any],
    scope: Scope,
    receive: Receive,
    send: Send,
    *,
    carrier: Carrier | None,
    observers: tuple[Observer, ...] = (),
    tells: Telling | None = None,
) -> None:
    """Handle a request in a scope that ends before the response starts."""
    outer = scope.get("app")
    known = sent(carrier, scope)
    body = Body(receive, _KEPT)  # for the handler of a failure that the application could not see
    unit_scope: UnitScope | None = None
    sender: Sender | None = None
    try:
        opening = manager.scope if tells is None else tells.opening(manager, scope)
        async with opening(position=known, observers=observers) as unit_scope:
            send = telling(send, carrier, scope, unit_scope, known)
            sender = Sender(scope, unit_scope, send, body)
            await run(app, scope, body.replaying(None), sender)
        failure = sender.failure
    except Exception as error:
        failure = None if unit_scope is None else unit_scope.conflict_behind(error)
        if failure is None or sender is None or sender.started:
            raise
        logger.warning("%s could not read (%s)", RequestName(scope)(), type(error).__name__)
    if failure is not None and unit_scope is not None:
        app = answering(failure, scope, outer)
        await answer(app, unit_scope, scope, body.replaying(None), send, tells=tells)


async def answer(
    app: ASGIApp, failed: UnitScope, scope: Scope, receive: Receive, send: Send, *, tells: Telling | None
) -> None:
    """Run an application that answers what has failed in a scope: it may read, and nothing is refused."""
    opening = failed.manager.scope if tells is None else tells.opening(failed.manager, scope)
    async with opening(position=failed.position) as unit_scope:

        async def closing(message: Message) -> None:
            if message["type"] == "http.response.start":
                with suppress(ReadOnlyError):  # the failure is what the client has to know
                    await unit_scope.close()
            await send(message)

        await app(scope, receive, closing)


async def handle_connection(
    app: ASGIApp, opening: AbstractAsyncContextManager[UnitScope], scope: Scope, receive: Receive, send: Send
) -> None:
    """Handle a WebSocket connection in a scope that rests while the application waits for the next message."""
    async with opening as unit_scope:

        async def resting() -> Message:
            await unit_scope.rest()
            return await receive()

        await app(scope, resting, send)
