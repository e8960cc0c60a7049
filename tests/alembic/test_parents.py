import asyncio

import pytest
from alembic.util import CommandError
from sqlalchemy import ForeignKey, String, insert, text, update
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from sqla_uow import UnitOfWorkManager
from sqla_uow.alembic import CreateVersionTriggerOp, DropVersionTriggerOp
from sqla_uow.errors import StaleVersionError
from sqla_uow.mixins import Versioned
from tests.alembic.catalog import functions, triggers


class Base(DeclarativeBase):
    pass


class Item(Versioned, Base):
    __tablename__ = "item"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    name: Mapped[str] = mapped_column(String(20), default="")


class Part(Item):
    __tablename__ = "part"
    id: Mapped[int] = mapped_column(ForeignKey("item.id"), primary_key=True, autoincrement=False)
    size: Mapped[int] = mapped_column(default=0)


@pytest.fixture
async def items(db, operate):
    """Two rows of a child with joined inheritance, and a trigger for the parent's table."""
    engine = db.engine()
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    await operate(lambda op: op.create_version_trigger("item"))
    uow = UnitOfWorkManager(engine)
    async with uow.begin() as unit:
        unit.session.add_all([Part(id=1), Part(id=2)])
    return uow


@pytest.fixture
async def parts(operate, items):
    """The same, with a trigger for the child's table as well."""
    await operate(lambda op: op.create_version_trigger("part", parent="item"))
    return items


async def versions(db):
    """Return the versions of the two rows."""
    return [row[0] for row in await db.rows("SELECT version FROM item ORDER BY id")]


@pytest.mark.drivers("asyncpg", "psycopg")
async def test_a_child_that_is_written_past_the_orm_counts(db, parts):
    """A3: once in a transaction; rows that are not meant stay."""
    await db.run("UPDATE part SET size = 1 WHERE id = 1")
    assert await versions(db) == [2, 1]
    await db.run("UPDATE part SET size = 2 WHERE id = 1", "UPDATE part SET size = 3 WHERE id = 1")
    assert await versions(db) == [3, 1]


@pytest.mark.drivers("asyncpg", "psycopg")
async def test_a_child_that_the_orm_writes_counts_once(db, parts):
    """A3: in a flush, in one behind a savepoint, in one of several rows, and in an ORM update()."""
    async with parts.begin() as unit:
        one, two = await unit.session.get_one(Part, 1), await unit.session.get_one(Part, 2)
        one.size = 5
        await unit.session.flush()
        async with unit.session.begin_nested():
            one.size = two.size = 6
        one.size = two.size = 7
    assert await versions(db) == [one.version, two.version] == [4, 3]
    async with parts.begin() as unit:
        await unit.session.execute(update(Part).values(size=8))
    assert await versions(db) == [5, 4]


@pytest.mark.drivers("asyncpg", "psycopg")
async def test_a_write_after_a_savepoint_that_was_rolled_back_counts(db, parts):
    """A3: what was undone has not counted."""
    async with parts.begin() as unit:
        savepoint = await unit.session.begin_nested()
        await unit.session.execute(text("UPDATE part SET size = 1 WHERE id = 1"))
        await savepoint.rollback()
        await unit.session.execute(text("UPDATE part SET size = 1 WHERE id = 2"))
    assert await versions(db) == [1, 2]


@pytest.mark.drivers("asyncpg", "psycopg")
async def test_one_write_behind_another_counts(db, parts):
    """A3: who waited for another's write counts too, though the row was of a transaction in progress when it began."""
    async with db.outside() as first:
        await first.execute(text("UPDATE part SET size = 1 WHERE id = 1"))
        second = asyncio.create_task(db.run("UPDATE part SET size = 2 WHERE id = 1"))
        await db.until_waiting()
        await first.commit()
    await second
    assert await versions(db) == [3, 1]


@pytest.mark.drivers("asyncpg", "psycopg")
async def test_new_in_this_transaction(db, parts):
    """A3: nobody has seen a version of a row that is new, and its first stays."""
    async with parts.begin() as unit:
        await unit.session.execute(insert(Item.__table__).values(id=3, name="", version=1))
        await unit.session.execute(insert(Part.__table__).values(id=3, size=0))
        await unit.session.execute(text("UPDATE part SET size = 1 WHERE id = 3"))
    assert await versions(db) == [1, 1, 1]


@pytest.mark.drivers("asyncpg", "psycopg")
async def test_dropped(db, operate, parts):
    """A3: it is dropped as any other, by its table's name."""
    await operate(lambda op: op.drop_version_trigger("part", parent="item"))
    await db.run("UPDATE part SET size = 1")
    assert await versions(db) == [1, 1]


CHANGES = {
    "the parent's table": ["ALTER TABLE item RENAME TO article"],
    "the child's table": ["ALTER TABLE part RENAME TO piece"],
    "both, and a view of the old name": [
        "ALTER TABLE item RENAME TO article",
        "ALTER TABLE part RENAME TO piece",
        "CREATE VIEW item AS SELECT id, 0 AS version FROM article",
    ],
    "another table gets the parent's name": [
        "ALTER TABLE item RENAME TO article",
        "CREATE TABLE item (id INTEGER PRIMARY KEY, version INTEGER)",
    ],
    "the parent's key": ["ALTER TABLE item RENAME COLUMN id TO number"],
    "the child's key": ["ALTER TABLE part RENAME COLUMN id TO number"],
    "the parent's schema": ["CREATE SCHEMA side", "ALTER TABLE item SET SCHEMA side"],
    "the child's schema": ["CREATE SCHEMA side", "ALTER TABLE part SET SCHEMA side"],
    "both schemas": ["ALTER SCHEMA public RENAME TO side", "CREATE SCHEMA public"],
    "the foreign key": [
        "ALTER TABLE part RENAME CONSTRAINT part_id_fkey TO fk_part",
        "ALTER TABLE item RENAME TO article",
    ],
    "no foreign key": ["ALTER TABLE part DROP CONSTRAINT part_id_fkey"],
}


@pytest.mark.drivers("asyncpg", "psycopg")
@pytest.mark.parametrize("change", CHANGES)
async def test_a_child_counts_after_a_change(db, operate, parts, change):
    """V8: whatever the two tables, their schemas or their keys are called by now; and its trigger is found and dropped."""
    parent, child = [
        (await db.scalar(f"SELECT '{name}'::regclass::oid::int".replace("::", "\\:\\:"))) for name in ("item", "part")
    ]
    await db.run(*CHANGES[change])

    async def named(number):
        statement = "SELECT nspname, relname FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace"
        (found,) = await db.rows(f"{statement} WHERE pg_class.oid = {number}")
        return found

    (parents_schema, parents_name), (schema, name) = await named(parent), await named(child)
    try:
        for expected in (2, 3):
            await db.run(f"UPDATE {schema}.{name} SET size = size + 1")
            found = await db.rows(f"SELECT version FROM {parents_schema}.{parents_name}")
            assert found == [(expected,), (expected,)]
        if change != "no foreign key":
            await operate(lambda op: op.create_version_trigger(name, parent=parents_name, schema=schema))
            await db.run(f"UPDATE {schema}.{name} SET size = size + 1")
            found = await db.rows(f"SELECT version FROM {parents_schema}.{parents_name}")
            assert found == [(4,), (4,)]
            await operate(lambda op: op.drop_version_column(parents_name, schema=parents_schema))
            await db.run(f"UPDATE {schema}.{name} SET size = size + 1")
        else:
            await operate(lambda op: [op.drop_version_trigger("part"), op.drop_version_trigger("item")])
        assert await triggers(db) == []
        assert await functions(db) == []
    finally:
        await db.run("DROP SCHEMA IF EXISTS side CASCADE")


@pytest.mark.drivers("asyncpg", "psycopg")
@pytest.mark.parametrize("plainly", [False, True])
async def test_the_parents_version_is_renamed(db, operate, parts, plainly):
    """V8: the children's triggers count in it under its new name."""

    def rename(op):
        if plainly:
            op.alter_column("article", "version", new_column_name="rev")
        else:
            op.rename_version_column("article", "version", "rev")

    await operate(lambda op: op.rename_table("item", "article"))
    await operate(rename)
    await db.run("UPDATE part SET size = 1 WHERE id = 1", "UPDATE article SET name = 'x' WHERE id = 2")
    assert await db.rows("SELECT rev FROM article ORDER BY id") == [(2,), (2,)]
    await operate(lambda op: op.rename_version_column("article", "rev", "version"))
    await db.run("UPDATE part SET size = 2 WHERE id = 2")
    assert await db.rows("SELECT version FROM article ORDER BY id") == [(2,), (3,)]
    assert len(await triggers(db)) == 2


@pytest.mark.drivers("asyncpg", "psycopg")
async def test_a_key_that_refers_to_two_tables(db, operate):
    """V8: after a rename it still counts in the one that was meant."""
    await db.run(
        "CREATE TABLE a (id INTEGER PRIMARY KEY, version INTEGER NOT NULL)",
        "CREATE TABLE b (id INTEGER PRIMARY KEY, version INTEGER NOT NULL)",
        "CREATE TABLE c (id INTEGER PRIMARY KEY REFERENCES a REFERENCES b, size INTEGER)",
        "INSERT INTO a VALUES (1, 1)",
        "INSERT INTO b VALUES (1, 1)",
        "INSERT INTO c VALUES (1, 1)",
    )
    await operate(lambda op: op.create_version_trigger("c", parent="b"))
    for name in ("b", "z"):
        if name == "z":
            await db.run("ALTER TABLE b RENAME TO z")
        await db.run("UPDATE c SET size = 2")
        assert await db.scalar("SELECT version FROM a") == 1
    assert await db.scalar("SELECT version FROM z") == 3


async def test_a_writer_that_names_the_parent_counts(db, items):
    """A3: on every database, `version = version` in the parent counts by the parent's own trigger, and the ORM is told."""
    with pytest.raises(StaleVersionError):
        async with items.begin() as unit:
            part = await unit.session.get_one(Part, 1)
            await unit.session.execute(text("UPDATE part SET size = 1 WHERE id = 1"))
            await unit.session.execute(text("UPDATE item SET version = version WHERE id = 1"))
            assert await unit.session.scalar(text("SELECT version FROM item WHERE id = 1")) == 2
            part.size = 2
    assert await versions(db) == [1, 1]


async def test_a_parent_that_cannot_be_counted_in(db, operate):
    """A3: another database, or no reference: one clear error."""
    await operate(lambda op: op.add_version_column("account"))
    message = (
        "the primary key of table 'note' is not a foreign key to 'account'; name the parent of its joined inheritance"
        if db.family == "postgresql"
        else f"a trigger of table 'note' cannot count for its parent 'account' on { {'mysql': 'MariaDB', 'sqlite': 'SQLite'}[db.family] }, where it cannot tell "
        "whether the ORM has; leave it out, and where others write 'note' have them set version = version in 'account' "
        "too, which that table's own trigger counts"
    )
    with pytest.raises(CommandError) as caught:
        await operate(lambda op: op.create_version_trigger("note", parent="account"))
    assert str(caught.value) == message


@pytest.mark.drivers("asyncpg", "psycopg")
async def test_not_in_a_script(db, operate):
    """A3: a script is written without a database to ask."""
    with pytest.raises(CommandError) as caught:
        await operate(lambda op: op.create_version_trigger("part", parent="item"), as_sql=True)
    assert str(caught.value) == (
        "how table 'part' refers to its parent 'item' is not known with --sql; run it on a database"
    )


def test_the_reverse_keeps_the_parent():
    """A3: as all arguments."""
    create = CreateVersionTriggerOp("part")
    create.parent = "item"
    assert isinstance(create.reverse(), DropVersionTriggerOp)
    assert vars(create.reverse().reverse()) == vars(create)
