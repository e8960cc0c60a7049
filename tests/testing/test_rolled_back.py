"""`rolled_back`: everything as in production, and nothing of it left."""

from __future__ import annotations

import asyncio

import pytest
from sqlalchemy import event, select, text
from sqlalchemy.engine import Engine
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.util import greenlet_spawn

from sqla_uow import (
    RetryPolicy,
    Status,
    UnitOfWorkManager,
    after_commit,
    current_session,
    current_unit,
    errors,
    transactional,
)
from sqla_uow.testing import rolled_back
from tests.kit.models import Account, Note, Unique

AT_ONCE = RetryPolicy(base=0, cap=0)
STRONGEST = "SERIALIZABLE"


async def notes(session=None):
    """Return the texts of all notes, in a unit of their own."""
    return list(await (session or current_session()).scalars(select(Note.text).order_by(Note.id)))


@transactional
async def write(*texts):
    """Write notes."""
    current_session().add_all([Note(text=text) for text in texts])


@transactional(read_only=True)
async def read():
    """Read them back, in another unit."""
    return await notes()


async def left(db):
    """Return what another connection sees."""
    return await db.scalar("SELECT count(*) FROM note")


async def test_units_commit_for_each_other_and_for_nobody_else(db):
    """A unit sees what those before it committed; another connection never does, and at the end nothing is there."""
    engine = db.engine()
    async with rolled_back(engine) as inside:
        with UnitOfWorkManager(inside).activate():
            await write("first")
            await write("second")
            assert await read() == ["first", "second"]
            assert await left(db) == 0
    assert await left(db) == 0
    assert engine.pool.checkedout() == 0
    with UnitOfWorkManager(engine).activate():
        await write("real")
    assert await left(db) == 1


async def test_a_retry_starts_from_what_was_there_before_its_first_attempt(db):
    """A conflict at the first attempt: the second attempt's rows are visible in the test, hooks run once, none stays."""
    hooks, attempts = [], []

    @transactional(retries=3, retry=AT_ONCE, retry_on=lambda error: isinstance(error, KeyError))
    async def conflicted():
        unit = current_unit()
        attempts.append(unit)
        unit.session.add(Note(text=f"attempt {unit.attempt}"))
        await unit.session.flush()
        after_commit(hooks.append, unit.attempt)
        if unit.attempt == 1:
            raise KeyError

    async with rolled_back(db.engine()) as engine:
        with UnitOfWorkManager(engine).activate():
            await write("before")
            await conflicted()
            assert await read() == ["before", "attempt 2"]
    assert [unit.status for unit in attempts] == [Status.ROLLED_BACK, Status.COMMITTED]
    assert hooks == [2]
    assert await left(db) == 0


async def test_savepoints_and_rollbacks_of_units(db):
    """P1, D1: nested functions, `begin_nested`, a failed unit and a doomed one undo their own part and no more."""

    @transactional(propagation="nested")
    async def fails():
        await write("inner")
        raise KeyError

    @transactional
    async def outer():
        await write("outer")
        with pytest.raises(KeyError):
            await fails()
        async with current_session().begin_nested():
            await write("released")

    @transactional
    async def failing():
        await write("failed")
        await current_session().flush()
        current_unit().doom()

    async with rolled_back(db.engine()) as engine:
        with UnitOfWorkManager(engine).activate():
            await write("before")
            await outer()
            await failing()
            assert await read() == ["before", "outer", "released"]
    assert await left(db) == 0


async def test_hooks_run_after_the_commit_with_the_connection_back(db):
    """H1: an after_commit hook opens a unit of its own and sees what was committed, as in production."""
    seen = []

    async def look():
        seen.append(await read())
        await write("of the hook")

    @transactional
    async def work():
        await write("work")
        after_commit(look)

    async with rolled_back(db.engine()) as engine:
        with UnitOfWorkManager(engine).activate():
            await work()
            assert engine.pool.checkedout() == 0
            assert await read() == ["work", "of the hook"]
    assert seen == [["work"]]
    assert await left(db) == 0


async def test_a_failed_statement_is_undone_with_its_unit(db):
    """A constraint in one unit leaves the next one a sound transaction, on PostgreSQL too."""
    async with rolled_back(db.engine()) as engine:
        with UnitOfWorkManager(engine).activate() as manager:
            async with manager.begin() as unit:
                unit.session.add(Unique(name="taken"))
            with pytest.raises(IntegrityError):
                async with manager.begin() as unit:
                    unit.session.add(Note(text="with it"))
                    await unit.session.flush()
                    unit.session.add(Unique(name="taken"))
            assert unit.status is Status.ROLLED_BACK
            assert await read() == []
            await write("after")
            assert await read() == ["after"]
    assert await left(db) == 0


async def test_a_manager_gives_one_like_it(db):
    """A manager's name, class of session and options are those of the one in the block, which is activated."""

    class MySession(AsyncSession):
        pass

    policy = RetryPolicy(base=0.5)
    maker = async_sessionmaker(db.engine(), class_=MySession, info={"mine": True})
    manager = UnitOfWorkManager(
        maker, name="books", isolation=STRONGEST, retries=7, timeout=9.5, retry=policy, ambiguous_commit="verify"
    )

    @transactional(using="books")
    async def work():
        session = current_session("books")
        assert type(session) is MySession
        assert session.info["mine"]
        session.add(Note(text="book"))
        return session

    async with rolled_back(manager) as inside:
        assert (inside.name, inside.isolation, inside.retries, inside.timeout) == ("books", STRONGEST, 7, 9.5)
        assert inside.retry is policy
        await work()
        async with inside.begin() as unit:
            assert await notes(unit.session) == ["book"]
    assert await left(db) == 0


async def test_a_weaker_level_holds(db):
    """P2: the outer transaction's level is what units have; asking for the same or a weaker one is honoured."""
    weaker = STRONGEST if db.family == "sqlite" else "REPEATABLE READ"
    async with rolled_back(db.engine(), isolation=STRONGEST) as engine:
        manager = UnitOfWorkManager(engine)
        for level in (STRONGEST, weaker):
            async with manager.begin(isolation=level) as unit:
                unit.session.add(Note(text=level))
                if db.family == "postgresql":
                    assert await unit.session.scalar(text("SHOW transaction_isolation")) == "serializable"
    assert await left(db) == 0


@pytest.mark.drivers("asyncpg", "psycopg", "asyncmy", "aiomysql")
async def test_a_stronger_level_is_an_error(db):
    """P2: others run SERIALIZABLE code at the default level without a word."""
    default = "READ COMMITTED" if db.family == "postgresql" else "REPEATABLE READ"
    async with rolled_back(db.engine()) as engine:
        manager = UnitOfWorkManager(engine)
        with pytest.raises(errors.IsolationConflictError) as caught:
            async with manager.begin(isolation=STRONGEST) as unit:
                unit.session.add(Note(text="never"))
        async with manager.begin() as unit:
            assert await notes(unit.session) == []
    assert str(caught.value) == (
        f"a unit needs SERIALIZABLE but rolled_back() has begun at {default}; use rolled_back(..., isolation='SERIALIZABLE')"
    )


async def test_one_in_another_is_an_error(db):
    """A fixture has one already, say."""
    message = r"^rolled_back\(\) got what another rolled_back\(\) has made; one undoes all, leave one out$"
    async with rolled_back(UnitOfWorkManager(db.engine())) as manager:
        for bind in (manager, manager.engine):
            with pytest.raises(errors.PropagationError, match=message):
                rolled_back(bind)
        await write("one")
    assert await left(db) == 0


async def test_two_units_at_once_are_an_error(db):
    """P3: one connection cannot hold two transactions, so `requires_new` in an open unit fails at once, and says why."""

    @transactional(propagation="requires_new")
    async def audit():
        return await notes()

    @transactional
    async def work():
        await write("work")
        await current_session().flush()
        return await audit()

    async with rolled_back(db.engine()) as engine:
        with UnitOfWorkManager(engine).activate():
            with pytest.raises(errors.PropagationError) as caught:
                await work()
            assert await audit() == []
    assert str(caught.value) == (
        f"{audit.__qualname__.rpartition('.')[2]}() needs a connection of its own, but rolled_back() has one for all units; "
        "join the outer unit, or test it on a database of its own"
    )


async def test_tasks_take_turns(db):
    """Units of several tasks wait for each other instead of sharing a transaction."""
    async with rolled_back(db.engine()) as engine:
        with UnitOfWorkManager(engine).activate():
            await asyncio.gather(*[write(f"{number}") for number in range(5)])
            assert sorted(await read()) == list("01234")
    assert await left(db) == 0


async def test_a_read_session_gives_way(db):
    """S7: in a scope the read session and the unit take turns on the one connection."""
    async with rolled_back(db.engine()) as engine:
        manager = UnitOfWorkManager(engine)
        with manager.activate():
            async with manager.scope():
                assert await notes() == []
                await write("one")
                assert await notes() == ["one"]
    assert await left(db) == 0


async def test_read_only_is_refused_and_does_not_last(db):
    """P6: a write in a read-only unit is refused, by text too, and the next unit may write."""
    async with rolled_back(db.engine()) as engine:
        manager = UnitOfWorkManager(engine)
        with pytest.raises(errors.ReadOnlyError):
            async with manager.begin(read_only=True) as unit:
                await notes(unit.session)
                await unit.session.execute(text("INSERT INTO note (text) VALUES ('x')"))
        with manager.activate():
            await read()
            await write("one")
            assert await read() == ["one"]
    assert await left(db) == 0


async def test_a_deadline_does_not_outlive_its_unit(db):
    """R6: what a unit told the server about its time ends with it, though its transaction goes on."""
    async with rolled_back(db.engine()) as engine:
        manager = UnitOfWorkManager(engine)
        for text_ in ("quick", "quicker"):
            async with manager.begin(timeout=0.3) as unit:
                unit.session.add(Note(text=text_))
        if db.family == "postgresql":
            async with manager.begin() as unit:
                await unit.session.execute(text("SELECT pg_sleep(1.6)"))  # transaction_timeout would be 1.3 s
                assert await unit.session.scalar(text("SELECT current_setting('statement_timeout')")) == "0"
        async with manager.begin() as unit:
            assert await notes(unit.session) == ["quick", "quicker"]
    assert await left(db) == 0


@pytest.mark.drivers("asyncpg", "psycopg")
async def test_deferred_constraints_are_checked_at_commit(db):
    """C: what COMMIT checks is checked where a unit commits, and stays deferred in the units that follow."""
    await db.run(
        "CREATE TABLE child (id int PRIMARY KEY, parent int REFERENCES account (id) DEFERRABLE INITIALLY DEFERRED)"
    )
    async with rolled_back(db.engine()) as engine:
        manager = UnitOfWorkManager(engine)
        with pytest.raises(IntegrityError):
            async with manager.begin() as unit:
                await unit.session.execute(text("INSERT INTO child VALUES (1, 1)"))
        async with manager.begin() as unit:
            await unit.session.execute(text("INSERT INTO child VALUES (1, 1)"))
            unit.session.add(Account(id=1))
        async with manager.begin() as unit:
            await unit.session.execute(text("INSERT INTO child VALUES (2, 2)"))
            unit.session.add(Account(id=2))
    assert await db.scalar("SELECT count(*) FROM child") == 0


async def _past_the_engine(engine):
    await greenlet_spawn(engine.pool.dispose)


@pytest.mark.parametrize("dispose", [AsyncEngine.dispose, _past_the_engine], ids=["engine", "pool"])
async def test_an_application_that_disposes_of_its_connections(db, dispose):
    """A shutdown in a test ends no transaction, and connects to nothing that would be committed."""
    async with rolled_back(db.engine()) as engine:
        with UnitOfWorkManager(engine).activate():
            await write("one")
            await dispose(engine)
            await write("two")
            assert await read() == ["one", "two"]
    assert await left(db) == 0


async def test_a_connection_that_is_taken_out_of_the_pool(db):
    """Whoever closes it closes nothing: it is the test's, and the next unit has it."""
    async with rolled_back(db.engine()) as engine:
        with UnitOfWorkManager(engine).activate():
            await write("one")
            async with engine.connect() as connection:
                (await connection.get_raw_connection()).detach()
            await write("two")
            assert await read() == ["one", "two"]
    assert await left(db) == 0


async def test_the_engine_is_of_no_use_after_the_block(db):
    """What would really commit is refused."""
    async with rolled_back(db.engine()) as engine:
        with UnitOfWorkManager(engine).activate():
            await write("inside")
    with UnitOfWorkManager(engine).activate(), pytest.raises(errors.PropagationError) as caught:
        await write("outside")
    assert str(caught.value) == "rolled_back() has ended, and its engine with it; use the engine inside the block"
    assert await left(db) == 0


@pytest.mark.drivers("asyncpg", "psycopg", "asyncmy", "aiomysql")
async def test_a_lost_connection_takes_the_test_with_it(db):
    """What cannot be restored is said: nothing goes on in a fresh transaction that lacks the first half of the test."""
    async with rolled_back(db.engine()) as engine:
        with UnitOfWorkManager(engine).activate() as manager:
            await write("one")
            with pytest.raises(errors.ConflictError):
                async with manager.begin() as unit:
                    await db.kill(unit.session)
                    await unit.session.execute(text("SELECT 1"))
            with pytest.raises(
                errors.PropagationError, match=r"^the transaction of rolled_back\(\) is gone \(\w+\), and"
            ):
                await write("two")
    assert await left(db) == 0


async def test_listeners_of_the_engine_go_along(db):
    """What the application listens to on its engine is told of the units' statements too."""
    engine, statements = db.engine(), []

    @event.listens_for(engine.sync_engine, "before_cursor_execute")
    def seen(_connection, _cursor, statement, *_args):
        statements.append(statement)

    async with rolled_back(engine) as inside:
        with UnitOfWorkManager(inside).activate():
            await write("one")
    assert [statement.split()[0] for statement in statements if "note" in statement] == ["INSERT"]


@pytest.mark.drivers("sqlite")
async def test_a_begin_recipe_of_the_user_is_respected(db):
    """S8, P5: the recipe's BEGIN is the outer transaction's; a second one in it would be an error."""
    engine = db.engine()

    @event.listens_for(engine.sync_engine, "begin")
    def begin(connection):
        connection.exec_driver_sql("BEGIN")

    async with rolled_back(engine) as inside:
        with UnitOfWorkManager(inside).activate():
            await write("one")
            assert await read() == ["one"]
    assert await left(db) == 0


async def test_plain_connections_of_the_engine_are_in_it_too(db):
    """Code beside the units, on the same engine, is rolled back as well."""
    async with rolled_back(db.engine()) as engine:
        async with engine.begin() as connection:
            await connection.execute(text("INSERT INTO note (text) VALUES ('plain')"))
        async with engine.connect() as connection:
            await connection.execute(text("INSERT INTO note (text) VALUES ('not committed')"))
        with UnitOfWorkManager(engine).activate():
            assert await read() == ["plain"]
    assert await left(db) == 0


async def test_other_connections_are_what_they_were(db):
    """What the library does beside a unit, such as making a table, is done on a connection that really commits."""
    engine = db.engine()
    async with engine.begin():
        pass  # the dialect is ready
    async with rolled_back(engine) as inside:
        sync = inside.sync_engine
        twin = sync.pool.recreate()
        beside = AsyncEngine(Engine(twin, sync.dialect, sync.url))
        if db.family == "sqlite":
            async with beside.connect() as connection:
                await connection.execute(text("SELECT 1"))
                await connection.rollback()
        else:
            async with beside.connect() as connection:
                await connection.execution_options(isolation_level=STRONGEST)
                await connection.execute(text("INSERT INTO note (text) VALUES ('undone')"))
                await connection.rollback()
                await connection.execute(text("INSERT INTO note (text) VALUES ('done')"))
                await connection.commit()
        async with beside.connect() as connection:
            await connection.invalidate()
        if db.family == "postgresql":
            reading = beside.execution_options(postgresql_readonly=True)
            async with reading.connect() as connection:
                assert await connection.scalar(text("SHOW transaction_read_only")) == "on"
        await beside.dispose()
    assert await left(db) == (0 if db.family == "sqlite" else 1)


@pytest.mark.drivers("sqlite")
async def test_what_is_neither_engine_nor_manager(db):
    """Refused where it is written."""
    with pytest.raises(TypeError) as caught:
        rolled_back("sqlite://")
    assert str(caught.value) == "rolled_back() got str; pass an AsyncEngine or a UnitOfWorkManager"


@pytest.mark.drivers("asyncmy", "aiomysql")
async def test_ddl_on_mariadb_is_said_to_have_ended_it(db):
    """MariaDB commits at DDL: the unit fails at its end, and so does every one after it."""
    async with rolled_back(db.engine()) as engine:
        manager = UnitOfWorkManager(engine)
        with pytest.raises(DBAPIError):
            async with manager.begin() as unit:
                await unit.session.execute(text("CREATE TABLE extra (id int)"))
        with pytest.raises(errors.PropagationError, match=r"or sends DDL on MariaDB$"):
            async with manager.begin() as unit:
                await notes(unit.session)
