import asyncio
import sqlite3

import pytest
from sqlalchemy import select, text, update

from sqla_uow import UnitOfWorkManager
from sqla_uow.errors import StaleVersionError
from tests.kit.models import Account, Base
from tests.kit.models import Versioned as Row


@pytest.fixture
async def triggered(db, operate):
    """The table of a versioned model, with its trigger and one row."""
    await operate(lambda op: op.create_version_trigger("versioned"))
    await db.run("INSERT INTO versioned (id, value, version) VALUES (1, 0, 5)")
    return UnitOfWorkManager(db.engine())


async def version(db):
    """Return the version of the one row."""
    return await db.scalar("SELECT version FROM versioned")


async def test_a_core_update_counts(db, triggered):
    """A3: a Core UPDATE, which knows no version."""
    table = Base.metadata.tables["versioned"]
    async with triggered.begin() as unit:
        result = await unit.session.execute(update(table).values(value=7))
        assert result.rowcount == 1
    assert await version(db) == 6


async def test_a_text_update_counts(db, triggered):
    """A3: an UPDATE in text()."""
    async with triggered.begin() as unit:
        await unit.session.execute(text("UPDATE versioned SET value = 7"))
    assert await version(db) == 6


async def test_another_tools_update_counts(db, triggered):
    """A3: an UPDATE past SQLAlchemy, on the driver's own connection."""
    async with db.outside() as connection:
        driver = (await connection.get_raw_connection()).driver_connection
        if db.driver == "asyncpg":
            await driver.execute("UPDATE versioned SET value = 7")
        elif db.driver == "sqlite":
            file = db.url.partition("///")[2]
            await asyncio.to_thread(another_program, file)
        else:
            async with driver.cursor() as cursor:
                await cursor.execute("UPDATE versioned SET value = 7")
            await driver.commit()
    assert await version(db) == 6


def another_program(file):
    """Write as a program of another language would."""
    with sqlite3.connect(file) as connection:
        connection.execute("UPDATE versioned SET value = 7")
    connection.close()


async def test_an_orm_update_counts_once(db, triggered):
    """A3: the ORM's own counting is not doubled, and the object knows its version: the next change is no conflict."""
    async with triggered.begin() as unit:
        row = await unit.session.get_one(Row, 1)
        for value in (7, 8, 9):
            row.value = value
            await unit.session.flush()
    assert row.version == 8
    assert await version(db) == 8


@pytest.mark.parametrize("said", [1, 4, 5, 0, -3])
async def test_no_explicit_value_makes_it_fall(db, triggered, said):
    """A3: nor does it stay; a version that comes back would let a client of long ago write (ABA)."""
    await db.run("UPDATE versioned SET version = :said", said=said)
    assert await version(db) == 6


async def test_a_higher_value_is_no_way_back(db, triggered):
    """A3: PostgreSQL and MariaDB count on from the old version, SQLite takes the higher one: it rises in any case."""
    await db.run("UPDATE versioned SET version = 50")
    assert await version(db) == (50 if db.family == "sqlite" else 6)
    await db.run("UPDATE versioned SET version = 1")
    assert await version(db) == (51 if db.family == "sqlite" else 7)


async def test_a_stale_client_is_found_out(db, triggered):
    """A3: the ORM sees that another tool wrote; without the trigger it would overwrite that."""
    with pytest.raises(StaleVersionError):
        async with triggered.begin() as unit:
            row = await unit.session.get_one(Row, 1)
            row.value += 1
            if db.family == "sqlite":  # one writer: the other tool's write is this transaction's
                with unit.session.no_autoflush:
                    await unit.session.execute(text("UPDATE versioned SET value = 7"))
            else:
                await db.run("UPDATE versioned SET value = 7")
            await unit.session.flush()
    assert await db.scalar("SELECT value FROM versioned") == (0 if db.family == "sqlite" else 7)


async def test_recursive_triggers(db, triggered):
    """A3: on SQLite with recursive_triggers the trigger's own UPDATE ends there."""
    if db.family != "sqlite":
        return
    async with db.outside() as connection:
        await connection.execute(text("PRAGMA recursive_triggers = ON"))
        await connection.execute(text("UPDATE versioned SET version = 2"))
        assert (await connection.execute(select(Row.__table__.c.version))).scalar_one() == 6


async def test_a_trigger_made_twice_and_dropped_twice(db, operate, triggered):
    """A3: made anew where it is there, and nothing happens where it is not."""
    await operate(lambda op: op.create_version_trigger("versioned"))
    await db.run("UPDATE versioned SET value = 1")
    assert await version(db) == 6
    for _ in range(2):
        await operate(lambda op: op.drop_version_trigger("versioned"))
    await db.run("UPDATE versioned SET value = 2")
    assert await version(db) == 6


async def test_names_that_need_quotes(db, operate):
    """A3: a table and a column whose names are words of SQL, with a colon and of full length."""
    long = "order:" + "x" * 57
    quote = "`" if db.family == "mysql" else '"'
    await db.run(f"CREATE TABLE {quote}{long}{quote} (id INTEGER PRIMARY KEY, n INTEGER)".replace(":", "\\:"))
    await operate(
        lambda op: [op.add_version_column(long, "group"), op.create_version_trigger(long, "group")],
    )
    table = f"{quote}{long}{quote}".replace(":", "\\:")
    await db.run(f"INSERT INTO {table} (id, n) VALUES (1, 1)", f"UPDATE {table} SET n = 2")
    assert await db.scalar(f"SELECT {quote}group{quote} FROM {table}") == 2
    await operate(lambda op: op.drop_version_column(long, "group"))


def test_the_models_of_these_tests():
    """The rows are of a model whose version SQLAlchemy itself counts; accounts have none."""
    assert Row.__mapper__.version_id_col is not None
    assert Account.__mapper__.version_id_col is None
