"""The functions of `sqla_uow.testing` for the database that a test uses now."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from contextlib import AbstractContextManager

    from sqla_uow import IsolationLevel, UnitOfWorkManager
    from sqla_uow._testing.faults import Fault, FaultPlan, FaultPoint
    from sqla_uow._testing.queries import Queries

__all__ = ["Kit"]

# What it stands on is imported where it is used: pytest loads this module in every project that has sqla-uow.


class Kit:
    """What the fixtures of one test share: its manager, and in `rolled_back` the one that takes its place.

    Args:
        manager: of the test.
    """

    def __init__(self, manager: UnitOfWorkManager[Any]) -> None:
        self._manager = manager

    @asynccontextmanager
    async def rolled_back(self, *, isolation: IsolationLevel | None = None) -> AsyncGenerator[UnitOfWorkManager[Any]]:
        """Undo what is done in the block; see `sqla_uow.testing.rolled_back`."""
        from sqla_uow._testing.rolled_back import rolled_back

        async with rolled_back(self._manager, isolation=isolation) as inside:
            outside, self._manager = self._manager, inside
            try:
                yield inside
            finally:
                self._manager = outside

    def count_queries(self) -> AbstractContextManager[Queries]:
        """See `sqla_uow.testing.count_queries`."""
        from sqla_uow._testing.queries import count_queries

        return count_queries(self._manager)

    def assert_num_queries(self, number: int, /) -> AbstractContextManager[Queries]:
        """See `sqla_uow.testing.assert_num_queries`."""
        from sqla_uow._testing.queries import assert_num_queries

        return assert_num_queries(self._manager, number)

    def assert_max_num_queries(self, number: int, /) -> AbstractContextManager[Queries]:
        """See `sqla_uow.testing.assert_max_num_queries`."""
        from sqla_uow._testing.queries import assert_max_num_queries

        return assert_max_num_queries(self._manager, number)

    def assert_no_leaks(self) -> AbstractContextManager[None]:
        """See `sqla_uow.testing.assert_no_leaks`."""
        from sqla_uow._testing.leaks import assert_no_leaks

        return assert_no_leaks(self._manager)

    def faults(
        self, fault: Fault, /, *, at: FaultPoint = "statement", nth: int = 1, times: int = 1, seconds: float = 0.05
    ) -> FaultPlan:
        """See `sqla_uow.testing.FaultPlan`."""
        from sqla_uow._testing.faults import FaultPlan

        return FaultPlan(self._manager, fault, at=at, nth=nth, times=times, seconds=seconds)
