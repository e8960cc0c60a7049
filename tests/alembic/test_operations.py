from __future__ import annotations

import io
from types import SimpleNamespace

import pytest
from alembic.autogenerate import produce_migrations, render_python_code
from alembic.operations import Operations
from alembic.operations.ops import CreateTableOp, ModifyTableOps, UpgradeOps
from alembic.runtime.migration import MigrationContext
from alembic.util import CommandError
from sqlalchemy import BigInteger, Column, MetaData, Table

from sqla_uow.alembic import (
    AddVersionColumnOp,
    CreateVersionTriggerOp,
    DropVersionColumnOp,
    DropVersionTriggerOp,
    RenameVersionColumnOp,
    install,
    migration_lock,
)

OPS = {
    AddVersionColumnOp: (DropVersionColumnOp, "op.add_version_column('t', column_name='rev', kind='uuid', schema='s')"),
    DropVersionColumnOp: (
        AddVersionColumnOp,
        "op.drop_version_column('t', column_name='rev', kind='uuid', schema='s')",
    ),
    CreateVersionTriggerOp: (DropVersionTriggerOp, "op.create_version_trigger('t', column_name='rev', schema='s')"),
    DropVersionTriggerOp: (CreateVersionTriggerOp, "op.drop_version_trigger('t', column_name='rev', schema='s')"),
}


@pytest.mark.drivers("sqlite")
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_reversed_and_rendered(driver, op):
    """A2, A3: each operation has its reverse, with the same arguments, and is written as it is called."""
    install()
    one = op("t", "rev", kind="uuid", schema="s", lock_timeout=2.0, retries=3)
    opposite, written = OPS[op]
    back = one.reverse()
    assert type(back) is opposite
    assert back.patience == one.patience == (2.0, 3)
    assert one.to_diff_tuple() == (op.name, "s", "t", "rev")
    assert vars(back.reverse()) == vars(one)
    assert render_python_code(UpgradeOps([one])).splitlines()[-2].strip() == written


@pytest.mark.drivers("sqlite")
def test_a_rename_is_reversed_and_rendered(driver):
    """V8: from new to old, with the same arguments; within a batch without its table."""
    install()
    one = RenameVersionColumnOp("t", "old", "new", schema="s", lock_timeout=2.0, retries=3)
    back = one.reverse()
    assert (back.column_name, back.new_column_name, back.patience) == ("new", "old", (2.0, 3))
    assert vars(back.reverse()) == vars(one)
    assert one.to_diff_tuple() == ("rename_version_column", "s", "t", "old", "new")
    written = "op.rename_version_column('t', 'old', 'new', schema='s')"
    assert render_python_code(UpgradeOps([one])).splitlines()[-2].strip() == written
    batch = render_python_code(UpgradeOps([ModifyTableOps("t", [one], schema="s")]), render_as_batch=True)
    assert "batch_op.rename_version_column('old', 'new')" in batch


@pytest.mark.drivers("sqlite")
def test_a_short_call_is_written_shortly(driver):
    """A2: what is as by default is left out."""
    install()
    assert "op.add_version_column('t')" in render_python_code(UpgradeOps([AddVersionColumnOp("t")]))


async def test_a_version_of_a_type_of_its_own(db):
    """A2: a version column that is not as the mixin makes it is added by Alembic's own operation."""
    install()
    metadata = MetaData()
    column = Column("version", BigInteger, nullable=False, server_default="1", info={"sqla_uow.version": "integer"})
    Table("account", metadata, column)

    def compare(connection):
        context = MigrationContext.configure(connection, opts={"target_metadata": metadata})
        return produce_migrations(context, metadata)

    async with db.outside() as connection:
        script = await connection.run_sync(compare)
    (changed,) = [op for op in script.upgrade_ops.ops if isinstance(op, ModifyTableOps) and op.table_name == "account"]
    code = render_python_code(UpgradeOps([changed]))
    assert "op.add_column('account', sa.Column('version', sa.BigInteger()" in code
    assert "add_version_column" not in code


@pytest.mark.drivers("sqlite")
def test_installed_twice_delegates_once(driver):
    """A1: a second install() does nothing, and what is no version column is rendered as before."""
    install()
    install()
    code = render_python_code(UpgradeOps([CreateTableOp("t", [Column("x", BigInteger)])]))
    assert code.count("op.create_table('t'") == 1


async def test_a_batch_that_drops_the_column_plainly(db, operate):
    """A2: where a batch takes the column away, the trigger that counts in it is not brought back."""
    await operate(lambda op: [op.add_version_column("account"), op.create_version_trigger("account")])

    def drop(op):
        if db.family != "sqlite":
            op.drop_version_trigger("account")
        with op.batch_alter_table("account") as batch:
            batch.drop_column("version")

    await operate(drop)
    await db.run("INSERT INTO account (id, balance) VALUES (1, 0)", "UPDATE account SET balance = 1")


@pytest.mark.drivers("asyncpg", "psycopg")
async def test_a_schema_of_its_own(db, operate):
    """A2, A3: a table of another schema, and its view there."""
    await db.run("CREATE SCHEMA side", "CREATE TABLE side.t (id INTEGER PRIMARY KEY, n INTEGER)")
    await operate(
        lambda op: [op.add_version_column("t", schema="side"), op.create_version_trigger("t", schema="side")],
    )
    await db.run("INSERT INTO side.t (id, n) VALUES (1, 1)", "UPDATE side.t SET n = 2")
    assert await db.scalar("SELECT version FROM side.t") == 2
    await operate(lambda op: op.drop_version_column("t", schema="side"))
    assert await db.scalar("SELECT count(*) FROM pg_proc WHERE proname LIKE 'sqla_uow%'") == 0
    await db.run("DROP SCHEMA side CASCADE")


def test_a_parent_is_written():
    """A3: the parent of a child's trigger is among the arguments."""
    install()
    create = CreateVersionTriggerOp("part")
    create.parent = "item"
    assert "op.create_version_trigger('part', parent='item')" in render_python_code(UpgradeOps([create]))


SCRIPTS = {
    "postgresql": [
        "SET LOCAL lock_timeout = '1000ms'",
        "DROP TRIGGER IF EXISTS sqla_uow_version_account ON account",
        "DROP FUNCTION IF EXISTS sqla_uow_version_account()",
        "ALTER TABLE account DROP COLUMN version",
        "SET LOCAL lock_timeout = DEFAULT",
    ],
    "mysql": [
        "SET SESSION lock_wait_timeout = 1",
        "DROP TRIGGER IF EXISTS sqla_uow_version_account",
        "ALTER TABLE account DROP COLUMN version",
        "SET SESSION lock_wait_timeout = DEFAULT",
    ],
    "sqlite": ["DROP TRIGGER IF EXISTS sqla_uow_version_account", "ALTER TABLE account DROP COLUMN version"],
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_has_one_try(name):
    """A2: with --sql the statements are written once, with the limit of one try around them."""
    install()
    script = io.StringIO()
    options = {"as_sql": True, "output_buffer": script}
    Operations(MigrationContext.configure(dialect_name=name, opts=options)).drop_version_column("account")
    assert [line.strip() for line in script.getvalue().split(";") if line.strip()] == SCRIPTS[name]


def test_an_unknown_database_has_no_lock():
    """A4: better no lock than one that holds nobody off."""
    oracle = SimpleNamespace(dialect=SimpleNamespace(name="oracle", driver="oracledb"), in_transaction=lambda: False)
    with pytest.raises(CommandError) as caught, migration_lock(oracle):
        pass
    assert str(caught.value) == (
        "migration_lock() knows PostgreSQL, MariaDB and SQLite, not oracle; run the migrations from one process"
    )
