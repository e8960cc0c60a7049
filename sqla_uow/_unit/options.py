"""The options of a transactional function or block, checked where they are written."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self, get_args

from sqla_uow._databases.levels import check_exists
from sqla_uow._retry.policy import RetryPolicy
from sqla_uow._retry.predicates import check_sync
from sqla_uow.typing import IsolationLevel, Propagation

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqla_uow._settings.sources import Layer

__all__ = ["LateName", "Options", "block_options", "check_name", "check_policy", "check_retries", "check_timeout"]


# Known by identity, not by value: one function's options are not another's, however alike.
@dataclass(frozen=True, kw_only=True, eq=False)
class Options:
    """The options of one call site; None leaves the choice to the manager.

    Raises:
        ValueError, TypeError: an option cannot work; the message says what would.
    """

    who: str
    isolation: IsolationLevel | None = None
    read_only: bool = False
    propagation: Propagation = "required"
    retries: int | None = None
    timeout: float | None = None
    retry: RetryPolicy | None = None
    retry_on: Callable[[BaseException], bool] | None = None
    settings: Layer | None = None

    def named(self, name: Callable[[], str]) -> Options:
        """Return the same under a name that is found later; what they allow has been checked already."""
        return self._with(who=LateName(name))

    def telling(self, settings: Layer | None) -> Options:
        """Return the same with settings, which have been checked already."""
        return self if settings is None else self._with(settings=settings)

    def _with(self, **changes: Any) -> Options:
        options = Options.__new__(Options)  # copy.copy() costs ten times as much, and each atomic request has a name
        options.__dict__.update(self.__dict__, **changes)  # frozen for everybody else
        return options

    def __post_init__(self) -> None:
        check_exists(self.isolation, who=self.who)
        if self.propagation not in get_args(Propagation):
            known = ", ".join(map(repr, get_args(Propagation)))
            raise ValueError(f"{self.who} has propagation={self.propagation!r}, which is unknown; use one of {known}")
        check_bool(self.read_only, self.who)
        check_retries(self.retries, self.who)
        check_timeout(self.timeout, self.who)
        check_policy(self.retry, self.who)
        if self.retry_on is not None:
            if not callable(self.retry_on):
                raise TypeError(
                    f"{self.who} has retry_on={self.retry_on!r}; pass a function of the exception that returns a bool"
                )
            check_sync(self.retry_on, f"retry_on of {self.who}")


class LateName(str):
    """A name that is found when it is needed: a request learns its route only while it is handled.

    A string, so that it can stand wherever the name of a function does; what is kept for longer takes ``str()`` of it.
    """

    __slots__ = ("_find",)
    _find: Callable[[], str]

    def __new__(cls, find: Callable[[], str]) -> Self:
        """Make one of the function that finds it."""
        name = super().__new__(cls, "attempts()")
        name._find = find
        return name

    def __str__(self) -> str:
        return self._find()

    def __format__(self, spec: str, /) -> str:
        return format(self._find(), spec)


def block_options(**options: Any) -> Options:
    """Return the options of a block; equal options are checked only once, because a check costs 4 us."""
    try:
        return _checked(**options)
    except TypeError:  # what cannot be hashed cannot be an option either, and is refused
        return Options(**options)


_checked = functools.lru_cache(maxsize=128, typed=True)(Options)


# For callers without a type checker; so the arguments are `object` on purpose.


def check_name(name: object, who: str) -> None:
    """Refuse what is not a name."""
    if not isinstance(name, str) or not name:
        raise TypeError(f"{who} got {name!r}; use a string that is not empty")


def check_bool(read_only: object, who: str) -> None:
    """Refuse what is neither True nor False: a mode passed by mistake would be taken for True."""
    if not isinstance(read_only, bool):
        raise TypeError(f"{who} has read_only={read_only!r}; use True or False")


def check_policy(policy: object, who: str, *, optional: bool = True) -> None:
    """Refuse what is not a policy."""
    if not isinstance(policy, RetryPolicy) and not (optional and policy is None):
        raise TypeError(f"{who} has retry={policy!r}; pass a RetryPolicy, and the number as retries=")


def check_retries(retries: object, who: str, *, optional: bool = True) -> None:
    """Refuse what is not a number of retries."""
    if retries is None and optional:
        return
    if isinstance(retries, bool) or not isinstance(retries, int):
        raise TypeError(f"{who} has retries={retries!r}; use an int, where 5 means up to six runs")
    if retries < 0:
        raise ValueError(f"{who} has retries={retries!r}; use 0 for a single run")


def check_timeout(timeout: object, who: str) -> None:
    """Refuse what is not a number of seconds."""
    if timeout is None:
        return
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)):
        raise TypeError(f"{who} has timeout={timeout!r}; use seconds, or None for no deadline")
    if not (timeout > 0 and math.isfinite(timeout)):
        raise ValueError(f"{who} has timeout={timeout!r}; use seconds above 0, or None for no deadline")
