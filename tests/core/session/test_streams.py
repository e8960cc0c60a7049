"""A stream is an operation in flight until its last row: nothing passes under it, and no row is silently missing."""

from __future__ import annotations

import asyncio
import contextlib

import pytest
from sqlalchemy import select, text
from sqlalchemy.orm import selectinload

from sqla_uow import Status, UnitOfWorkManager, after_commit, current_session, errors, transactional
from tests.kit.models import Account, Note

ROWS = 300
READING = r"while the rows of a stream of account are still being read(?: by task 'reader')?; read it to its end or close it first"


@pytest.fixture
async def manager(db):
    """A manager with a pool of one connection, and 300 rows."""
    values = ", ".join(f"({number}, 0)" for number in range(1, ROWS + 1))
    await db.run(f"INSERT INTO account (id, balance) VALUES {values}")
    return UnitOfWorkManager(db.engine(pool_size=1, max_overflow=0))


def accounts():
    """Return a SELECT that is read ten rows at a time."""
    return select(Account).order_by(Account.id).execution_options(yield_per=10)


async def _is_sound(manager, db):
    """Another unit on the same connection reads and writes; nothing is left open on the server."""
    async with manager.begin() as unit:
        unit.session.add(Note(text="sound"))
        assert (await unit.session.execute(text("SELECT count(*) FROM account"))).scalar_one() == ROWS
    async with manager.engine.connect() as connection:
        assert (await connection.execute(text("SELECT count(*) FROM note WHERE text = 'sound'"))).scalar_one() == 1


async def _statement(_session):
    await current_session().execute(text("SELECT 1"))


async def _flush(session):
    session.add(Note(text="n"))
    await session.flush()


async def _savepoint(session):
    async with session.begin_nested():
        await session.execute(text("SELECT 1"))


@transactional
async def write():
    """Write a row, joined or as a unit."""
    current_session().add(Note(text="joined"))


async def _joined(_session):
    await write()


@transactional(propagation="nested")
async def nested_write():
    """Write a row behind a savepoint."""
    current_session().add(Note(text="nested"))


async def _nested(_session):
    await nested_write()


async def _second_stream(session):
    await session.stream(select(Account))


UNDER = {
    "statement": _statement, "flush": _flush, "savepoint": _savepoint, "joined call": _joined, "nested call": _nested,
    "second stream": _second_stream,
}  # fmt: skip


@pytest.mark.parametrize("what", UNDER)
async def test_what_is_sent_under_a_stream_is_refused(db, manager, what):
    """MariaDB's drivers would drop the rows that are left; so the rule is the same everywhere."""
    seen = []
    with pytest.raises(errors.PropagationError, match=READING):
        async with manager.begin() as unit:
            async for account in await unit.session.stream_scalars(accounts()):
                seen.append(account.id)
                await UNDER[what](unit.session)
    assert seen == [1]
    assert unit.status is Status.ROLLED_BACK
    assert await db.rows("SELECT id FROM note") == []
    await _is_sound(manager, db)


async def test_a_refusal_that_is_swallowed_dooms(db, manager):
    """What was refused is missing from the transaction."""
    with pytest.raises(errors.RollbackOnlyError):
        async with manager.begin() as unit:
            unit.session.add(Note(text="first"))
            await unit.session.flush()
            async for _ in await unit.session.stream_scalars(accounts()):
                with contextlib.suppress(errors.PropagationError):
                    await unit.session.execute(text("INSERT INTO note (text) VALUES ('second')"))
    assert await db.rows("SELECT id FROM note") == []


@pytest.mark.parametrize("how", ["to its end", "closed", "dropped"])
async def test_after_a_stream_the_unit_goes_on(db, manager, how):
    """Read to its end, closed, or held by nobody any more."""
    async with manager.begin() as unit:
        result = await unit.session.stream_scalars(accounts())
        if how == "to its end":
            assert [account.id async for account in result] == list(range(1, ROWS + 1))
        else:
            async for account in result:
                if account.id == 15:
                    break
        if how == "closed":
            await result.close()
        if how == "dropped":
            del result
        unit.session.add(Note(text="after"))
        await unit.session.flush()
    assert await db.rows("SELECT text FROM note") == [("after",)]
    await _is_sound(manager, db)


async def test_a_stream_that_is_left_in_the_middle_ends_with_the_unit(db, manager):
    """Reading it on says so; no loop ends as if there were no more rows."""
    hooks = []
    async with manager.begin() as unit:
        unit.session.add(Note(text="before"))
        await unit.session.flush()
        after_commit(hooks.append, 1)
        rows = (await unit.session.stream_scalars(accounts())).partitions()
        assert len(await anext(rows)) == 10
        unit.session.add(Note(text="at the end"))
    assert hooks == [1]
    with pytest.raises(errors.NoUnitError, match="were read on after its part of"):
        await anext(rows)
    assert await db.rows("SELECT text FROM note ORDER BY id") == [("before",), ("at the end",)]
    await _is_sound(manager, db)


async def test_a_stream_of_a_savepoint_that_is_undone(manager, db):
    """Its cursor went with the savepoint."""
    async with manager.begin() as unit:
        with pytest.raises(ValueError, match="undo"):
            async with unit.session.begin_nested():
                rows = (await unit.session.stream_scalars(accounts())).partitions()
                assert len(await anext(rows)) == 10
                raise ValueError("undo")
        with pytest.raises(errors.NoUnitError, match="were read on after its part of"):
            await anext(rows)
        unit.session.add(Note(text="after"))
    assert await db.rows("SELECT text FROM note") == [("after",)]
    await _is_sound(manager, db)


@pytest.mark.drivers("asyncmy", "aiomysql")
@pytest.mark.parametrize("swallowed", [False, True])
async def test_a_stream_that_cannot_be_closed(manager, db, swallowed):
    """To close it, the rest of its rows are read: that the connection is lost is found out there, and all is run again."""
    runs = []

    @transactional(using=manager, retries=1)
    async def work():
        session = current_session()
        runs.append(1)
        session.add(Note(text="once"))
        await session.flush()
        number = await session.scalar(text("SELECT connection_id()"))
        result = await session.stream(
            text("SELECT id, REPEAT('x', 100000) FROM account"), execution_options={"yield_per": 10}
        )
        assert len(await result.fetchmany(10)) == 10
        if len(runs) == 1:
            await db.run(f"KILL {number}")
        del result
        with contextlib.suppress(Exception if swallowed else KeyError):
            await session.execute(text("SELECT 1"))

    await work()
    assert len(runs) == 2
    assert await db.rows("SELECT text FROM note") == [("once",)]
    await _is_sound(manager, db)


async def _read_into(result, queue):
    """Put the rows there; the first is SQLAlchemy's, all others this task has fetched."""
    async for row in result:
        await queue.put(row[0])


IN_ORDER = text("SELECT id FROM account ORDER BY id")
SLOW = {  # the 60th row comes late, and those before it do not wait for it in a buffer
    "postgresql": "SELECT id, CASE WHEN id = 60 THEN pg_sleep(0.3) END FROM account ORDER BY id",
    "mysql": "SELECT id, REPEAT('x', 20000), CASE WHEN id = 60 THEN SLEEP(0.3) END FROM account ORDER BY id",
}


@pytest.mark.parametrize("waits", ["for room in the queue", "for rows"])
async def test_a_child_that_still_reads_at_the_end(db, manager, waits):
    """Nothing is committed under its fetch, and the pool is not given a connection in the middle of one."""
    rows = waits == "for rows"
    if rows and db.family == "sqlite":
        pytest.skip("SQLite has no statement that waits between two rows")
    children = []
    with pytest.raises(errors.TaskBoundaryError) as caught:
        async with manager.begin() as unit:
            unit.session.add(Note(text="lost"))
            await unit.session.flush()
            queue = asyncio.Queue(maxsize=0 if rows else 1)
            result = await unit.session.stream(text(SLOW[db.family]) if rows else IN_ORDER)
            children.append(asyncio.create_task(_read_into(result, queue), name="reader"))
            while await queue.get() < (50 if rows else 2):
                pass
    assert "'reader'" in str(caught.value)
    assert unit.status is Status.ROLLED_BACK
    children[0].cancel()
    await asyncio.gather(*children, return_exceptions=True)
    assert await db.rows("SELECT text FROM note") == []
    await _is_sound(manager, db)


async def test_a_statement_under_a_childs_stream(db, manager):
    """The parent's own statement is refused by the names of both tasks, on every driver."""
    child = None
    with pytest.raises(errors.TaskBoundaryError, match="by task 'reader'"):
        async with manager.begin() as unit:
            queue = asyncio.Queue(maxsize=1)
            result = await unit.session.stream(IN_ORDER)
            child = asyncio.create_task(_read_into(result, queue), name="reader")
            await queue.get()
            await queue.get()
            await unit.session.execute(text("SELECT 1"))
    child.cancel()
    await asyncio.gather(child, return_exceptions=True)
    await _is_sound(manager, db)


async def test_a_child_that_is_cancelled_in_a_fetch(db, manager):
    """The unit ends with its own error or none, and the pool is sound."""
    with contextlib.suppress(Exception):
        async with manager.begin() as unit:
            result = await unit.session.stream(IN_ORDER)
            child = asyncio.create_task(_read_into(result, asyncio.Queue()), name="reader")
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            child.cancel()
            await asyncio.gather(child, return_exceptions=True)
    assert unit.status in (Status.ROLLED_BACK, Status.COMMITTED)
    await _is_sound(manager, db)


async def test_reading_does_not_give_way_under_a_stream(db, manager):
    """The end of the read transaction would cut the loop off after a part of the rows, on MariaDB without an error."""
    seen = []
    async with manager.scope():
        with pytest.raises(errors.PropagationError, match="a transactional function was called in the read session"):
            async for account in await current_session().stream_scalars(accounts()):
                seen.append(account.id)
                await write()
        assert seen == [1]
        await write()  # the stream is gone, and the scope goes on
    assert await db.rows("SELECT text FROM note") == [("joined",)]
    await _is_sound(manager, db)


async def test_a_stream_of_the_read_session(manager):
    """All rows, and statements after it."""
    async with manager.scope():
        result = await current_session().stream_scalars(accounts())
        assert len([account async for account in result]) == ROWS
        assert (await current_session().execute(text("SELECT 1"))).scalar_one() == 1


@pytest.mark.drivers("sqlite", "asyncpg", "psycopg")
async def test_selectinload_belongs_to_its_stream(db, manager):
    """Where a connection has room for two results, what is loaded with the rows is loaded under them."""
    await db.run("INSERT INTO note (account_id, text) VALUES (1, 'a'), (250, 'b')")
    async with manager.begin() as unit:
        result = await unit.session.stream_scalars(accounts().options(selectinload(Account.notes)))
        notes = {account.id: [note.text for note in account.notes] async for account in result}
    assert len(notes) == ROWS
    assert (notes[1], notes[250], notes[2]) == (["a"], ["b"], [])


@pytest.mark.drivers("asyncmy", "aiomysql")
async def test_selectinload_under_a_stream_on_mariadb(db, manager):
    """It has room for one: the rows after the first part would be missing."""
    await db.run("INSERT INTO note (account_id, text) VALUES (1, 'a'), (250, 'b')")
    with pytest.raises(errors.PropagationError, match=READING):
        async with manager.begin() as unit:
            async for _ in await unit.session.stream_scalars(accounts().options(selectinload(Account.notes))):
                pass
    await _is_sound(manager, db)


async def test_a_stream_on_the_connection(manager, db):
    """Core's streams are the unit's as well."""
    with pytest.raises(errors.PropagationError, match=READING):
        async with manager.begin() as unit:
            connection = await unit.session.connection()
            async with connection.stream(select(Account.id).order_by(Account.id)) as rows:
                async for _ in rows:
                    await connection.execute(text("SELECT 1"))
    await _is_sound(manager, db)
