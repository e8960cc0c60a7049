import sqlite3
from contextlib import closing

import pytest
from alembic.util import CommandError
from sqlalchemy import event
from sqlalchemy.exc import DBAPIError

from tests.alembic.catalog import columns, identity, triggers

USED = {
    "postgresql": ["CREATE VIEW used AS SELECT version FROM account"],
    "mysql": ["ALTER TABLE account ADD COLUMN twice INTEGER AS (version * 2)"],
    "sqlite": ["CREATE INDEX used ON account (version)"],
}


async def test_a_column_that_cannot_go_keeps_its_trigger(db, operate):
    """A2: where the database refuses to drop the column, its trigger goes on counting."""
    await db.run("INSERT INTO account (id, balance) VALUES (1, 0)")
    await operate(lambda op: [op.add_version_column("account"), op.create_version_trigger("account")])
    await db.run(*USED[db.family])
    with pytest.raises(DBAPIError):
        await operate(lambda op: op.drop_version_column("account"))
    assert await triggers(db) == ["sqla_uow_version_account"]
    await db.run("UPDATE account SET balance = 1")
    assert await db.scalar("SELECT version FROM account") == 2


@pytest.mark.drivers("asyncmy", "aiomysql")
async def test_a_table_that_had_to_be_copied_is_left(db, operate):
    """A2: MariaDB would copy a compressed table without a word, and lock it meanwhile; that is an error."""
    await db.run("ALTER TABLE account ROW_FORMAT=COMPRESSED", "INSERT INTO account (id, balance) VALUES (1, 0)")
    before = await identity(db)
    with pytest.raises(CommandError) as caught:
        await operate(lambda op: op.add_version_column("account"))
    assert str(caught.value) == (
        "MariaDB would have to rewrite table 'account'; use op.add_column() while nobody uses the table, or change its "
        "ROW_FORMAT"
    )
    assert await identity(db) == before
    assert "version" not in await columns(db)


@pytest.mark.drivers("sqlite")
async def test_a_batch_that_fails_keeps_the_trigger(db, operate):
    """A2: SQLite's copy of the table fails; the table that stays has its trigger."""
    await operate(lambda op: [op.add_version_column("account"), op.create_version_trigger("account")])
    await db.run("INSERT INTO account (id, balance) VALUES (1, 0)", "CREATE TABLE _alembic_tmp_account (x INTEGER)")

    def drop(op):
        with op.batch_alter_table("account") as batch:
            batch.drop_version_column()

    with pytest.raises(DBAPIError, match="already exists"):
        await operate(drop)
    await db.run("UPDATE account SET balance = 1")
    assert await db.scalar("SELECT version FROM account") == 2


@pytest.mark.drivers("sqlite")
async def test_no_write_comes_between_two_statements(db, operate):
    """A3: the trigger's statements hold SQLite's write lock from the first on; a write in between would make the second fail."""
    await operate(lambda op: op.add_version_column("account"))
    refused = []

    def write(_connection, _cursor, statement, *_rest):
        if "DROP TRIGGER" in statement:
            with closing(sqlite3.connect(db.url.partition("///")[2], timeout=0, isolation_level=None)) as other:
                try:
                    other.execute("UPDATE account SET balance = 1")
                except sqlite3.OperationalError as error:
                    refused.append(str(error))

    await db.run("INSERT INTO account (id, balance) VALUES (1, 0)")
    event.listen(db._engines[-1].sync_engine, "after_cursor_execute", write)
    await operate(lambda op: op.create_version_trigger("account"))
    assert refused == ["database is locked"]
    assert await triggers(db) == ["sqla_uow_version_account"]
