"""What a transactional function or block was told, checked where it is written."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

from sqla_uow._isolation import check_level
from sqla_uow._retry import RetryPolicy
from sqla_uow.typing import IsolationLevel, Propagation

__all__ = ["Options"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The options of one call site; None leaves the choice to the manager.

    Raises:
        ValueError, TypeError: an option that cannot be, with what could.
    """

    who: str
    isolation: IsolationLevel | None = None
    read_only: bool = False
    propagation: Propagation = "required"
    retries: int | None = None
    timeout: float | None = None
    retry: RetryPolicy | None = None
    retry_on: Callable[[BaseException], bool] | None = None

    def __post_init__(self) -> None:
        check_level("any", self.isolation, who=self.who)
        if self.propagation not in get_args(Propagation):
            known = ", ".join(map(repr, get_args(Propagation)))
            raise ValueError(f"{self.who} has propagation={self.propagation!r}, which is unknown; use one of {known}")
        if not isinstance(self.read_only, bool):
            raise TypeError(f"{self.who} has read_only={self.read_only!r}; use True or False")
        check_retries(self.retries, self.who)
        check_timeout(self.timeout, self.who)
        if self.retry is not None and not isinstance(self.retry, RetryPolicy):
            raise TypeError(f"{self.who} has retry={self.retry!r}; pass a RetryPolicy, and the number as retries=")
        if self.retry_on is not None and not callable(self.retry_on):
            raise TypeError(f"{self.who} has retry_on={self.retry_on!r}; pass a function of the exception that returns a bool")


def check_retries(retries: object, who: str) -> None:
    """Refuse what is no number of retries."""
    if retries is None:
        return
    if isinstance(retries, bool) or not isinstance(retries, int):
        raise TypeError(f"{who} has retries={retries!r}; use an int, where 5 means up to six runs")
    if retries < 0:
        raise ValueError(f"{who} has retries={retries!r}; use 0 for a single run")


def check_timeout(timeout: object, who: str) -> None:
    """Refuse what is no number of seconds."""
    if timeout is None:
        return
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)):
        raise TypeError(f"{who} has timeout={timeout!r}; use seconds, or None for no deadline")
    if not (timeout > 0 and math.isfinite(timeout)):
        raise ValueError(f"{who} has timeout={timeout!r}; use seconds above 0, or None for no deadline")
