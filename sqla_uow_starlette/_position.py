"""What a client has written last, kept by itself between its requests: in a cookie, or in a header."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import quote

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import cookie_parser

if TYPE_CHECKING:
    from starlette.types import Message, Scope, Send

    from sqla_uow import Scope as UnitScope
    from sqla_uow import UnitOfWorkManager

__all__ = ["Carrier", "PositionIn", "sent", "telling"]

PositionIn = Literal["cookie", "header"]


class Carrier:
    """Where the clients of one middleware keep their position.

    Args:
        manager: one with replicas.
        kind: which place.
    """

    def __init__(self, manager: UnitOfWorkManager[Any], kind: PositionIn) -> None:
        suffix = "" if manager.name == "default" else "-" + quote(manager.name, safe="")
        self.name: str = f"uow-position{suffix}"
        self._in_cookie = kind == "cookie"

    def read(self, scope: Scope) -> str:
        """Return what the client sent, "" for nothing; whatever it is, it does no harm."""
        headers = Headers(scope=scope)
        if not self._in_cookie:
            return headers.get(self.name, "")
        return cookie_parser("; ".join(headers.getlist("cookie"))).get(self.name, "")

    def write(self, message: Message, scope: Scope, position: str) -> Message:
        """Return the start of a response that tells the client its new position."""
        headers = MutableHeaders(raw=list(message.get("headers", ())))
        if self._in_cookie:
            secure = "; Secure" if scope["scheme"] == "https" else ""
            headers.append("set-cookie", f"{self.name}={position}; Path=/; HttpOnly; SameSite=Lax{secure}")
        else:
            headers[self.name] = position
        return {**message, "headers": headers.raw}


def sent(carrier: Carrier | None, scope: Scope) -> str | None:
    """Return the position that the client of a request has sent; None where clients keep none."""
    return None if carrier is None else carrier.read(scope)


def telling(send: Send, carrier: Carrier | None, scope: Scope, unit_scope: UnitScope, known: str | None) -> Send:
    """Return a `send()` that tells the client where it has written, if that is news, when the response starts."""
    if carrier is None:
        return send

    async def tell(message: Message) -> None:
        position = unit_scope.position or ""
        if message["type"] == "http.response.start" and position != known:
            message = carrier.write(message, scope, position)
        await send(message)

    return tell
