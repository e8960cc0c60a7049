"""What would get around the unit behind its back is refused."""

from __future__ import annotations

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import async_sessionmaker

from sqla_uow import Status, UnitOfWorkManager, errors
from tests.kit.models import Account


@pytest.mark.drivers("asyncpg", "psycopg", "asyncmy", "aiomysql")
async def test_autocommit_through_execution_options_is_refused(db):
    """P4: in AUTOCOMMIT the unit could not roll back; the level is the unit's to choose."""
    manager = UnitOfWorkManager(db.engine(pool_size=1, max_overflow=0))
    with pytest.raises(errors.IsolationConflictError) as caught:
        async with manager.begin() as unit:
            await unit.session.connection(execution_options={"isolation_level": "AUTOCOMMIT"})
    assert str(caught.value) == (
        "begin() was given isolation_level 'AUTOCOMMIT' through execution options; say isolation= where the unit is begun"
    )
    assert unit.status is Status.ROLLED_BACK
    with pytest.raises(ValueError, match="undone"):
        async with manager.begin() as unit:
            await unit.session.execute(text("INSERT INTO account (id, balance) VALUES (1, 0)"))
            raise ValueError("undone")
    assert await db.rows("SELECT * FROM account") == []


@pytest.mark.drivers("sqlite")
async def test_a_maker_in_two_phases_is_refused(db):
    """S8: the end of a unit is one COMMIT."""
    with pytest.raises(TypeError) as caught:
        UnitOfWorkManager(async_sessionmaker(db.engine(), twophase=True))
    assert str(caught.value) == (
        "the sessionmaker has twophase=True, but a unit is one transaction on one engine; leave it out"
    )


@pytest.mark.drivers("sqlite")
async def test_a_maker_without_autobegin_still_makes_units(db):
    """S8: the unit begins, whatever the maker says about sessions that users begin themselves."""
    manager = UnitOfWorkManager(async_sessionmaker(db.engine(), autobegin=False))
    async with manager.begin() as unit:
        unit.session.add(Account(id=1))
    assert await db.rows("SELECT id FROM account") == [(1,)]


@pytest.mark.drivers("asyncpg", "psycopg")
async def test_a_swallowed_error_while_rows_are_fetched_dooms(db):
    """D3: PostgreSQL would answer the COMMIT by a ROLLBACK, whether the statement failed at once or in its tenth row."""
    manager = UnitOfWorkManager(db.engine(pool_size=1, max_overflow=0))
    with pytest.raises(errors.RollbackOnlyError) as caught:
        async with manager.begin() as unit:
            await unit.session.execute(text("INSERT INTO account (id, balance) VALUES (1, 0)"))
            rows = await unit.session.stream(text("SELECT 1 / (2000 - g) FROM generate_series(1, 9999) g"))
            # Of asyncpg's own class: SQLAlchemy wraps none here.
            with pytest.raises(Exception, match="division by zero") as failed:
                await anext(rows.partitions(9999))
    assert caught.value.__cause__ is failed.value
    assert unit.status is Status.ROLLED_BACK
    assert await db.rows("SELECT * FROM account") == []


@pytest.mark.parametrize("sql", ["COMMIT", " rollback", "START TRANSACTION", "End"])
async def test_ending_the_transaction_as_sql_is_refused(db, sql):
    """D3: the server would end it without a word to SQLAlchemy, and the unit would report a commit."""
    manager = UnitOfWorkManager(db.engine())
    with pytest.raises(errors.PropagationError, match=r"was sent as SQL inside begin\(\), which begins and ends"):
        async with manager.begin() as unit:
            await unit.session.execute(text("INSERT INTO account (id, balance) VALUES (1, 0)"))
            await unit.session.execute(text(sql))
    assert unit.status is Status.ROLLED_BACK
    assert await db.rows("SELECT * FROM account") == []


async def test_rolling_back_to_a_savepoint_as_sql_is_not(db):
    """A savepoint of one's own is no end of the transaction."""
    manager = UnitOfWorkManager(db.engine())
    async with manager.begin() as unit:
        await unit.session.execute(text("INSERT INTO account (id, balance) VALUES (1, 0)"))
        await unit.session.execute(text("SAVEPOINT mine"))
        await unit.session.execute(text("INSERT INTO account (id, balance) VALUES (2, 0)"))
        await unit.session.execute(text("ROLLBACK TO SAVEPOINT mine"))
    assert await db.rows("SELECT id FROM account") == [(1,)]


@pytest.mark.drivers("sqlite")
async def test_another_bind_is_refused(db):
    """S8: a statement that is meant for another database does not run in this one."""
    manager, other = UnitOfWorkManager(db.engine()), db.engine()
    async with manager.begin() as unit:
        with pytest.raises(errors.PropagationError, match="was sent to another bind"):
            await unit.session.execute(text("SELECT 1"), bind_arguments={"bind": other.sync_engine})
        assert await unit.session.scalar(text("SELECT 1")) == 1
