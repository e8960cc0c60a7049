"""Functions of the user that must return a plain answer: a coroutine in its place would always count as true."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from sqla_uow._tasks.callables import called

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["ask", "check_sync"]


def check_sync(function: Any, what: str) -> None:
    """Refuse a function that cannot answer by itself: an async one, or a generator.

    Args:
        function: anything that can be called.
        what: whose option it is, and its name.

    Raises:
        TypeError: it is one.
    """
    several = called(function)
    if any(map(_answers_late, several)):
        raise TypeError(
            f"{what} is given {_name(several[0])}, which is async or a generator: its answer would always count as true; "
            "pass a plain function, and look up beforehand what it has to know"
        )


def _answers_late(function: object) -> bool:
    return (
        inspect.iscoroutinefunction(function)
        or inspect.isasyncgenfunction(function)
        or inspect.isgeneratorfunction(function)
    )


def _name(function: Any) -> str:
    return str(getattr(function, "__qualname__", type(function).__qualname__))


def ask(function: Callable[..., Any], what: str, *args: object) -> bool:
    """Call a predicate.

    Raises:
        TypeError: its answer is a coroutine, as that of a lambda around an async function.
    """
    answer = function(*args)
    if inspect.isawaitable(answer):
        if inspect.iscoroutine(answer):
            answer.close()  # nobody will await it
        raise TypeError(
            f"{what} returned a {type(answer).__name__}, which would always count as true; "
            "let it return True or False, and look up beforehand what it has to know"
        )
    return bool(answer)
