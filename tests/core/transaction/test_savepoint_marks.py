"""Which savepoints take a failure back, and which hooks they take along: what stands on the stack, and where."""

from __future__ import annotations

import contextlib

import pytest
from sqlalchemy import event, insert
from sqlalchemy.exc import IntegrityError, SAWarning, SQLAlchemyError

from sqla_uow import UnitOfWorkManager, after_commit, current_session, errors, transactional
from tests.kit.models import Note, Unique


@pytest.fixture
async def manager(db):
    """Provide a manager, and a key that is taken."""
    await db.run("INSERT INTO uniq (id, name) VALUES (1, 'taken')")
    return UnitOfWorkManager(db.engine())


@pytest.fixture
def run(manager, db):
    """Run a function as a unit; return its error, the hooks that ran, and what is durable."""

    async def run(body):
        hooks = []
        error = None

        @transactional
        async def work():
            after_commit(hooks.append, "committed")
            await body(hooks)

        with manager.activate():
            try:
                await work()
            except errors.UnitOfWorkError as raised:
                error = raised
        return error, hooks, [text for (text,) in await db.rows("SELECT text FROM note ORDER BY id")]

    return run


async def write(text):
    """Send one row."""
    await current_session().execute(insert(Note).values(text=text))


async def violate():
    """Meet a unique key, and swallow it."""
    with contextlib.suppress(IntegrityError):
        await current_session().execute(insert(Unique).values(name="taken"))


async def test_an_outer_savepoint_takes_the_inner_one_along(run):
    """Rolled back by hand, with another one open inside: its own hooks are dropped, and its failure is forgotten."""

    async def body(hooks):
        await write("around")
        connection = await current_session().connection()
        outer = await connection.begin_nested()
        after_commit(hooks.append, "outer")
        await write("outer")
        await connection.begin_nested()
        after_commit(hooks.append, "inner")
        await violate()
        with pytest.warns(SAWarning, match="already deassociated"):
            await outer.rollback()
        await write("afterwards")

    assert await run(body) == (None, ["committed"], ["around", "afterwards"])


async def test_a_joined_call_that_fails_is_taken_back_by_the_savepoint_around_it(run):
    """Its error left the savepoint, so what it did is undone, and the rest is sound."""

    @transactional
    async def joined():
        await write("inner")
        raise KeyError

    async def body(_hooks):
        await write("around")
        with contextlib.suppress(KeyError):
            async with current_session().begin_nested():
                await joined()

    assert await run(body) == (None, ["committed"], ["around"])


async def test_a_release_that_a_listener_refuses_dooms(run, manager):
    """SQLAlchemy says it has rolled back the savepoint, and sends nothing: its rows would be committed."""

    def refuse(_connection, _name, _context):
        raise ValueError("mine")

    event.listen(manager.engine.sync_engine, "release_savepoint", refuse)

    async def body(_hooks):
        await write("around")
        with contextlib.suppress(ValueError):
            async with current_session().begin_nested():
                await write("inner")

    error, hooks, rows = await run(body)
    assert type(error) is errors.RollbackOnlyError
    assert (hooks, rows) == ([], [])


async def test_a_savepoint_that_is_begun_after_a_failure_does_not_take_it_back(run):
    """Its SAVEPOINT is refused, and SQLAlchemy rolls it back: what failed before it stays failed."""

    async def body(_hooks):
        await write("around")
        savepoint = await current_session().begin_nested()
        await violate()
        with contextlib.suppress(errors.RollbackOnlyError):
            await savepoint.commit()
        with contextlib.suppress(SQLAlchemyError, errors.UnitOfWorkError):
            await savepoint.rollback()
        with contextlib.suppress(errors.RollbackOnlyError):
            async with current_session().begin_nested():
                await write("inner")

    error, hooks, rows = await run(body)
    assert type(error) is errors.RollbackOnlyError
    assert (hooks, rows) == ([], [])
