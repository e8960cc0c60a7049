"""What is not a success, told as RFC 9457 problem details."""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse

from examples.bank.services import NoAccountError, NoClerkError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from starlette.requests import Request
    from starlette.responses import Response

__all__ = ["HANDLERS", "ProblemError", "problem"]


class ProblemError(Exception):
    """A request that cannot be done; the message tells its sender why."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status = status


def problem(status: int, detail: str, headers: Mapping[str, str] | None = None) -> Response:
    """Answer with a problem."""
    content = {"title": HTTPStatus(status).phrase, "status": status, "detail": detail}
    return JSONResponse(content, status, headers=headers, media_type="application/problem+json")


async def _problem(_request: Request, error: ProblemError) -> Response:
    return problem(error.status, str(error))


async def _not_there(_request: Request, error: Exception) -> Response:
    return problem(404, str(error))


async def _http(_request: Request, error: HTTPException) -> Response:
    """Answer what Starlette refuses by itself: no such path, no such method."""
    return problem(error.status_code, error.detail, error.headers)


async def _gone(_request: Request, _error: Exception) -> Response:
    """End a request whose client left while it was still sending; nobody reads the answer."""
    return problem(400, "the body ended before all of it had come")


async def _bug(_request: Request, _error: Exception) -> Response:
    """Answer for an error that nobody expected; Starlette raises it on, so that the server logs it."""
    return problem(500, "this is our fault; it was logged")


HANDLERS: dict[Any, Any] = {
    ProblemError: _problem,
    NoAccountError: _not_there,
    NoClerkError: _not_there,
    HTTPException: _http,
    ClientDisconnect: _gone,
    Exception: _bug,
}
"""For ``Starlette(exception_handlers=...)``."""
