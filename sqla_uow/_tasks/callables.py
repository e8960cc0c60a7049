"""What runs when something is called: a function, a `functools.partial` of one, or an object with ``__call__``."""

from __future__ import annotations

import functools
from typing import Any, cast

__all__ = ["called"]


def called(function: Any) -> tuple[Any, Any]:
    """Return what a partial stands for, and the ``__call__`` of its class; either may be the one that is async."""
    inner: Any = function
    while isinstance(inner, functools.partial):
        inner = inner.func
    kind = cast("type[object]", type(inner))
    call = getattr(kind, "__call__", None)  # noqa: B004  # what an object does when it is called, not whether it can be
    return inner, call
