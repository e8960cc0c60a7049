import pytest
from alembic.util import CommandError
from sqlalchemy import Integer

from tests.alembic.catalog import columns, identity, triggers
from tests.kit.databases import ONE_OF_EACH

KINDS = ("integer", "uuid", "timestamp")


@pytest.mark.parametrize("of", KINDS)
async def test_a_version_column_is_added_and_dropped(db, operate, of):
    """A2: NOT NULL with one constant default, so that rows that are there have a version; and back again."""
    await db.run("INSERT INTO account (id, balance) VALUES (1, 0), (2, 0)")
    for _ in range(2):
        await operate(lambda op: op.add_version_column("account", kind=of))
        version = (await columns(db))["version"]
        assert not version["nullable"]
        assert await db.scalar("SELECT count(DISTINCT version) FROM account") == 1
        await operate(lambda op: op.drop_version_column("account", kind=of))
        assert "version" not in await columns(db)


async def test_no_row_is_rewritten(db, operate):
    """A2: the table is the same file (PostgreSQL), the same table id (MariaDB: INSTANT), the same page (SQLite)."""
    await db.run("INSERT INTO account (id, balance) VALUES (1, 0), (2, 0)")
    before = await identity(db)
    await operate(lambda op: op.add_version_column("account"))
    assert await identity(db) == before
    await db.run(*REWRITE[db.family])
    assert await identity(db) != before  # a table that is written anew is seen to be


REWRITE = {
    "postgresql": ["ALTER TABLE account ALTER COLUMN balance TYPE bigint"],
    "mysql": ["ALTER TABLE account FORCE"],
    "sqlite": [
        "CREATE TABLE copy AS SELECT * FROM account",
        "DROP TABLE account",
        "ALTER TABLE copy RENAME TO account",
    ],
}


async def test_batch_forms(db, operate):
    """A2: within batch_alter_table too; where SQLite makes the table anew, the trigger is brought back."""
    await db.run("INSERT INTO account (id, balance) VALUES (1, 0)")

    def add(op):
        with op.batch_alter_table("account") as batch:
            batch.add_version_column("rev")
        op.create_version_trigger("account", "rev")

    def rename(op):
        with op.batch_alter_table("account") as batch:
            batch.alter_column("balance", new_column_name="cents", existing_type=Integer(), existing_nullable=False)

    def drop(op):
        with op.batch_alter_table("account") as batch:
            batch.drop_version_column("rev")

    await operate(add)
    await operate(rename)
    await db.run("UPDATE account SET cents = 1")
    assert await db.rows("SELECT cents, rev FROM account") == [(1, 2)]
    await operate(drop)
    assert set(await columns(db)) == {"id", "cents"}
    assert await triggers(db) == []


async def test_dropping_takes_the_trigger_along(db, operate):
    """A2: drop_version_column drops the trigger first; without it, an UPDATE or the DROP would fail."""
    await db.run("INSERT INTO account (id, balance) VALUES (1, 0)")
    await operate(lambda op: [op.add_version_column("account"), op.create_version_trigger("account")])
    assert await triggers(db) == ["sqla_uow_version_account"]
    await operate(lambda op: op.drop_version_column("account"))
    assert await triggers(db) == []
    await db.run("UPDATE account SET balance = 1")


async def test_a_column_that_is_there_is_left(db, operate):
    """A2: a migration that failed behind the operation can be run again, also where DDL is not undone (MariaDB)."""
    await operate(lambda op: op.add_version_column("account"))
    await operate(lambda op: op.add_version_column("account"))
    assert "version" in await columns(db)


REFUSED = {
    "unknown table": ([], "nowhere", "there is no table 'nowhere'; create it first"),
    "view": (
        ["CREATE VIEW seen AS SELECT * FROM account"],
        "seen",
        "'seen' is a view, which has no rows of its own; name its table",
    ),
    "no primary key": (
        ["CREATE TABLE bare (x INTEGER)"],
        "bare",
        "table 'bare' has no primary key, so its rows cannot be versioned; add one first",
    ),
    "another type": (
        ["ALTER TABLE account ADD COLUMN version VARCHAR(20)"],
        "account",
        "table 'account' already has a column 'version', of type VARCHAR(20); rename it, or name another one in column_name",
    ),
    "nullable": (
        ["ALTER TABLE account ADD COLUMN version INTEGER"],
        "account",
        (
            "table 'account' already has a column 'version', which is nullable; make it NOT NULL, or name another one in "
            "column_name"
        ),
    ),
}


@pytest.mark.drivers(*ONE_OF_EACH)
@pytest.mark.parametrize("case", REFUSED)
async def test_bad_input(db, operate, case):
    """A2: one clear error each, and nothing half done."""
    setup, table, message = REFUSED[case]
    await db.run(*setup)
    before = {name: set(await columns(db, name)) for name in ("account", "note", table) if name != "nowhere"}
    with pytest.raises(CommandError) as caught:
        await operate(lambda op: op.add_version_column(table))
    assert str(caught.value) == message
    assert before == {name: set(await columns(db, name)) for name in before}
    assert await triggers(db) == []


async def test_bad_input_to_the_others(db, operate):
    """A2, A3: the other operations refuse what they cannot do, with one error each."""
    await db.run("ALTER TABLE account ADD COLUMN rev VARCHAR(20)")
    for steps, message in (
        (
            lambda op: op.add_version_column("account", kind="xmin"),
            "a version column has no kind 'xmin'; use one of 'integer', 'uuid', 'timestamp'",
        ),
        (
            lambda op: op.drop_version_column("account"),
            "table 'account' has no column 'version'; name the right one in column_name",
        ),
        (
            lambda op: op.create_version_trigger("account"),
            "table 'account' has no column 'version'; name the right one in column_name",
        ),
        (
            lambda op: op.create_version_trigger("account", "rev"),
            (
                "column 'rev' of table 'account' is of type VARCHAR(20), and a trigger counts with integers only; leave the "
                "trigger out, or use an integer version"
            ),
        ),
        (lambda op: op.drop_version_trigger("nowhere"), "there is no table 'nowhere'; create it first"),
    ):
        with pytest.raises(CommandError) as caught:
            await operate(steps)
        assert str(caught.value) == message
    assert await triggers(db) == []
