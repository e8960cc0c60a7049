"""What the fixtures are to a type checker."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from contextlib import AbstractAsyncContextManager, AbstractContextManager

    from sqla_uow import IsolationLevel, UnitOfWorkManager
    from sqla_uow._testing.captures import CapturedHook
    from sqla_uow._testing.faults import Fault, FaultPlan, FaultPoint
    from sqla_uow._testing.queries import Queries

__all__ = [
    "AssertNoLeaks",
    "AssertNumQueries",
    "CaptureAfterCommit",
    "CountQueries",
    "Faults",
    "RolledBack",
    "RunTwice",
]

P = ParamSpec("P")
R = TypeVar("R")


class RolledBack(Protocol):
    """The fixture ``uow_rolled_back``."""

    def __call__(
        self, *, isolation: IsolationLevel | None = ...
    ) -> AbstractAsyncContextManager[UnitOfWorkManager[Any]]: ...


class CaptureAfterCommit(Protocol):
    """The fixture ``uow_capture_after_commit``."""

    def __call__(self, *, execute: bool = ...) -> AbstractContextManager[list[CapturedHook]]: ...


class CountQueries(Protocol):
    """The fixture ``uow_count_queries``."""

    def __call__(self) -> AbstractContextManager[Queries]: ...


class AssertNumQueries(Protocol):
    """The fixtures ``uow_assert_num_queries`` and ``uow_assert_max_num_queries``."""

    def __call__(self, number: int, /) -> AbstractContextManager[Queries]: ...


class AssertNoLeaks(Protocol):
    """The fixture ``uow_assert_no_leaks``."""

    def __call__(self) -> AbstractContextManager[None]: ...


class Faults(Protocol):
    """The fixture ``uow_faults``."""

    def __call__(
        self, fault: Fault, /, *, at: FaultPoint = ..., nth: int = ..., times: int = ..., seconds: float = ...
    ) -> FaultPlan: ...


class RunTwice(Protocol):
    """The fixture ``uow_run_twice``."""

    def __call__(self, function: Callable[P, Coroutine[Any, Any, R]], /) -> Callable[P, Coroutine[Any, Any, R]]: ...
