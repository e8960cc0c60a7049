"""The pytest plugin, in projects of its own, under either async plugin."""

from __future__ import annotations

import configparser
import importlib.metadata
import os
from pathlib import Path

import pytest

import sqla_uow
from sqla_uow import pytest_plugin

pytestmark = pytest.mark.drivers("sqlite")

ALONE = ["-p", "sqla_uow.pytest_plugin", "-p", "no:cacheprovider"]
CONFTEST = """
import pytest
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

class Base(DeclarativeBase):
    pass

class Note(Base):
    __tablename__ = "note"
    id: Mapped[int] = mapped_column(primary_key=True)

@pytest.fixture
def anyio_backend():
    return "asyncio"

@pytest.fixture
async def uow_engine(tmp_path):
    engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path / 'test.db'}")
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    yield engine
    await engine.dispose()
"""
TESTS = """
import pytest
from sqlalchemy import func, select
from sqla_uow import after_commit, current_session, errors, transactional
from conftest import Note

RAN = []

@transactional(retries=1)
async def write():
    session = current_session()
    session.add(Note())
    await session.flush()
    after_commit(RAN.append, "hook")

async def count(manager):
    async with manager.begin(read_only=True) as unit:
        return await unit.session.scalar(select(func.count()).select_from(Note))

async def test_activated(uow_activated):
    await write()
    assert await count(uow_activated) == 1

async def test_rolled_back(uow_rolled_back, uow_manager, uow_faults, uow_assert_num_queries, uow_assert_no_leaks):
    async with uow_rolled_back(isolation="SERIALIZABLE") as manager:
        with uow_assert_no_leaks(), uow_assert_num_queries(3):
            with uow_faults("conflict", at="commit"):
                await write()
            assert await count(manager) == 1
    assert await count(uow_manager) == 0

async def test_watching(uow_activated, uow_capture_after_commit, uow_count_queries, uow_assert_max_num_queries):
    RAN.clear()
    with uow_capture_after_commit() as hooks, uow_count_queries() as queries, uow_assert_max_num_queries(1):
        await write()
    assert (len(hooks), queries.count, RAN) == (1, 1, [])

async def test_twice(uow_activated, uow_run_twice):
    await uow_run_twice(write)()
    assert await count(uow_activated) == 1

async def test_not_activated(uow_manager):
    with pytest.raises(errors.NoManagerError):
        await write()
"""


@pytest.fixture
def project(pytester, monkeypatch):
    """A project that sees this sqla_uow, wherever it is."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(sqla_uow.__file__).parents[1]), str(pytester.path)]))
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    return pytester


@pytest.mark.parametrize(
    "options",
    [
        ["-p", "pytest_asyncio.plugin", "-o", "asyncio_mode=auto", "-o", "asyncio_default_fixture_loop_scope=function"],
        ["-p", "anyio.pytest_plugin", "-o", "anyio_mode=auto"],
    ],
    ids=["asyncio", "anyio"],
)
def test_the_fixtures_work_under_both_plugins(driver, project, options):
    """Sync fixtures: the manager they activate is the one that async tests find, in either plugin's loop."""
    project.makeconftest(CONFTEST)
    project.makepyfile(TESTS)
    result = project.runpytest_inprocess(*ALONE, *options)
    result.assert_outcomes(passed=5)


def test_it_imports_pytest_only(driver, project):
    """Every pytest run of a project that has sqla-uow loads it; SQLAlchemy is not imported for that."""
    project.makepyfile(
        """
        import sys

        def test_lazy():
            assert "sqla_uow.pytest_plugin" in sys.modules
            assert not {"sqlalchemy", "greenlet"} & set(sys.modules)
        """
    )
    project.runpytest_subprocess(*ALONE).assert_outcomes(passed=1)


def test_a_project_without_an_engine(driver, project):
    """The message names what to define."""
    project.makepyfile("def test_it(uow_activated): pass")
    result = project.runpytest_inprocess(*ALONE)
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(
        ["sqla_uow knows no engine for its fixtures; define a fixture 'uow_engine' that returns your AsyncEngine"]
    )


def test_pytest_finds_it_by_its_entry_point(driver):
    """What setup.cfg says, and what is installed where the wheel is."""
    config = configparser.ConfigParser()
    config.read(Path(__file__).parents[2] / "setup.cfg")
    assert config["options.entry_points"]["pytest11"].split() == [
        "sqla_uow.pytest_plugin",
        "=",
        "sqla_uow.pytest_plugin",
    ]
    if os.environ.get("SQLA_UOW_EXPECT_INSTALLED") == "1":
        (found,) = importlib.metadata.entry_points(group="pytest11", name="sqla_uow.pytest_plugin")
        assert found.load() is pytest_plugin
