"""`Idempotency`: what is to be done with the header Idempotency-Key, and how a response is kept."""

from __future__ import annotations

import asyncio
import inspect
import re
from datetime import timedelta
from typing import TYPE_CHECKING, Final, Protocol
from weakref import WeakKeyDictionary

from sqla_uow.idempotency import IdempotencyKeys, Key, Record

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop, Future
    from collections.abc import Callable, Iterable

    from starlette.types import Message, Scope

    Running = dict[tuple[object, bytes], Future[Record | None]]

__all__ = [
    "IDEMPOTENT", "Codec", "Idempotency", "IdempotencyError", "applies", "decoded", "encoded", "key_of", "running",
]  # fmt: skip

IDEMPOTENT: Final = "sqla_uow_starlette.idempotent"
"""In the scope of a request that has a key: it may be sent again, whatever has become of it."""

_HEADER = b"idempotency-key"
_SPACE = "http"
_MAX_KEY = 255
_BARE = re.compile(rb"[\x21\x23-\x7e][\x21-\x7e]*")
_QUOTED = re.compile(rb'"((?:[\x21\x23-\x5b\x5d-\x7e]|\\["\\])+)"')  # a string of RFC 9651, without spaces
_MAX_RESPONSE = 2**24 - 1  # of the column on MariaDB, and about what its max_allowed_packet lets through
_QUARTER_MIB = 262_144
_NEVER_KEPT = frozenset(
    {
        "connection", "content-length", "date", "keep-alive", "proxy-authenticate", "proxy-connection", "server-timing",
        "set-cookie", "te", "trailer", "transfer-encoding", "upgrade",
    }
)  # fmt: skip
_POSITION = "uow-position"
_ALWAYS_KEPT = "content-encoding"  # without which the body could not be read
_WITHOUT_BODY = frozenset({204, 304})


class Codec(Protocol):
    """Encrypts what is stored of a response, say."""

    def encode(self, plain: bytes, /) -> bytes:
        """Return what is to be stored.

        Args:
            plain: headers, or a body.
        """
        ...

    def decode(self, stored: bytes, /) -> bytes:
        """Return what was given to `encode`.

        Args:
            stored: what that returned.
        """
        ...


class IdempotencyError(Exception):
    """A request that cannot be carried out under its key; raised by the middleware, answered by `exception_handlers`.

    Attributes:
        status_code: 400, 409 or 500.
        detail: a sentence for the client.
        headers: for the response.
        code: the same for programs: ``"idempotency-key-missing"``, ``"idempotency-key-malformed"``,
            ``"idempotency-key-in-progress"`` or ``"idempotency-response-too-large"``.
    """

    def __init__(self, status_code: int, detail: str, *, code: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status_code: int = status_code
        self.detail: str = detail
        self.code: str = code
        self.headers: dict[str, str] = headers or {}


class Idempotency:
    """What `UnitOfWorkMiddleware` does with the header Idempotency-Key; for ``atomic=True``.

    The record of a request is in the request's own transaction: it is there if, and only if, the work is.  The first request
    with a key is carried out.  Who sends it again gets its response, with the header ``Idempotent-Replayed: true``.

    Args:
        keys: the table.
        caller: called with the ASGI scope of a request that has a key, returns who sends it: the id of a user or of an
            account, never a token that changes.  Keys of two callers have nothing to do with each other.
        methods: of the requests whose header counts.
        required: refuse such a request without a key.
        keep: how long a response is kept; None is that of the keys.
        wait: seconds that a repetition waits for the first request; then it is told 409.  It holds no connection.
        max_response: bytes of a response's body; one that is longer, or is streamed, is refused and rolled back.
        headers: of a response, that are kept with it.
        fingerprint: called with the ASGI scope, returns what must be the same, besides the body, where the key is; without
            it that is method, path and query.  None, returned, has nothing compared, not even the body.
        codec: through which headers and bodies are stored.

    Raises:
        TypeError, ValueError: what was passed cannot work, with what would.
    """

    def __init__(
        self,
        keys: IdempotencyKeys,
        *,
        caller: Callable[[Scope], str],
        methods: Iterable[str] = ("POST", "PATCH"),
        required: bool = False,
        keep: timedelta | None = None,
        wait: float = 2.0,
        max_response: int = _QUARTER_MIB,
        headers: Iterable[str] = ("content-type", "location", "etag"),
        fingerprint: Callable[[Scope], bytes | None] | None = None,
        codec: Codec | None = None,
    ) -> None:
        _check_types(keys, caller, methods, headers, fingerprint, required=required)
        _check_numbers(keep, wait, max_response)
        self.keys: IdempotencyKeys = keys
        self.caller: Callable[[Scope], str] = caller
        self.methods: frozenset[str] = frozenset(method.upper() for method in methods)
        self.required: bool = required
        self.keep: timedelta | None = keep
        self.wait: float = wait
        self.max_response: int = max_response
        names = {name.lower() for name in headers}
        self.kept_headers: frozenset[bytes] = frozenset(name.encode() for name in (*names, _ALWAYS_KEPT))
        self.fingerprint: Callable[[Scope], bytes | None] | None = fingerprint
        self.codec: Codec | None = codec
        never = sorted(name for name in names if name in _NEVER_KEPT or name.startswith(_POSITION))
        if never:
            raise ValueError(
                f"Idempotency has headers with {', '.join(never)}, which is of one response and not of its repetitions; leave it out"
            )
        self.in_progress: WeakKeyDictionary[AbstractEventLoop, Running] = WeakKeyDictionary()


def running(options: Idempotency) -> Running:
    """Return the keys of the requests that run in this event loop, each with what comes of it."""
    return options.in_progress.setdefault(asyncio.get_running_loop(), {})


def applies(options: Idempotency, scope: Scope) -> bool:
    """Say whether a request has a key, or has to have one."""
    return scope["method"] in options.methods and (
        options.required or any(name == _HEADER for name, _value in scope["headers"])
    )


def key_of(options: Idempotency, scope: Scope) -> Key:
    """Return the key of a request.

    Raises:
        IdempotencyError: what is sent is no key, or none is sent where one is required.
        TypeError: `caller` returned no text.
    """
    values = [value for name, value in scope["headers"] if name == _HEADER]
    if not values:
        raise IdempotencyError(
            400, "this request needs a header Idempotency-Key; send one that is new for each piece of work",
            code="idempotency-key-missing",
        )  # fmt: skip
    key = _parsed(values[0]) if len(values) == 1 else None
    if key is None:
        raise IdempotencyError(
            400, "the header Idempotency-Key is malformed; send one, of 1 to 255 visible ASCII characters",
            code="idempotency-key-malformed",
        )  # fmt: skip
    caller: object = options.caller(scope)
    if not isinstance(caller, str) or not caller:
        raise TypeError(
            f"the caller of an idempotency key is {caller!r}; return a str that is not empty, and refuse who is unknown "
            "before the middleware"
        )
    return Key.of(_SPACE, caller, key)


def encoded(
    options: Idempotency, status: int, headers: Iterable[tuple[bytes, bytes]], body: bytes, digest: bytes | None
) -> Record:
    """Return the record of a response."""
    kept = b"\n".join(name.lower() + b":" + value for name, value in headers if name.lower() in options.kept_headers)
    if options.codec is not None:
        kept, body = options.codec.encode(kept), options.codec.encode(body)
    return Record(digest, status, kept, body)


def decoded(options: Idempotency, kept: Record) -> tuple[Message, Message]:
    """Return the response of a record."""
    head, body = kept.headers or b"", kept.result or b""
    if options.codec is not None:
        head, body = options.codec.decode(head), options.codec.decode(body)
    headers: list[tuple[bytes, bytes]] = []
    for line in head.split(b"\n") if head else ():
        name, _, value = line.partition(b":")
        headers.append((name, value))
    if kept.status not in _WITHOUT_BODY:
        headers.append((b"content-length", str(len(body)).encode()))
    headers.append((b"idempotent-replayed", b"true"))
    return (
        {"type": "http.response.start", "status": kept.status, "headers": headers},
        {"type": "http.response.body", "body": body, "more_body": False},
    )


def _parsed(value: bytes) -> str | None:
    """Return the key that a header has, as a string of RFC 9651 or as it stands; None where it is none."""
    value = value.strip(b" \t")
    if (quoted := _QUOTED.fullmatch(value)) is not None:
        value = re.sub(rb"\\(.)", rb"\1", quoted[1])
    elif _BARE.fullmatch(value) is None:
        return None
    return value.decode("ascii") if len(value) <= _MAX_KEY else None


def _check_types(
    keys: object, caller: object, methods: object, headers: object, fingerprint: object, *, required: object
) -> None:
    """Tell those without a type checker what it would have told them."""
    who = "Idempotency"
    if not isinstance(keys, IdempotencyKeys):
        raise TypeError(f"{who} got {type(keys).__name__}; pass the IdempotencyKeys of your MetaData")
    for name, function in (("caller", caller), ("fingerprint", fingerprint)):
        if function is None and name == "fingerprint":
            continue
        if not callable(function) or inspect.iscoroutinefunction(function):
            raise TypeError(f"{who} has {name}={function!r}; pass a plain function of the ASGI scope")
    for name, several in (("methods", methods), ("headers", headers)):
        if isinstance(several, str):
            raise TypeError(f"{who} has {name}={several!r}; pass several, as ({several!r},)")
    if not isinstance(required, bool):
        raise TypeError(f"{who} has required={required!r}; use True or False")


def _check_numbers(keep: object, wait: object, max_response: object) -> None:
    who = "Idempotency"
    if keep is not None and (not isinstance(keep, timedelta) or keep <= timedelta(0)):
        raise ValueError(f"{who} has keep={keep!r}; use a timedelta longer than nothing")
    if isinstance(wait, bool) or not isinstance(wait, (int, float)) or not 0 <= wait < float("inf"):
        raise ValueError(f"{who} has wait={wait!r}; use a number of seconds, 0 or more")
    if isinstance(max_response, bool) or not isinstance(max_response, int) or not 0 < max_response <= _MAX_RESPONSE:
        raise ValueError(f"{who} has max_response={max_response!r}; use a number of bytes, 1 to {_MAX_RESPONSE}")
