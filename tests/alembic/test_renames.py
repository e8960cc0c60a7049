"""Whatever a table, its schema or its version column is called by now: its UPDATEs work, and its trigger is where it has to be."""

import itertools
import logging

import pytest
from alembic.util import CommandError
from sqlalchemy import Integer, text
from sqlalchemy.exc import DBAPIError

from tests.alembic.catalog import columns, functions, triggers
from tests.kit.databases import ONE_OF_EACH


class Renamed:
    """The table `account` with its trigger, under the names that it has by now."""

    def __init__(self, db, operate):
        self.db, self.operate = db, operate
        self.table, self.column, self.cents = "account", "version", "balance"

    async def set_up(self):
        await self.operate(lambda op: [op.add_version_column("account"), op.create_version_trigger("account")])
        await self.db.run("INSERT INTO account (id, balance) VALUES (1, 0)")

    async def rename_table(self):
        old, self.table = self.table, "ledger" if self.table == "account" else "account"
        await self.operate(lambda op: op.rename_table(old, self.table))

    async def rename_column(self):
        old, self.column = self.column, "rev" if self.column == "version" else "version"
        await self.operate(lambda op: op.rename_version_column(self.table, old, self.column))

    async def rename_column_plainly(self):
        old, self.column = self.column, "lock version" if self.column != "lock version" else "rev"
        told = {"existing_type": Integer(), "existing_nullable": False, "existing_server_default": "1"}
        await self.operate(lambda op: op.alter_column(self.table, old, new_column_name=self.column, **told))

    async def batch(self):
        old, self.cents = self.cents, "cents" if self.cents == "balance" else "balance"
        await self._batch("alter_column", old, new_column_name=self.cents, existing_type=Integer())

    async def rename_column_in_batch(self):
        old, self.column = self.column, "n" if self.column != "n" else "rev"
        await self._batch("rename_version_column", old, self.column)

    async def trigger_again(self):
        await self.operate(lambda op: op.create_version_trigger(self.table, self.column))

    async def _batch(self, name, *arguments, **options):
        def run(op):
            with op.batch_alter_table(self.table) as batch:
                getattr(batch, name)(*arguments, **options)

        await self.operate(run)

    def quoted(self, name):
        return f"`{name}`" if self.db.family == "mysql" else f'"{name}"'

    async def write(self):
        """Write as another program does, and return by how much the version rose; 0 where there is none."""
        version = self.quoted(self.column) if self.column in await columns(self.db, self.table) else "0"
        before = await self.db.scalar(f"SELECT {version} FROM {self.table}")
        await self.db.run(f"UPDATE {self.table} SET {self.cents} = {self.cents} + 1")
        return await self.db.scalar(f"SELECT {version} FROM {self.table}") - before


@pytest.fixture
async def renamed(db, operate):
    """The table with its column, its trigger and one row."""
    one = Renamed(db, operate)
    await one.set_up()
    return one


STEPS = ("rename_table", "rename_column", "batch", "trigger_again", "rename_column_plainly", "rename_column_in_batch")
ORDERS = list(itertools.permutations(STEPS[:4])) + [(a, b) for a in STEPS for b in STEPS[4:]]


@pytest.mark.drivers(*ONE_OF_EACH)
@pytest.mark.parametrize("number", range(len(ORDERS)))
async def test_each_order_of_renames(db, operate, renamed, number):
    """V8: after each step an UPDATE works and counts once, and at the end no trigger and no function is left."""
    for step in ORDERS[number]:
        await getattr(renamed, step)()
        assert await renamed.write() == 1, step
        assert len(await triggers(db)) == 1
    table, column = renamed.table, renamed.column
    if number % 3 == 0:
        await operate(lambda op: op.drop_version_trigger(table, column))
    elif number % 3 == 1:
        await operate(lambda op: op.drop_version_column(table, column))
    else:  # the way back of what STEPS did
        await renamed.rename_column()
        await renamed.rename_table()
        assert await renamed.write() == 1
        await operate(lambda op: op.drop_version_column(renamed.table, renamed.column))
    assert await triggers(db) == []
    assert await functions(db) == []
    assert await renamed.write() == 0


async def test_a_renamed_table_loses_its_column(db, operate, renamed):
    """V8: renamed by SQL that Alembic does not see; the trigger goes with the column, and UPDATEs go on."""
    await db.run("ALTER TABLE account RENAME TO ledger")
    await operate(lambda op: op.drop_version_column("ledger"))
    renamed.table = "ledger"
    assert await renamed.write() == 0
    assert await triggers(db) == []
    assert await functions(db) == []


async def test_a_renamed_tables_trigger_is_dropped(db, operate, renamed, caplog):
    """V8: and where there is none any more, that is said; a downgrade that is run again is not stopped."""
    await renamed.rename_table()
    await operate(lambda op: op.drop_version_trigger("ledger"))
    assert await triggers(db) == []
    assert caplog.messages == []
    with caplog.at_level(logging.WARNING, "sqla_uow"):
        await operate(lambda op: op.drop_version_trigger("ledger"))
    assert caplog.messages == ["table 'ledger' has no version trigger, so none was dropped"]


async def test_an_old_name_that_is_used_again(db, operate, renamed):
    """V8: the new table has no trigger until it is given one, and then each has its own; one goes and the other stays."""
    await renamed.rename_table()
    await db.run("CREATE TABLE account (id INTEGER PRIMARY KEY, balance INTEGER)")
    new = Renamed(db, operate)
    await operate(lambda op: op.add_version_column("account", "n"))
    await db.run("INSERT INTO account (id, balance) VALUES (1, 0)")
    new.column = "n"
    await new.batch()
    assert await new.write() == 0
    assert len(await triggers(db)) == 1
    await new.trigger_again()
    assert [await new.write(), await renamed.write()] == [1, 1]
    await new.batch()
    await renamed.batch()
    assert [await new.write(), await renamed.write()] == [1, 1]
    await operate(lambda op: op.drop_version_column("account", "n"))
    assert [await new.write(), await renamed.write()] == [0, 1]
    await operate(lambda op: op.drop_version_column("ledger"))
    assert await triggers(db) == []
    assert await functions(db) == []


async def test_a_dropped_tables_name_is_taken_by_another(db, operate, renamed):
    """V8: a table that is dropped takes its trigger along; the one that gets its name gets no trigger by it."""
    await db.run("CREATE TABLE other (id INTEGER PRIMARY KEY, balance INTEGER, version INTEGER DEFAULT 1)")
    await db.run("INSERT INTO other (id, balance) VALUES (1, 0)")
    await operate(lambda op: [op.drop_table("note"), op.drop_table("account"), op.rename_table("other", "account")])
    assert await renamed.write() == 0
    assert await triggers(db) == []
    assert await functions(db) == []


async def test_two_tables_swap_their_names(db, operate, renamed):
    """V8: each keeps its own trigger, and dropping one's leaves the other's."""
    await db.run("CREATE TABLE other (id INTEGER PRIMARY KEY, balance INTEGER)")
    await operate(lambda op: [op.add_version_column("other", "n"), op.create_version_trigger("other", "n")])
    await db.run("INSERT INTO other (id, balance) VALUES (1, 0)")
    for old, new in (("account", "third"), ("other", "account"), ("third", "other")):
        await operate(lambda op, old=old, new=new: op.rename_table(old, new))
    other = Renamed(db, operate)
    other.column, renamed.table = "n", "other"
    assert [await other.write(), await renamed.write()] == [1, 1]
    await operate(lambda op: op.drop_version_trigger("account", "n"))
    assert [await other.write(), await renamed.write()] == [0, 1]
    await other.trigger_again()
    await operate(lambda op: op.drop_version_column("other"))
    assert [await other.write(), await renamed.write()] == [1, 0]
    await operate(lambda op: op.drop_version_column("account", "n"))
    assert await triggers(db) == []
    assert await functions(db) == []


async def test_a_column_that_sql_has_renamed(db, operate, renamed):
    """V8: where a column was renamed past Alembic, its trigger is one that no UPDATE survives; it goes with the column all the same."""
    await db.run("ALTER TABLE account RENAME COLUMN version TO rev")
    renamed.column = "rev"
    if db.family != "sqlite":
        with pytest.raises(DBAPIError):
            await renamed.write()
    await operate(lambda op: op.drop_version_column("account", "rev"))
    assert await renamed.write() == 0
    assert await triggers(db) == []


async def test_a_rename_that_is_run_again(db, operate, renamed):
    """V8: on MariaDB a migration that failed behind the rename begins again; the trigger is brought in step then."""
    await db.run("ALTER TABLE account RENAME COLUMN version TO rev")
    renamed.column = "rev"
    for _ in range(2):
        await operate(lambda op: op.rename_version_column("account", "version", "rev"))
        assert await renamed.write() == 1


async def test_renames_that_cannot_be(db, operate, renamed):
    """V8: no such column, or both; the table and its trigger stay as they are."""
    await operate(lambda op: op.add_version_column("account", "rev"))
    for old, new, message in (
        ("version", "rev", "table 'account' already has a column 'rev'; drop it first, or take another name"),
        ("nothing", "n", "table 'account' has no column 'nothing'; name the right one in column_name"),
    ):
        with pytest.raises(CommandError) as caught:
            await operate(lambda op, old=old, new=new: op.rename_version_column("account", old, new))
        assert str(caught.value) == message
    assert await renamed.write() == 1


@pytest.mark.drivers("asyncmy", "aiomysql")
async def test_a_rename_that_fails_on_mariadb(db, operate, renamed):
    """V8: the database refuses the new name; the old column is counted in as before, and the table is not locked."""
    with pytest.raises(DBAPIError):
        await operate(lambda op: op.rename_version_column("account", "version", "x" * 65))
    assert await renamed.write() == 1


@pytest.mark.drivers("asyncpg", "psycopg")
async def test_a_rename_in_a_script(operate):
    """V8: a script cannot look whether there is a trigger, without which the rename would break every UPDATE."""
    with pytest.raises(CommandError) as caught:
        await operate(lambda op: op.rename_version_column("account", "version", "rev"), as_sql=True)
    assert str(caught.value) == (
        "whether table 'account' has a version trigger is not known with --sql; run it on a database, or write "
        "op.drop_version_trigger(), op.alter_column() and op.create_version_trigger()"
    )


@pytest.mark.drivers("sqlite")
async def test_a_legacy_rename_of_a_table(db, operate, renamed):
    """V8: with legacy_alter_table SQLite leaves the old name in the trigger, with which no UPDATE would work."""

    def rename(op):
        op.execute("PRAGMA legacy_alter_table = ON")
        op.rename_table("account", "ledger")

    await operate(rename)
    renamed.table = "ledger"
    assert await renamed.write() == 1
    assert len(await triggers(db)) == 1


@pytest.mark.drivers("sqlite")
async def test_an_attached_database(db, operate, renamed, tmp_path):
    """V8: its tables' triggers are its own."""
    attach = f"ATTACH DATABASE '{tmp_path / 'side.db'}' AS side"

    def steps(op):
        op.execute(attach)
        op.execute("CREATE TABLE side.account (id INTEGER PRIMARY KEY, n INTEGER)")
        op.add_version_column("account", schema="side")
        op.create_version_trigger("account", schema="side")
        op.execute("ALTER TABLE side.account RENAME TO ledger")
        op.execute("INSERT INTO side.ledger (id, n) VALUES (1, 0)")
        with op.batch_alter_table("ledger", schema="side") as batch:
            batch.alter_column("n", new_column_name="m", existing_type=Integer())
        op.execute("UPDATE side.ledger SET m = 1")
        counted = op.get_bind().scalar(text("SELECT version FROM side.ledger"))
        op.drop_version_column("ledger", schema="side")
        op.execute("UPDATE side.ledger SET m = 2")
        return counted

    assert await operate(steps) == 2
    assert await renamed.write() == 1


@pytest.mark.drivers("asyncpg", "psycopg")
@pytest.mark.parametrize("move", ["ALTER TABLE account SET SCHEMA side", "ALTER SCHEMA first RENAME TO side"])
@pytest.mark.parametrize("end", ["drop_version_column", "drop_version_trigger"])
async def test_a_schema_that_is_changed(db, operate, renamed, move, end):
    """V8: the function stays in the first schema, or moves with it; both are found by the table."""
    if "first" in move:
        await db.run("CREATE SCHEMA first")
        await operate(lambda op: op.drop_version_column("account"))
        await db.run("ALTER TABLE account SET SCHEMA first")
        await operate(
            lambda op: [
                op.add_version_column("account", schema="first"),
                op.create_version_trigger("account", schema="first"),
            ]
        )
    else:
        await db.run("CREATE SCHEMA side")
    await db.run(move)
    try:
        await db.run("UPDATE side.account SET balance = 1")
        assert await db.scalar("SELECT version FROM side.account") == 2
        await operate(lambda op: op.rename_version_column("account", "version", "rev", schema="side"))
        await operate(lambda op: op.create_version_trigger("account", "rev", schema="side"))
        await db.run("UPDATE side.account SET balance = 1")
        assert await db.scalar("SELECT rev FROM side.account") == 3
        await operate(lambda op: getattr(op, end)("account", "rev", schema="side"))
        await db.run("UPDATE side.account SET balance = 2")
        assert await triggers(db) == []
        assert await functions(db) == []
    finally:
        await db.run("DROP SCHEMA side CASCADE")


@pytest.mark.drivers("asyncpg", "psycopg")
async def test_a_partitioned_table(db, operate):
    """V8: the copies that PostgreSQL makes of the trigger for partitions are its own to make and to drop."""
    await db.run(
        "CREATE TABLE log (id INTEGER PRIMARY KEY, n INTEGER) PARTITION BY RANGE (id)",
        "CREATE TABLE log_1 PARTITION OF log FOR VALUES FROM (0) TO (10)",
    )
    await operate(lambda op: [op.add_version_column("log"), op.create_version_trigger("log")])
    await operate(lambda op: [op.rename_table("log", "record"), op.rename_table("log_1", "record_1")])
    await operate(lambda op: op.rename_version_column("record", "version", "rev"))
    await db.run("INSERT INTO record (id, n) VALUES (1, 1)", "UPDATE record SET n = 2", "UPDATE record_1 SET n = 3")
    assert await db.scalar("SELECT rev FROM record") == 3
    await operate(lambda op: op.drop_version_column("record", "rev"))
    await db.run("UPDATE record SET n = 4")
    assert await triggers(db) == []
    assert await functions(db) == []


@pytest.mark.drivers("asyncmy", "aiomysql")
async def test_mariadb_moves_no_table_with_a_trigger(db, renamed):
    """The database's own refusal, on which the guide relies."""
    await db.run("CREATE DATABASE IF NOT EXISTS side")
    try:
        with pytest.raises(DBAPIError, match="1435"):
            await db.run("RENAME TABLE account TO side.account")
        assert await renamed.write() == 1
    finally:
        await db.run("DROP DATABASE side")


@pytest.mark.drivers("asyncpg", "psycopg")
async def test_a_batch_that_copies_the_table_elsewhere(db, operate, renamed):
    """V8: PostgreSQL loses a trigger with the table too, where a batch is told to make it anew."""
    await operate(lambda op: op.drop_table("note"))

    def copy(op):
        with op.batch_alter_table("account", recreate="always") as batch:
            batch.alter_column("version", new_column_name="rev")

    await renamed.rename_table()
    await renamed.rename_table()
    await operate(copy)
    renamed.column = "rev"
    assert await renamed.write() == 1
    await operate(lambda op: op.drop_version_column("account", "rev"))
    assert await functions(db) == []
