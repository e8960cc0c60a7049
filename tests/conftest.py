"""Drivers, servers and databases for the tests.

`SQLA_UOW_DRIVER` names one driver; without it, every driver that is installed takes its turn.  Servers start when the
first test needs them and stop with the session.  With `SQLA_UOW_POOLER=transaction` engines reach PostgreSQL through PgBouncer
in transaction mode; see docs/how-to/pgbouncer.md.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
if str(ROOT) not in sys.path:  # at the end: `tests` and `examples` from here, `sqla_uow` from where it is installed
    sys.path.append(str(ROOT))

from tests.kit.brokers import Brokers  # noqa: E402  # needs the line above
from tests.kit.databases import DRIVERS, FAMILIES, MODULES, POOLED, Databases  # noqa: E402  # likewise
from tests.kit.troubles import QUICK, TROUBLES  # noqa: E402  # likewise

pytest_plugins = ["pytester"]  # for the tests of our own plugin

# The servers have tests of their own; one run for each kind of server is enough of a matrix.
_DRIVER = os.environ.get("SQLA_UOW_DRIVER", "asyncpg")
collect_ignore = [] if _DRIVER in ("asyncpg", "asyncmy") else ["servers"]
if _DRIVER != "asyncpg":
    collect_ignore.append("servers/tests/test_brokers.py")


def pytest_configure(config):
    """Register the markers."""
    config.addinivalue_line("markers", "drivers(*names): the drivers that this test is about; all without it")
    config.addinivalue_line("markers", "direct(reason): what a pooler before PostgreSQL changes; left out behind one")
    config.addinivalue_line("markers", "other_driver: set here, on tests that are about none of the selected drivers")


def _selected() -> list[str]:
    chosen = os.environ.get("SQLA_UOW_DRIVER")
    if chosen is not None:
        if chosen not in DRIVERS:
            raise pytest.UsageError(f"SQLA_UOW_DRIVER={chosen!r} is unknown; use one of {', '.join(DRIVERS)}")
        return [chosen]
    there = [name for name in DRIVERS if importlib.util.find_spec(MODULES[name]) is not None]
    return [name for name in there if not POOLED or FAMILIES[name] == "postgresql"]


def pytest_generate_tests(metafunc):
    """Run a test that asks for a driver once for each selected driver that it is about."""
    if "driver" in metafunc.fixturenames:
        marker = metafunc.definition.get_closest_marker("drivers")
        wanted = marker.args if marker else DRIVERS
        names = [name for name in _selected() if name in wanted]
        other = pytest.mark.other_driver
        if "kind" in metafunc.fixturenames:  # of trouble: those that the driver has
            pairs = [(name, kind) for name in names for kind in TROUBLES[name]]
            ids = [f"{name}-{kind.__name__}" for name, kind in pairs]
            metafunc.parametrize(("driver", "kind"), pairs or [pytest.param(None, None, marks=other)], ids=ids or None)
        else:
            metafunc.parametrize("driver", names or [pytest.param(None, marks=other)], scope="session")


def pytest_collection_modifyitems(config, items):
    """Leave out, rather than skip, what is about other drivers than the selected one, or about no pooler."""
    without = ("other_driver", "direct") if POOLED else ("other_driver",)
    left = [item for item in items if any(item.get_closest_marker(name) for name in without)]
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if item not in left]


@pytest.fixture(scope="session")
def databases():
    """Provide the servers of this run."""
    databases = Databases()
    yield databases
    databases.stop()


@pytest.fixture(scope="session")
def brokers():
    """Provide the brokers of this run."""
    brokers = Brokers()
    yield brokers
    brokers.stop()


@pytest.fixture
async def db(driver, databases, tmp_path):
    """A fresh database of this driver, with the tables of `tests.kit.models`; its engines are disposed of at the end."""
    database = databases.make(driver, tmp_path)
    await database.create_tables()
    yield database
    await database.dispose()


@pytest.fixture
async def trouble(db):
    """Provide a conflict that is met at once, as often as one likes."""
    await db.run("INSERT INTO account (id, balance) VALUES (1, 0), (2, 0)")
    trouble = QUICK[db.family](db)
    yield trouble
    await trouble.settle()
