"""A function that runs once for each key, and whose result is kept with it."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, TypeVar, cast

from sqla_uow._idempotency.claim import Record
from sqla_uow._idempotency.table import Key

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

__all__ = ["Held", "once"]

P = ParamSpec("P")
R = TypeVar("R")


class Held(Protocol):
    """A key that is this unit's."""

    async def store(self, kept: Record, /) -> None:
        """Note what came of the work."""
        ...

    def failed(self, error: BaseException, /) -> None:
        """Let the record not be committed."""
        ...


def once(
    function: Callable[P, Coroutine[Any, Any, R]],
    claim: Callable[[Key, bytes | None], Coroutine[Any, Any, Record | Held]],
    *,
    space: str,
    key: Callable[P, str],
    fingerprint: Callable[P, bytes] | None,
) -> Callable[P, Coroutine[Any, Any, R]]:
    """Return a function that runs `function` where the claim of its key succeeds, and else returns what is kept.

    Raises:
        TypeError: it is no ``async def`` function.
    """
    given: object = function
    name = getattr(given, "__qualname__", repr(given)).rpartition("<locals>.")[2]
    if not inspect.iscoroutinefunction(given):
        raise TypeError(f"once() got {name}, which is not an 'async def' function; put it below @transactional")

    @functools.wraps(function)
    async def called_once(*args: P.args, **kwargs: P.kwargs) -> R:
        text: object = key(*args, **kwargs)
        if not isinstance(text, str) or not text:
            raise TypeError(
                f"the key of {name}() is {type(text).__name__} {text!r:.20}; return a str that is not empty"
            )
        payload = b"" if fingerprint is None else fingerprint(*args, **kwargs)
        digest = hashlib.sha256(payload).digest() if payload else None
        claimed = await claim(Key.of(space, text), digest)
        if isinstance(claimed, Record):
            return cast("R", _read(claimed.result))
        try:
            result = _written(await function(*args, **kwargs), name)
        except BaseException as error:
            claimed.failed(error)
            raise
        await claimed.store(Record(digest, result=result))
        return cast("R", _read(result))

    return called_once


def _read(result: bytes | None) -> Any:
    """Return what was kept; the first caller gets it so too, so that a difference is found on the first day."""
    return None if result is None else json.loads(result)


def _written(value: object, name: str) -> bytes:
    try:
        return json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":")).encode()
    except (TypeError, ValueError) as error:
        raise type(error)(
            f"{name}() returned what is no JSON ({error}); return numbers, texts, lists and dicts of them"
        ) from error
