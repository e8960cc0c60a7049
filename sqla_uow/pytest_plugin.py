"""Fixtures for tests of units of work: `sqla_uow.testing`, told once which database is meant.

Loaded by pytest in every project that has sqla-uow installed, so it imports pytest only; SQLAlchemy comes with the first
fixture that a test asks for.

A project defines ``uow_engine``, and ``uow_manager`` where its managers have options::

    @pytest.fixture
    def uow_engine() -> AsyncEngine:
        return create_async_engine(URL, poolclass=NullPool)

    async def test_transfer(uow_rolled_back: RolledBack, uow_faults: Faults) -> None:
        async with uow_rolled_back():
            with uow_faults("conflict", at="commit"):
                await transfer(1, 2, Decimal(10))

All fixtures are sync, so they work under pytest-asyncio and anyio alike.  Their types are the Protocols named here.
"""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Any

import pytest

from sqla_uow._testing.pytest_kit import Kit
from sqla_uow._testing.pytest_types import (
    AssertNoLeaks,
    AssertNumQueries,
    CaptureAfterCommit,
    CountQueries,
    Faults,
    RolledBack,
    RunTwice,
)

if TYPE_CHECKING:
    from collections.abc import Generator

    from sqlalchemy.ext.asyncio import AsyncEngine

    from sqla_uow import UnitOfWorkManager

__all__ = [
    "AssertNoLeaks",
    "AssertNumQueries",
    "CaptureAfterCommit",
    "CountQueries",
    "Faults",
    "RolledBack",
    "RunTwice",
]


@pytest.fixture
def uow_engine() -> AsyncEngine:
    """The engine of the tests; every project defines its own."""
    pytest.fail(
        "sqla_uow knows no engine for its fixtures; define a fixture 'uow_engine' that returns your AsyncEngine",
        pytrace=False,
    )


@pytest.fixture
def uow_manager(uow_engine: AsyncEngine) -> UnitOfWorkManager[Any]:
    """The manager of the tests, over `uow_engine`; a project whose manager has options defines its own."""
    from sqla_uow import UnitOfWorkManager

    return UnitOfWorkManager(uow_engine)


@pytest.fixture
def uow_activated(uow_manager: UnitOfWorkManager[Any]) -> Generator[UnitOfWorkManager[Any]]:
    """The manager of the tests, activated: what they commit is committed."""
    with uow_manager.activate() as manager:
        yield manager


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """Activate the manager in the test's own task as well: under anyio that task may have begun before the fixture."""
    manager: Any = pyfuncitem.funcargs.get("uow_activated")
    test = pyfuncitem.obj
    if manager is None or not inspect.iscoroutinefunction(test):
        return (yield)

    @functools.wraps(test)
    async def activated(*args: Any, **kwargs: Any) -> Any:
        with manager.activate():
            return await test(*args, **kwargs)

    pyfuncitem.obj = activated
    try:
        return (yield)
    finally:
        pyfuncitem.obj = test


@pytest.fixture
def _uow_kit(uow_manager: UnitOfWorkManager[Any]) -> Kit:
    return Kit(uow_manager)


@pytest.fixture
def uow_rolled_back(_uow_kit: Kit) -> RolledBack:
    """Undo what a test does; see `sqla_uow.testing.rolled_back`.

    ``async with uow_rolled_back() as manager:``
    """
    return _uow_kit.rolled_back


@pytest.fixture
def uow_capture_after_commit() -> CaptureAfterCommit:
    """Collect `after_commit` hooks; see `sqla_uow.testing.capture_after_commit`.

    ``with uow_capture_after_commit() as hooks:``
    """
    from sqla_uow._testing.captures import capture_after_commit

    return capture_after_commit


@pytest.fixture
def uow_count_queries(_uow_kit: Kit) -> CountQueries:
    """Count statements; see `sqla_uow.testing.count_queries`.

    ``with uow_count_queries() as queries:``
    """
    return _uow_kit.count_queries


@pytest.fixture
def uow_assert_num_queries(_uow_kit: Kit) -> AssertNumQueries:
    """Fail unless the block sends so many statements; see `sqla_uow.testing.assert_num_queries`.

    ``with uow_assert_num_queries(2):``
    """
    return _uow_kit.assert_num_queries


@pytest.fixture
def uow_assert_max_num_queries(_uow_kit: Kit) -> AssertNumQueries:
    """Fail if the block sends more statements; see `sqla_uow.testing.assert_max_num_queries`.

    ``with uow_assert_max_num_queries(2):``
    """
    return _uow_kit.assert_max_num_queries


@pytest.fixture
def uow_assert_no_leaks(_uow_kit: Kit) -> AssertNoLeaks:
    """Fail if a connection does not come back; see `sqla_uow.testing.assert_no_leaks`.

    ``with uow_assert_no_leaks():``
    """
    return _uow_kit.assert_no_leaks


@pytest.fixture
def uow_faults(_uow_kit: Kit) -> Faults:
    """Make units fail; see `sqla_uow.testing.FaultPlan`.

    ``with uow_faults("conflict", at="commit"):``
    """
    return _uow_kit.faults


@pytest.fixture
def uow_run_twice() -> RunTwice:
    """Run transactional functions in vain first; see `sqla_uow.testing.run_twice`.

    ``await uow_run_twice(function)(...)``
    """
    from sqla_uow._testing.twice import run_twice

    return run_twice
