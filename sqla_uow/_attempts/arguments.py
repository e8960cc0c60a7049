"""Which arguments an attempt uses up, and how the next one gets them back.

All attempts get the same arguments from the caller.  A file that was read is rewound.  A generator cannot be rewound, and the
next attempt would take it for an empty one, so there is no next attempt.  Objects of a web framework are recognised by
their attributes, because no framework is imported here.
"""

from __future__ import annotations

import dataclasses
import inspect
import io
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from enum import Enum
from itertools import islice
from types import FunctionType, MethodType
from typing import Any, NamedTuple, TypeGuard, cast

from sqla_uow.errors import InstanceReuseError

__all__ = ["NOTHING", "Called", "find_used", "keep", "leaves_all", "named", "renew"]


class Called(NamedTuple):
    """A function and its arguments, with what restores those that an attempt may use up."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    kept: Mapping[int, Restore]


Restore = Callable[[], Awaitable[None]]
NOTHING: Mapping[int, Restore] = {}

_CONTAINERS = (list, tuple, dict, set, frozenset, deque)
_FEW = 16
"""How many elements of a container are looked at before the first attempt; of a longer container only the first one is."""
_DEEP = 3
"""How many levels deep an argument is looked into before another attempt."""
_MARKS = ("seek", "add_task", "set_cookie", "form")  # a file; Starlette's background tasks, response, request
_NO_HOLDERS = (type, FunctionType, MethodType, Enum)

_plain: set[type] = set()
"""Types of arguments seen so far that no attempt uses up."""
_unmarked: set[type] = set()
"""Types seen so far without any of the marks; an object of such a type may still hold one with a mark."""
_holders: dict[type, tuple[str, ...] | None] = {}
"""Types of objects that hold others.  Records (dataclasses, models of pydantic) come with the names of their fields."""
_MANY = 1000


def leaves_all(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Say whether no attempt can use up any of these arguments; for most calls nothing else is asked."""
    for value in args:  # all() takes three times as long
        if type(value) not in _plain:
            return False
    if kwargs:
        for value in kwargs.values():
            if type(value) not in _plain:
                return False
    return True


def find_used(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Return what an attempt may use up and what can be put back: arguments, and what they hold one level deep."""
    found: list[Any] = []
    for value in (*args, *kwargs.values()):
        if _is_marked(value):
            found.append(value)
        elif isinstance(value, _CONTAINERS):
            found.extend(element for element in _first(value) if _is_marked(element))
        elif _is_holder(value):
            for held in _held(value):
                several = _first(held) if isinstance(held, _CONTAINERS) else (held,)
                found.extend(one for one in several if _is_marked(one))
        else:
            _remember(_plain, value)
    return found


def _is_marked(value: object) -> bool:
    cls: Any = type(value)
    if cls in _unmarked:
        return False
    # tempfile's wrapper leaves all to the file in it.
    if cls.__name__ == "_TemporaryFileWrapper" or any(hasattr(cls, mark) for mark in _MARKS):
        return True
    _remember(_unmarked, value)
    return False


def _remember(types: set[type], value: object) -> None:
    if len(types) >= _MANY:  # classes may be made over and over
        types.clear()
    types.add(type(value))


def _is_holder(value: object) -> bool:
    """Say whether the attributes of an object may be looked into; those of an ORM object would load."""
    cls: Any = type(value)
    if cls in _holders:
        return True
    if isinstance(value, _NO_HOLDERS) or hasattr(cls, "_sa_class_manager"):
        return False
    fields: Any = getattr(cls, "__pydantic_fields__", None)
    if dataclasses.is_dataclass(value):
        fields = [field.name for field in dataclasses.fields(value)]
    if fields is None and not cls.__dictoffset__:
        return False
    if len(_holders) >= _MANY:
        _holders.clear()
    _holders[cls] = None if fields is None else tuple(fields)
    return True


def _is_list(value: object) -> TypeGuard[list[Any]]:
    return isinstance(value, list)


def _is_dict(value: object) -> TypeGuard[dict[Any, Any]]:
    return isinstance(value, dict)


def _held(holder: Any, *, record: bool = True) -> Iterable[Any]:
    """Return what an object holds; if it is not a record, only what Starlette has made for one request.

    A service outlives the call, and the other things it holds belong to all its calls.
    """
    fields = _holders[type(holder)] if record else None
    if fields is not None:
        return [getattr(holder, name, None) for name in fields]
    try:
        held: tuple[Any, ...] = tuple(holder.__dict__.values())
    except Exception:  # a proxy has the attributes of another object, or none at all
        return ()
    return [one for one in held if _is_marked(one) and _is_of_starlette(one)]


def _is_of_starlette(value: object) -> bool:
    return any(cls.__module__.partition(".")[0] == "starlette" for cls in type(value).__mro__)


def _first(container: Any) -> Iterable[Any]:
    elements = _elements(container)
    return elements if len(container) <= _FEW else islice(elements, 1)


def _elements(container: Any) -> Iterable[Any]:
    return container.values() if _is_dict(container) else container


async def keep(values: Iterable[Any]) -> Mapping[int, Restore]:
    """Return for each of these arguments what puts it back to where it is now."""
    kept: dict[int, Restore] = {}
    for value in values:
        restore = _of_web(value) or await _of_file(value)
        if restore is not None:
            kept[id(value)] = restore
    return kept


def _of_web(value: Any) -> Restore | None:
    tasks, headers = getattr(value, "tasks", None), getattr(value, "raw_headers", None)
    if hasattr(value, "add_task") and _is_list(tasks):
        return _list_as_it_is(tasks)
    if hasattr(value, "set_cookie") and _is_list(headers):
        as_it_was, status = _list_as_it_is(headers), getattr(value, "status_code", None)

        async def restore() -> None:
            await as_it_was()
            value.status_code = status

        return restore
    if hasattr(value, "form") and hasattr(value, "_form"):  # a request: what it has parsed it keeps

        async def rewind() -> None:
            form = getattr(value, "_form", None)
            for _, upload in form.multi_items() if form is not None else ():
                if hasattr(upload, "file"):
                    upload.file.seek(0)

        return rewind
    return None


def _list_as_it_is(list_: list[Any]) -> Restore:
    as_it_was = list(list_)

    async def restore() -> None:
        list_[:] = as_it_was

    return restore


async def _of_file(value: Any) -> Restore | None:
    file: Any = value if hasattr(value, "tell") else getattr(value, "file", None)  # an upload's, in memory or on disk
    try:
        if not await _answer(file.seekable()) or not await _answer(file.readable()):
            return None
        position = await _answer(file.tell())
        size = await _size(file, position) if isinstance(file, io.BytesIO | io.StringIO) else None
    except (AttributeError, TypeError, OSError, ValueError):
        return None  # not a file, or it is closed, or in the middle of a line

    async def restore() -> None:
        await _answer(file.seek(position))
        if size is not None and await _size(file, position) > size:
            file.truncate(size)  # a buffer that was written to; to a file on disk others may have written

    return restore


async def _size(file: Any, position: int) -> int:
    size: int = file.seek(0, io.SEEK_END)
    file.seek(position)
    return size


async def _answer(value: Any) -> Any:
    return await value if inspect.isawaitable(value) else value


async def renew(called: Called, attempt: int) -> None:
    """Put the arguments back to where they were before the first attempt.

    Raises:
        InstanceReuseError: one cannot be put back, and a part of it would be missing.
    """
    for name, value, verb in _inspected(called):
        restore = called.kept.get(id(value))
        if restore is None:
            what = _used_up(value)
            if what is not None:
                raise _refusal(called, name, f"{verb} {what}, used up by attempt {attempt}")
            continue
        try:
            await restore()
        except Exception as error:  # the file may be closed, or gone
            trouble = type(error).__name__
            raise _refusal(
                called, name, f"{verb} a file that attempt {attempt} has read and that cannot be rewound ({trouble})"
            ) from error


def _refusal(called: Called, name: str, fact: str) -> InstanceReuseError:
    who = getattr(called.function, "__qualname__", repr(called.function)).rpartition("<locals>.")[2]
    return InstanceReuseError(
        f"argument {name!r} of {who}() {fact}, and another attempt would miss what it held; pass a list, or read it before "
        "the call"
    )


def _inspected(called: Called) -> Iterator[tuple[str, Any, str]]:
    """Yield each argument, and what it holds a few levels deep, with the argument's name and "is" or "holds"."""
    for name, value in named(called.function, called.args, called.kwargs):
        yield name, value, "is"
        # Not `self`: a service may live on, and count its calls.
        yield from ((name, one, "holds") for one in _inside(value, record=name != "self"))


def _inside(value: Any, *, record: bool = True, levels: int = _DEEP) -> Iterator[Any]:
    if levels == 0 or _is_marked(value):
        return
    if isinstance(value, _CONTAINERS):
        held = _elements(value)
    elif _is_holder(value):
        held = _held(value, record=record)
    else:
        return
    for one in held:
        yield one
        yield from _inside(one, levels=levels - 1)


def named(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the names of parameters and their values; ``*args`` one by one."""
    parameters = inspect.signature(function).parameters.values()
    names = [one.name for one in parameters if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
    rest = next((one.name for one in parameters if one.kind is one.VAR_POSITIONAL), "")
    for index, value in enumerate(args):
        yield names[index] if index < len(names) else rest, value
    yield from kwargs.items()


def _used_up(value: Any) -> str | None:
    """Describe a value that an attempt may have used up in part; None if nothing can be missing from it."""
    cls = cast("type[object]", type(value))
    wrapper = cls.__name__ == "_TemporaryFileWrapper"
    if wrapper or (hasattr(cls, "read") and (hasattr(cls, "readline") or hasattr(cls, "seek"))):
        if (wrapper or isinstance(value, io.IOBase)) and not value.closed and not value.readable():
            return None  # it can only be written to, and others may write to it as well
        return f"a file that cannot be rewound ({cls.__name__})"
    if hasattr(cls, "__next__") or hasattr(cls, "__anext__"):
        return None if _is_fresh(value) else f"an iterator ({cls.__name__})"
    return None


def _is_fresh(iterator: Any) -> bool:
    """Say whether a generator has not begun yet; other iterators do not tell."""
    for frame, suspended in (("gi_frame", "gi_suspended"), ("ag_frame", "ag_suspended")):
        if getattr(iterator, frame, None) is not None:
            return not getattr(iterator, suspended, True)  # Python 3.11 does not tell for async generators
    return False
