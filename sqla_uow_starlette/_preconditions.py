"""HTTP's conditional requests on a version column: the ETag of an object, If-Match and If-None-Match (RFC 9110, 13)."""

from __future__ import annotations

import base64
import hashlib
import re
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

from sqlalchemy import inspect
from starlette.exceptions import HTTPException

from sqla_uow.mixins import Versioned, VersionedByTimestamp, VersionedByUUID, VersionedByXmin, expect_version

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from starlette.requests import Request

__all__ = ["AnyVersioned", "PreconditionError", "check_preconditions", "etag"]

AnyVersioned: TypeAlias = Versioned | VersionedByUUID | VersionedByTimestamp | VersionedByXmin

_READING: Final = frozenset({"GET", "HEAD"})
_SAFE: Final = _READING | {"OPTIONS", "TRACE"}
# RFC 9110, 15.4.5: a 304 has to have what the 200 would have of these, and caches renew theirs by it.
_OF_A_304: Final = frozenset({"cache-control", "content-location", "date", "expires", "vary"})
# RFC 9110, 5.6.1 and 8.8.3.  Possessive, so that a long run of spaces before something else is read once, not squared.
_ELEMENT: Final = re.compile(r'[ \t]*+(?:(W/)?("[\x21\x23-\x7e\x80-\xff]*+"))?+[ \t]*+(?:,|\Z)')


class PreconditionError(HTTPException):
    """A conditional request is not carried out; Starlette and FastAPI turn this error into a response by themselves.

    Attributes:
        status_code: 304, 400, 412 or 428.
        detail: a sentence for the client.
        headers: for the response.
        code: the same for programs: ``"not-modified"``, ``"malformed-precondition"``, ``"precondition-failed"`` or
            ``"precondition-required"``.
    """

    def __init__(self, status_code: int, detail: str, *, code: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(status_code, detail, headers)
        self.code = code


def etag(instance: AnyVersioned, /) -> str:
    """Return the entity tag of an object: strong, opaque, and made of its type, its key and its version.

    Call it after the flush or the commit that wrote the object.  The tag is right only for a response that shows this
    one object: a change of another object does not change it, unless that object is a part of this one
    (``__version_follows__``).

    Args:
        instance: an object with a version mixin.

    Returns:
        The value of an ETag header, in its quotes.

    Raises:
        TypeError: the object has no version mixin.
        ValueError: the object has no row yet, was changed since, or its version is not loaded.

    Example:
        ``JSONResponse(body, headers={"ETag": etag(order)})``
    """
    state = inspect(_versioned(instance, "etag()"))
    if state.modified and state.key is not None:
        raise ValueError(
            f"{type(instance).__name__}{state.key[1]!r} has changes that are not written, and its version does not count "
            "them; take its etag() after the flush or the commit"
        )
    return _tag_of(instance)


def check_preconditions(
    request: Request,
    instance: AnyVersioned | None,
    /,
    *,
    required: bool = False,
    headers: Mapping[str, str] | None = None,
) -> None:
    """Carry on only if the request's If-Match and If-None-Match hold for an object (RFC 9110, 13.2.2).

    Call it in the unit that writes, when the object is loaded and nothing is changed yet.  An If-Match that holds
    becomes `sqla_uow.mixins.expect_version`: the UPDATE's WHERE compares the version once more, so that only one of
    several concurrent requests with the same tag succeeds.  The others end in `StaleVersionError`, which is never
    retried and which `exception_handlers` answers with 412.

    Dates (If-Unmodified-Since, If-Modified-Since) are ignored, as RFC 9110 asks where there is no Last-Modified.

    Args:
        request: its headers and its method are looked at.
        instance: an object with a version mixin; None if the resource does not exist, so that a PUT with
            ``If-None-Match: *`` may create it.
        required: answer 428 if the request does not say what it has seen: for an object it needs If-Match; if there is
            no object, either header will do.
        headers: the headers of the response that the request gets otherwise.  A 304 has the ETag and, of these headers,
            only Cache-Control, Vary, Expires, Date and Content-Location (RFC 9110, 15.4.5).

    Raises:
        PreconditionError: 412 if a header does not hold, or 304 if that is If-None-Match of a GET or HEAD; 428 if a
            required header is missing; 400 if a header is not a list of entity tags.
        sqla_uow.errors.ReadOnlyError: the request writes, but the object is in a read-only unit or a read session.
        sqla_uow.errors.NoUnitError: the request writes, but the object is in no open unit.
        TypeError: the object has no version mixin.
        ValueError: it has no row yet, or its version is not loaded.
    """
    current = None if instance is None else _tag_of(_versioned(instance, "check_preconditions()"))
    if_match, if_none_match = _Condition.of(request, "If-Match"), _Condition.of(request, "If-None-Match")
    if if_match is not None and not if_match.holds_strongly(current):
        raise _failed(
            "If-Match", "the resource has changed since, or is gone" if current else "there is no such resource"
        )
    if if_none_match is not None and if_none_match.holds_weakly(current):
        if current is not None and request.method in _READING:
            kept = {name: value for name, value in (headers or {}).items() if name.lower() in _OF_A_304}
            raise PreconditionError(304, "not modified", code="not-modified", headers=kept | {"ETag": current})
        raise _failed("If-None-Match", "the resource is there")
    if required and if_match is None and (instance is not None or if_none_match is None):
        raise _missing(instance)
    if instance is not None and if_match is not None and not if_match.any and request.method not in _SAFE:
        expect_version(instance, _version_of(instance))


def _failed(header: str, fact: str) -> PreconditionError:
    return PreconditionError(412, f"{header} does not hold: {fact}; get it again", code="precondition-failed")


def _missing(instance: object) -> PreconditionError:
    remedy = "If-None-Match: *" if instance is None else "If-Match and the ETag that you have seen"
    return PreconditionError(428, f"this request must be conditional; send {remedy}", code="precondition-required")


# -- the object's side


def _versioned(instance: AnyVersioned, what: str) -> AnyVersioned:
    if not isinstance(instance, AnyVersioned):
        raise TypeError(f"{what} got a {type(instance).__name__}, which has no version; give its model a mixin")
    return instance


def _version_of(instance: AnyVersioned) -> Any:
    """Return the version that is in memory; asking the database for it would need an await."""
    state = inspect(instance)
    name = type(instance).__version_attr__
    if state.key is None:
        raise ValueError(f"{type(instance).__name__} has no row yet, and so no version; flush it first")
    if name in state.unloaded:
        raise ValueError(
            f"the version of {type(instance).__name__}{state.key[1]!r} is not loaded, or its unit was rolled back; get the "
            "object again"
        )
    return getattr(instance, name)


def _tag_of(instance: AnyVersioned) -> str:
    version = _version_of(instance)
    identity: Any = inspect(instance).key
    model, key = identity[:2]
    facts = (model.__module__, model.__qualname__, *map(str, key), str(version))
    digest = hashlib.sha256(repr(facts).encode()).digest()
    return f'"{base64.urlsafe_b64encode(digest[:18]).decode()}"'


# -- the client's side


class _Condition(NamedTuple):
    """One of the two headers.

    Attributes:
        name: the header's.
        value: all its lines, joined.
        any: it is ``*``.
    """

    name: str
    value: str
    any: bool

    @classmethod
    def of(cls, request: Request, name: str) -> _Condition | None:
        lines = request.headers.getlist(name)
        if not lines:
            return None
        value = ",".join(lines)
        return cls(name, value, value.strip(" \t") == "*")

    def holds_strongly(self, current: str | None) -> bool:
        """Say whether one of the tags is the current one, neither of them weak (RFC 9110, 8.8.3.2)."""
        found = [not weak and tag == current for weak, tag in self._tags()]
        return current is not None and (self.any or any(found))

    def holds_weakly(self, current: str | None) -> bool:
        """Say whether one of the tags is the current one, weak or not."""
        found = [tag == current for _, tag in self._tags()]
        return current is not None and (self.any or any(found))

    def _tags(self) -> Iterator[tuple[bool, str]]:
        """Read the whole list, so that what is malformed is so wherever it stands.

        Raises:
            PreconditionError: 400.
        """
        position = 0
        while not self.any and position < len(self.value):
            element = _ELEMENT.match(self.value, position)
            if element is None:
                raise PreconditionError(
                    400,
                    f'{self.name} is malformed at character {position + 1}; send * or entity tags in their quotes: "a", "b"',
                    code="malformed-precondition",
                )
            position = element.end()
            if element[2] is not None:
                yield element[1] is not None, element[2]
