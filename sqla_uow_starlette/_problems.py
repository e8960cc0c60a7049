"""What a client is told when a unit of work fails: problem details (RFC 9457) without SQL, parameters or addresses."""

from __future__ import annotations

import logging
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias, cast

from sqlalchemy import exc
from starlette.responses import JSONResponse, Response
from starlette.websockets import WebSocket, WebSocketClose, WebSocketState

from sqla_uow.errors import (
    AfterCommitError,
    AmbiguousCommitError,
    ConflictError,
    KeyReusedError,
    StaleVersionError,
    TransactionTimeoutError,
)
from sqla_uow_starlette._idempotency import IDEMPOTENT, IdempotencyError
from sqla_uow_starlette._naming import RequestName
from sqla_uow_starlette._preconditions import PreconditionError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping

    from starlette.requests import Request
    from starlette.types import Receive, Scope, Send

__all__ = ["exception_handlers", "is_answered"]

logger = logging.getLogger("sqla_uow_starlette")

_Handler: TypeAlias = "Callable[[Request, Any], Coroutine[Any, Any, Response]]"

_RETRY_AFTER: Final = {"Retry-After": "1"}
"""Seconds: a conflict has been retried with backoff already, and a pool that is empty is so for a moment."""

_TRY_AGAIN_LATER: Final = 1013
_INTERNAL_ERROR: Final = 1011
"""Codes of a closing WebSocket (IANA's registry)."""


class _ProblemResponse(JSONResponse):
    media_type = "application/problem+json"


class _Problem(NamedTuple):
    """One kind of failure, as a client sees it.

    Attributes:
        status: of the response.
        code: what a program may look at.
        detail: what a person may read: what happened, and what to do.
        headers: of the response.
        retry: how the request can be sent again, for programs; None where it had better not be.
    """

    status: int
    code: str
    detail: str
    headers: Mapping[str, str] = {}
    retry: str | None = None

    def response(self) -> Response:
        """Return the response; no cache may store it (RFC 6585, 3)."""
        content = {
            "type": "about:blank",
            "title": HTTPStatus(self.status).phrase,  # as RFC 9457, 4.2.1 asks of this type
            "status": self.status,
            "detail": self.detail,
            "code": self.code,
        } | ({} if self.retry is None else {"retry": self.retry})
        return _ProblemResponse(content, self.status, {"Cache-Control": "no-store", **self.headers})


def _unavailable(code: str, detail: str) -> _Problem:
    return _Problem(503, code, detail, _RETRY_AFTER)


_CONFLICT: Final = _unavailable(
    "conflict", "other requests changed the same data at the same time; this one was rolled back, send it again"
)
_UNAVAILABLE: Final = _unavailable(
    "database-unavailable", "the database cannot be reached; this request was rolled back, send it again later"
)
_BUSY: Final = _unavailable("database-busy", "the database did not answer in time; send the request again later")
_STALE: Final = _Problem(409, "stale-version", "the resource was changed by another request meanwhile; get it again")
_FAILED: Final = _Problem(
    412,
    "precondition-failed",
    "If-Match does not hold: the resource has changed since, or is gone; get it again",
)
_AMBIGUOUS: Final = _Problem(
    500,
    "ambiguous-commit",
    "whether this request was carried out is unknown; look before sending it again",
)
_AMBIGUOUS_WITH_KEY: Final = _Problem(
    500,
    "ambiguous-commit",
    "whether this request was carried out is unknown; send it again with the same Idempotency-Key, and it is, once",
    _RETRY_AFTER,
    "same-key",
)
_REUSED: Final = _Problem(
    422,
    "idempotency-key-reused",
    "this Idempotency-Key was sent before with another request; use a new one for each",
)
_COMMITTED: Final = _Problem(
    500,
    "committed-hook-failed",
    "this request was carried out, but something that was to follow has failed; do not send it again",
)
_UNREACHED: Final = frozenset({"not started", "lost connection"})


async def _conflict(connection: Request, error: ConflictError) -> Response:
    return _answer(connection, _UNAVAILABLE if error.reason in _UNREACHED else _CONFLICT)


async def _stale(connection: Request, _error: StaleVersionError) -> Response:
    return _answer(connection, _FAILED if "if-match" in connection.headers else _STALE)


async def _busy(connection: Request, error: Exception) -> Response:
    logger.warning("%s at %s", type(error).__name__, RequestName(connection.scope)())
    return _answer(connection, _BUSY)


async def _ambiguous(connection: Request, _error: AmbiguousCommitError) -> Response:
    return _answer(connection, _AMBIGUOUS_WITH_KEY if IDEMPOTENT in connection.scope else _AMBIGUOUS)


async def _reused(connection: Request, _error: KeyReusedError) -> Response:
    return _answer(connection, _REUSED)


async def _idempotency(connection: Request, error: IdempotencyError) -> Response:
    return _answer(connection, _Problem(error.status_code, error.code, error.detail, error.headers))


async def _committed(connection: Request, error: AfterCommitError) -> Response:
    # Nobody else tells the operator: an exception that has a handler is not logged by servers.
    logger.error("%s is committed, but what was to follow failed", RequestName(connection.scope)(), exc_info=error)
    return _answer(connection, _COMMITTED)


async def _precondition(connection: Request, error: PreconditionError) -> Response:
    if error.status_code == HTTPStatus.NOT_MODIFIED:  # which has no body
        return Response(status_code=error.status_code, headers=error.headers)
    return _answer(connection, _Problem(error.status_code, error.code, error.detail))


def _answer(connection: Request, problem: _Problem) -> Response:
    # Starlette hands a WebSocket to the same handlers, and calls what they return.
    session: object = connection
    if not isinstance(session, WebSocket):
        return problem.response()
    if WebSocketState.DISCONNECTED in (session.client_state, session.application_state):
        return cast("Response", _tell_nobody)
    code = _TRY_AGAIN_LATER if problem.status == _BUSY.status else _INTERNAL_ERROR
    return cast("Response", WebSocketClose(code, problem.code))


async def _tell_nobody(_scope: Scope, _receive: Receive, _send: Send) -> None:
    """Be the response to a WebSocket that is closed already."""


exception_handlers: Final[dict[int | type[Exception], _Handler]] = {
    ConflictError: _conflict,
    StaleVersionError: _stale,
    TransactionTimeoutError: _busy,
    exc.TimeoutError: _busy,
    AmbiguousCommitError: _ambiguous,
    AfterCommitError: _committed,
    PreconditionError: _precondition,
    KeyReusedError: _reused,
    IdempotencyError: _idempotency,
}
"""Pass them to ``Starlette(exception_handlers=exception_handlers)`` or
``FastAPI(exception_handlers=exception_handlers)``, and to each mounted application.  Add handlers of your own with
``{**exception_handlers, MyError: answer}``.

Each answer is a document of type ``application/problem+json`` whose ``code`` is for programs:

======  ========================  ==================================================================================
status  code                      when
======  ========================  ==================================================================================
503     ``conflict``              `ConflictError`: a conflict outlived its retries; Retry-After
503     ``database-unavailable``  `ConflictError`: the connection could not be made, or was lost; Retry-After
503     ``database-busy``         the pool's timeout (`sqlalchemy.exc.TimeoutError`) or `TransactionTimeoutError`;
                                  Retry-After
409     ``stale-version``         `StaleVersionError`
412     ``precondition-failed``   `StaleVersionError` where the request has an If-Match; a precondition that fails
428     ``precondition-required`` a precondition is missing
400     ``malformed-precondition``  If-Match or If-None-Match is not a list of entity tags
500     ``ambiguous-commit``      `AmbiguousCommitError`: no Retry-After, because a second try could do the work twice; with
                                  an Idempotency-Key it has one, and ``"retry": "same-key"``
500     ``committed-hook-failed``  `AfterCommitError`: it is committed, and only a hook failed; no Retry-After
400     ``idempotency-key-missing``, ``idempotency-key-malformed``: `IdempotencyError`; so are the next two
409     ``idempotency-key-in-progress``  another request with the key is being carried out; Retry-After
500     ``idempotency-response-too-large``  the response cannot be kept, so the request was rolled back
422     ``idempotency-key-reused``  `KeyReusedError`: the key was sent before with another request
======  ========================  ==================================================================================

A WebSocket is closed, with code 1013 (try again later) where the status would be 503 and 1011 elsewhere.
"""


def is_answered(error: Exception) -> bool:
    """Say whether there is a document for an error."""
    return any(kind in exception_handlers for kind in type(error).__mro__)
