"""`run_twice`: what is left of a function that was run in vain."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import inspect
from collections import deque
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast

from sqla_uow._attempts.arguments import Called, named, renew
from sqla_uow._attempts.attempt import Attempt
from sqla_uow._attempts.call import before_first_attempt

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

    from sqla_uow._attempts.call import Call
    from sqla_uow._unit.unit import UnitOfWork

__all__ = ["run_twice"]

P = ParamSpec("P")
R = TypeVar("R")


def run_twice(function: Callable[P, Coroutine[Any, Any, R]], /) -> Callable[P, Coroutine[Any, Any, R]]:
    """Make a function, or a test, in which every transactional function is run once in vain and once for real.

    The first run ends where COMMIT would be sent: what it wrote is rolled back and its `after_commit` hooks are dropped,
    as in an attempt that meets a conflict.  Whatever is there twice after the second run does not belong in a
    transaction: a mail, a file, an entry in a list, an object made outside (`InstanceReuseError`).  What the first run
    raises is dropped as well.  Blocks of ``begin()`` and ``attempts()`` cannot be run again; they run once.

    ::

        @run_twice
        async def test_transfer(manager): ...

        await run_twice(transfer)(1, 2, Decimal(10))

    Args:
        function: an async function that calls transactional functions, or is one.  While it runs, the transactional
            functions of all tasks are run twice.

    Raises:
        TypeError: `function` is not an ``async def`` function.

    A call raises `AssertionError` if no transactional function was run, or if one has changed an argument: a dict, a
    list, a set, a dataclass, a model of pydantic; and `InstanceReuseError` if it has used up one, such as a generator.
    """
    if not inspect.iscoroutinefunction(function):
        raise TypeError(f"run_twice() got {function!r}; pass an 'async def' function, without calling it")

    @functools.wraps(function)
    async def twice(*args: P.args, **kwargs: P.kwargs) -> R:
        names: list[str] = []

        async def in_vain(call: Call[Any], run: Callable[[], Coroutine[Any, Any, object]]) -> None:
            names.append(call.options.who)
            assert call.called is not None
            called = Called._make(call.called)
            before = list(_copies(called))
            await _in_vain(call, run)
            for name, value, as_it_was in before:
                if value != as_it_was:
                    raise AssertionError(
                        f"{call.options.who} changed its argument {name!r} in the run in vain, so another attempt "
                        "would get the changed one; let it change a copy"
                    )
            await renew(called, 1)

        before_first_attempt.append(in_vain)
        try:
            result = await function(*args, **kwargs)
        finally:
            before_first_attempt.remove(in_vain)
        if not names:
            raise AssertionError(
                f"no transactional function was run in {function.__qualname__}(); nothing was run twice"
            )
        return result

    return twice


_CHANGEABLE: tuple[type[Any], ...] = (dict, list, set, deque, bytearray)


def _copies(called: Called) -> Iterator[tuple[str, Any, Any]]:
    """Yield the arguments that can be changed, and compared with a copy."""
    for name, value in named(called.function, called.args, called.kwargs):
        kind = cast("type[object]", type(value))
        known = isinstance(value, _CHANGEABLE) or hasattr(kind, "model_dump")
        if name == "self" or not (known or dataclasses.is_dataclass(kind)):
            continue
        with contextlib.suppress(Exception):  # of whatever stands in it: that cannot be copied
            as_it_was = copy.deepcopy(value)
            if bool(as_it_was == value):
                yield name, value, as_it_was


async def _in_vain(call: Call[Any], run: Callable[[], Coroutine[Any, Any, object]]) -> None:
    attempt = Attempt(call)
    call.retries += 1  # for this run is not the last
    try:
        with contextlib.suppress(Exception):
            async with attempt as unit:
                await run()
                unit.before_commit(_stop, unit)
    finally:
        call.retries -= 1
        call.attempt, call.more = 0, True


async def _stop(unit: UnitOfWork[Any]) -> None:
    """Do all that may fail before COMMIT, and then not commit."""
    await unit.session.flush()
    if not unit._transaction.hooks.before_commit:
        raise _InVain
    unit.before_commit(_stop, unit)  # behind those that the flush has registered


class _InVain(Exception):  # noqa: N818  # nobody sees it
    pass
