"""What may stand in a request: checked here, and described for the OpenAPI document from the same lines."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from examples.bank.models import LONGEST
from examples.bank.problems import ProblemError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from starlette.requests import Request

__all__ = [
    "AFTER",
    "AMOUNT",
    "CREDIT",
    "LIMIT",
    "NAME",
    "NUMBER",
    "ON_DUTY",
    "REFERENCE",
    "Flag",
    "Text",
    "Whole",
    "body",
    "number",
    "query",
]

LARGEST_BODY = 16 * 1024
"""Bytes.  What is asked for needs a few hundred."""
_PRINTABLE = r"^[^\u0000-\u001f\u007f-\u009f]*$"  # PostgreSQL stores no NUL
_HALF_A_PAIR = re.compile("[\ud800-\udfff]")  # JSON can write one, and no encoding has it


class Flag(NamedTuple):
    """True or false."""

    default: bool | None = None

    def read(self, value: Any) -> bool:
        """Return it.

        Raises:
            ValueError: it is neither.
        """
        if not isinstance(value, bool):
            raise ValueError("must be true or false")  # noqa: TRY004  # as the other fields do
        return value

    def schema(self) -> dict[str, Any]:
        """Describe it as a JSON schema."""
        return {"type": "boolean"}


class Whole(NamedTuple):
    """A whole number."""

    least: int
    most: int
    default: int | None = None

    def read(self, value: Any) -> int:
        """Return the number.

        Raises:
            ValueError: it is none, or too small, or too large.
        """
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # for JSON, 1.0 is the number 1
        if type(value) is not int or not self.least <= value <= self.most:  # not a bool, which is an int in Python
            raise ValueError(f"must be a whole number from {self.least} to {self.most}")
        return value

    def schema(self) -> dict[str, Any]:
        """Describe it as a JSON schema."""
        default = {} if self.default is None else {"default": self.default}
        return {"type": "integer", "minimum": self.least, "maximum": self.most} | default


class Text(NamedTuple):
    """A line of text."""

    shortest: int
    longest: int
    default: str | None = None

    def read(self, value: Any) -> str:
        """Return the text.

        Raises:
            ValueError: it is none, too short, too long, or has characters that are not to be seen.
        """
        fits = isinstance(value, str) and self.shortest <= len(value) <= self.longest
        if not fits or re.fullmatch(_PRINTABLE, value) is None or _HALF_A_PAIR.search(value):
            raise ValueError(f"must be a text of {self.shortest} to {self.longest} printable characters")
        return str(value)

    def schema(self) -> dict[str, Any]:
        """Describe it as a JSON schema."""
        default = {} if self.default is None else {"default": self.default}
        return {
            "type": "string",
            "minLength": self.shortest,
            "maxLength": self.longest,
            "pattern": _PRINTABLE,
        } | default


NUMBER = Whole(1, 2**31 - 1)  # of an account: an INTEGER
AMOUNT = Whole(1, 10**9)  # cents
CREDIT = Whole(0, 10**9, 0)
AFTER = Whole(0, NUMBER.most, 0)
LIMIT = Whole(1, 500, 100)
NAME = Text(1, LONGEST)
REFERENCE = Text(0, LONGEST, "")
ON_DUTY = Flag()


def number(request: Request) -> int:
    """Return the number in the path.

    Raises:
        ProblemError: 404, it cannot be the number of an account or a clerk.
    """
    word = request.path_params["number"]
    try:
        return NUMBER.read(_digits(word))
    except ValueError as error:
        raise ProblemError(404, "the number " + str(error)) from None


def query(request: Request, name: str, field: Whole) -> int:
    """Return a number from the query.

    Raises:
        ProblemError: 422, it is no such number.
    """
    word = request.query_params.get(name)
    if word is None and field.default is not None:
        return field.default
    try:
        return field.read(_digits(word))
    except ValueError as error:
        raise ProblemError(422, f"{name} {error}") from None


def _digits(word: str | None) -> int | None:
    """Return what a URL may say of a number: int() alone takes spaces, underscores and the digits of every script."""
    return int(word) if word is not None and re.fullmatch("[0-9]{1,10}", word) else None


async def body(request: Request, fields: Mapping[str, Flag | Text | Whole]) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        request: whose body it is.
        fields: what it consists of; those with a default may be missing.

    Raises:
        ProblemError: 415, 413, 400 or 422: it is not said to be JSON, is too long, is not JSON, or has something else
            in it than asked for.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ProblemError(415, "the body must be JSON, and its content-type application/json")
    try:
        content = json.loads(await _bytes(request), parse_constant=_no_number)
    except (ValueError, RecursionError):  # also what is not UTF-8, and a number of thousands of digits
        raise ProblemError(400, "the body is not JSON") from None
    if not isinstance(content, dict):
        raise ProblemError(422, "the body must be a JSON object")
    missing = [name for name, field in fields.items() if field.default is None and name not in content]
    if missing or content.keys() - fields.keys():
        raise ProblemError(422, f"the body must have {' and '.join(fields)}, and nothing else")
    return {name: _read(name, field, content) for name, field in fields.items()}


def _read(name: str, field: Flag | Text | Whole, content: dict[str, Any]) -> int | str:
    try:
        return field.read(content.get(name, field.default))
    except ValueError as error:
        raise ProblemError(422, f"{name} {error}") from None


async def _bytes(request: Request) -> bytes:
    """Read the body; what its sender says of its length is not asked."""
    content = b""
    async for chunk in request.stream():
        content += chunk
        if len(content) > LARGEST_BODY:
            raise ProblemError(413, f"the body has more than {LARGEST_BODY} bytes")
    return content


def _no_number(word: str) -> NoReturn:
    raise ValueError(f"{word} is not JSON")
