from io import StringIO

import pytest
from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext

from sqla_uow.alembic import install
from tests.alembic.catalog import columns
from tests.alembic.project import PLAIN, VERSIONED, Project
from tests.databases import ONE_OF_EACH

pytestmark = pytest.mark.drivers(*ONE_OF_EACH)  # Alembic compares catalogs, whichever driver has read them


@pytest.fixture
def batch():
    """Whether migrations are generated with batch_alter_table; a test may say otherwise."""
    return "no"


@pytest.fixture
async def project(db, tmp_path, batch):
    """A project whose models are as yet without versions, on an empty database but for its tables."""
    await db.run(*(f"DROP TABLE {name}" for name in ("note", "account", "doctor", "uniq", "versioned")))
    return Project(tmp_path / "project", db.url, batch=batch)


@pytest.mark.parametrize("batch", ["no", "yes"])
async def test_a_mixin_gained_and_lost(db, project, batch):
    """A2: generated as add_version_column, reversible, and then there is nothing left to generate."""
    await project.alembic("revision", autogenerate=True, message="tables")
    await project.alembic("upgrade", "head")
    project.models(**VERSIONED)
    await project.alembic("revision", autogenerate=True, message="gained")
    gained = project.generated("gained")
    if batch == "yes":
        assert "batch_op.add_version_column()" in gained
        assert "batch_op.add_version_column(kind='uuid')" in gained
        assert "batch_op.drop_version_column(column_name='lock_version')" in gained
    else:
        assert "op.add_version_column('a')" in gained
        assert "op.add_version_column('b', kind='uuid')" in gained
        assert "op.add_version_column('c', kind='timestamp')" in gained
        assert "op.add_version_column('d', column_name='lock_version')" in gained
        assert "op.drop_version_column('b', kind='uuid')" in gained
    for target in ("head", "-1", "head"):
        await project.alembic("upgrade" if target == "head" else "downgrade", target)
    assert "No new upgrade operations detected" in await project.alembic("check")
    assert not (await columns(db, "d"))["lock_version"]["nullable"]
    project.models(**PLAIN)
    await project.alembic("revision", autogenerate=True, message="lost")
    lost = project.generated("lost")
    assert "drop_column('version')" in lost if batch == "yes" else "op.drop_column('a', 'version')" in lost
    await project.alembic("upgrade", "head")
    await project.alembic("downgrade", "-1")
    await project.alembic("upgrade", "head")
    assert "No new upgrade operations detected" in await project.alembic("check")


async def test_a_new_table_has_its_version(db, project):
    """A2: a versioned table that is created has no private name in its migration, and there is nothing left to generate."""
    project.models(**VERSIONED)
    await project.alembic("revision", autogenerate=True, message="tables")
    tables = project.generated("tables")
    assert "sqla_uow.alembic.UtcTimestamp()" in tables
    assert "sqla_uow._" not in tables
    await project.alembic("upgrade", "head")
    assert "No new upgrade operations detected" in await project.alembic("check")


async def test_a_script_has_one_try(db, project):
    """A2: --sql renders a single try, with its limit, and looks at no database."""
    project.revision("one", None, "op.add_version_column('a'); op.create_version_trigger('a')")
    script = await project.alembic("upgrade", "head", sql=True)
    assert script.count("ADD COLUMN version") == 1
    assert script.count("CREATE TRIGGER" if db.family != "mysql" else "CREATE OR REPLACE TRIGGER") == 1
    limit = {
        "postgresql": "SET LOCAL lock_timeout = '1000ms'",
        "mysql": "SET SESSION lock_wait_timeout = 1",
        "sqlite": "",
    }
    assert limit[db.family] in script


def test_a_script_drops_a_table_on_sqlite(driver):
    """A2: without a database there are no triggers to be saved."""
    install()
    script = StringIO()
    context = MigrationContext.configure(dialect_name="sqlite", opts={"as_sql": True, "output_buffer": script})
    Operations(context).drop_table("account")
    assert "DROP TABLE account" in script.getvalue()
