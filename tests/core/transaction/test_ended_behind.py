"""A3: a connection in autocommit, and SQL that ends the transaction unseen, are told; never a rollback that keeps rows."""

from __future__ import annotations

import sys

import pytest
from sqlalchemy import MetaData, Table, event, text
from sqlalchemy.exc import DBAPIError

from sqla_uow import Status, UnitOfWorkManager, errors
from tests.kit.models import Account, Base

ADD = text("INSERT INTO account (id, balance) VALUES (:id, 0)")
MARIADB = pytest.mark.drivers("asyncmy", "aiomysql")


async def works(db, manager, key=77):
    """Check that the next unit on the connection rolls back and commits as it should."""
    with pytest.raises(KeyError):
        async with manager.begin() as unit:
            await unit.session.execute(ADD, {"id": key})
            raise KeyError
    async with manager.begin() as unit:
        await unit.session.execute(ADD, {"id": key + 1})
    assert await db.rows(f"SELECT id FROM account WHERE id IN ({key}, {key + 1})") == [(key + 1,)]


def autocommit_by_argument(db):
    """Make an engine as a driver's documentation has it."""
    if db.driver == "sqlite" and sys.version_info < (3, 12):
        pytest.skip("sqlite3 has no such argument before Python 3.12")
    if db.driver == "asyncpg":
        pytest.skip("asyncpg has no such argument; it is in autocommit, and its adapter begins")
    return db.engine(pool_size=1, max_overflow=0, connect_args={"autocommit": True})


def autocommit_by_listener(db):
    """Make an engine whose connections are switched over as soon as they are made."""
    engine = db.engine(pool_size=1, max_overflow=0)

    def switch(dbapi_connection, _record):
        if db.family == "mysql":
            cursor = dbapi_connection.cursor()
            cursor.execute("SET autocommit=1")
            cursor.close()
        elif db.family == "postgresql":
            dbapi_connection.autocommit = True
        elif sys.version_info < (3, 12):
            pytest.skip("sqlite3 has no autocommit before Python 3.12")
        else:
            dbapi_connection.driver_connection._conn.autocommit = True

    event.listen(engine.sync_engine, "connect", switch)
    return engine


@pytest.mark.parametrize("make", [autocommit_by_argument, autocommit_by_listener])
async def test_a_driver_in_autocommit_is_told_at_first_use(db, make):
    """A3: before anything is written that no rollback would take back; no round trip is needed."""
    manager = UnitOfWorkManager(make(db))
    for _ in range(2):
        with pytest.raises(errors.IsolationConflictError, match="in autocommit, where nothing can be rolled back"):
            async with manager.begin() as unit:
                await unit.session.execute(ADD, {"id": 1})
    assert unit.status is Status.ROLLED_BACK
    assert await db.rows("SELECT * FROM account") == []


@pytest.mark.parametrize("swallowed", [False, True])
@pytest.mark.parametrize(
    "sql", ["/* x */ COMMIT", "-- x\nCOMMIT", "/* x */ ROLLBACK", "select 1; commit", "/* x */ commit /* y */"]
)
async def test_control_that_its_text_does_not_show_is_seen_by_its_effect(db, sql, swallowed):
    """A3: the unit is lost for good, loudly; the next one on the connection is sound."""
    manager = UnitOfWorkManager(db.engine(pool_size=1, max_overflow=0))
    with pytest.raises((errors.PropagationError, errors.RollbackOnlyError, DBAPIError)) as caught:
        async with manager.begin() as unit:
            await unit.session.execute(ADD, {"id": 1})
            try:
                connection = await unit.session.connection()
                await connection.exec_driver_sql(sql)
            except errors.PropagationError:
                if not swallowed:
                    raise
            await unit.session.execute(ADD, {"id": 2})
    if not isinstance(caught.value, DBAPIError):  # but for who sends two statements in one, which few drivers do
        assert "cannot be rolled back" in str(caught.value) or "cannot be rolled back" in str(caught.value.__cause__)
    assert unit.status is Status.ROLLED_BACK
    assert await db.rows("SELECT id FROM account WHERE id = 2") == []
    await works(db, manager)


DDL = [
    "TRUNCATE TABLE note", "CREATE TABLE made (id int)", "DROP TABLE IF EXISTS made", "ALTER TABLE note COMMENT 'x'",
    "RENAME TABLE note TO note2", "GRANT SELECT ON nowhere.nothing TO nobody@nowhere", "ANALYZE TABLE note", "FLUSH STATUS",
    "CREATE OR REPLACE VIEW seen AS SELECT 1", "OPTIMIZE LOCAL TABLE note", "SET PASSWORD FOR nobody@nowhere = ''",
]  # fmt: skip


@MARIADB
@pytest.mark.parametrize("sql", DDL)
async def test_what_commits_implicitly_is_refused_once_something_is_written(db, sql):
    """A3: before it is sent, so that the rows go with the rollback, and no retry finds them there twice."""
    manager = UnitOfWorkManager(db.engine(pool_size=1, max_overflow=0))
    with pytest.raises(errors.PropagationError, match="MariaDB commits that first"):
        async with manager.begin() as unit:
            await unit.session.execute(ADD, {"id": 1})
            await unit.session.execute(text(sql))
    assert unit.status is Status.ROLLED_BACK
    assert await db.rows("SELECT * FROM account") == []
    await works(db, manager)


@MARIADB
async def test_tables_may_be_made_before_anything_is_written_and_temporary_ones_always(db):
    """A3: create_all(), which looks what is there already, in a unit that then writes."""
    manager = UnitOfWorkManager(db.engine(pool_size=1, max_overflow=0))
    other = MetaData()
    for name in ("made_one", "made_two"):
        Table(name, other, Base.metadata.tables["account"].c.id._copy())
    async with manager.begin() as unit:
        await unit.session.run_sync(lambda session: other.create_all(session.connection(), checkfirst=False))
        await unit.session.execute(text("CREATE TEMPORARY TABLE scratch (id int)"))
        unit.session.add(Account(id=1))
        await unit.session.flush()
        await unit.session.execute(text("DROP TEMPORARY TABLE scratch"))
    assert unit.status is Status.COMMITTED
    assert await db.rows("SELECT id FROM account") == [(1,)]
    assert await db.rows("SELECT * FROM made_two") == []


@MARIADB
@pytest.mark.parametrize(
    "sql",
    ["SET autocommit=1", "set session autocommit = 1", "SET @@autocommit=1", "LOCK TABLES account WRITE", "UNLOCK TABLES",
     "XA START 'x'"],
)  # fmt: skip
async def test_what_would_outlive_the_unit_on_its_connection_is_refused(db, sql):
    """A3: also before anything is written."""
    manager = UnitOfWorkManager(db.engine(pool_size=1, max_overflow=0))
    with pytest.raises(errors.PropagationError):
        async with manager.begin() as unit:
            await unit.session.execute(text(sql))
    await works(db, manager)


@MARIADB
@pytest.mark.parametrize("swallowed", [False, True])
@pytest.mark.parametrize("body", ["COMMIT;", "CREATE OR REPLACE TABLE made (id int);", "SET autocommit=1;"])
async def test_a_procedure_that_commits_is_seen_by_its_effect(db, body, swallowed):
    """A3: nobody takes a unit half of which is committed for one that was rolled back; nothing leaks."""
    await db.run(f"CREATE OR REPLACE PROCEDURE settle() BEGIN {body} END")
    manager = UnitOfWorkManager(db.engine(pool_size=1, max_overflow=0))
    with pytest.raises((errors.PropagationError, errors.RollbackOnlyError)) as caught:
        async with manager.begin() as unit:
            await unit.session.execute(ADD, {"id": 1})
            try:
                await unit.session.execute(text("CALL settle()"))
            except errors.PropagationError:
                if not swallowed:
                    raise
    assert "committed and cannot be rolled back" in str(caught.value if not swallowed else caught.value.__cause__)
    assert unit.status is Status.ROLLED_BACK
    assert await db.rows("SELECT id FROM account") == [(1,)]  # as the error says
    await works(db, manager)


@MARIADB
async def test_a_procedure_that_writes_is_part_of_the_unit(db):
    """A3: and so is one that only reads."""
    await db.run(
        "CREATE OR REPLACE PROCEDURE add_one() BEGIN INSERT INTO account (id, balance) VALUES (1, 0); END",
        "CREATE OR REPLACE PROCEDURE look() BEGIN SELECT * FROM account; END",
    )
    manager = UnitOfWorkManager(db.engine(pool_size=1, max_overflow=0))
    async with manager.begin() as unit:
        await unit.session.execute(text("CALL look()"))
        await unit.session.execute(text("CALL add_one()"))
        await unit.session.execute(text("CALL look()"))
        await unit.session.execute(ADD, {"id": 2})
    assert len(await db.rows("SELECT id FROM account")) == 2


@pytest.mark.drivers("asyncpg", "psycopg", "asyncmy", "aiomysql")
async def test_a_pool_that_lends_in_the_middle_of_a_transaction_is_told(db):
    """A3: rows of somebody else would be committed with the unit's, or the unit's own BEGIN be none."""
    engine = db.engine(pool_size=1, max_overflow=0)
    manager = UnitOfWorkManager(engine)
    async with engine.connect() as connection:
        raw = (await connection.get_raw_connection()).driver_connection
    # Somebody has kept it, and goes on when it is back in the pool.
    if db.driver == "asyncpg":
        await raw.execute("BEGIN")
        await raw.execute("INSERT INTO account (id, balance) VALUES (1, 0)")
    else:
        async with raw.cursor() as cursor:
            await cursor.execute("INSERT INTO account (id, balance) VALUES (1, 0)")
    with pytest.raises(errors.PropagationError, match="in the middle of a transaction"):
        async with manager.begin() as unit:
            await unit.session.execute(ADD, {"id": 2})
    assert await db.rows("SELECT * FROM account") == []
    await works(db, manager)
