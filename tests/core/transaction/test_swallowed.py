"""A failure that somebody swallows never ends in a commit without the work, wherever it happens."""

from __future__ import annotations

import contextlib

import pytest
from sqlalchemy import Connection, event, insert, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import async_sessionmaker
from sqlalchemy.orm import Session

from sqla_uow import Status, UnitOfWorkManager, after_commit, errors
from tests.kit.models import Account, Unique

FAILS = "INSERT INTO uniq (id, name) VALUES (7, 'taken')"  # the row is there already


async def _by_session(session):
    await session.execute(text(FAILS))


async def _by_core(session):
    await (await session.connection()).execute(insert(Unique.__table__).values(id=7, name="taken"))


async def _by_driver_sql(session):
    await (await session.connection()).exec_driver_sql(FAILS)


async def _by_flush(session):
    session.add(Unique(id=7, name="taken"))
    try:
        await session.flush()
    finally:
        session.expunge_all()


async def _by_adapter(session):
    def send(sync_session):
        cursor = sync_session.connection().connection.cursor()
        try:
            cursor.execute(FAILS)
        finally:
            cursor.close()

    await session.run_sync(send)


async def _raw(session):
    connection = await session.connection()
    return (await connection.get_raw_connection()).driver_connection


async def _by_raw(session):
    raw = await _raw(session)
    if hasattr(raw, "execute"):  # asyncpg, psycopg, aiosqlite
        await raw.execute(FAILS)
    else:
        async with raw.cursor() as cursor:
            await cursor.execute(FAILS)


async def _by_copy(session):
    raw = await _raw(session)
    if hasattr(raw, "copy_records_to_table"):
        await raw.copy_records_to_table("uniq", records=[(7, "taken")])
    else:
        async with raw.cursor() as cursor, cursor.copy("COPY uniq (id, name) FROM STDIN") as copy:
            await copy.write_row((7, "taken"))


_LATE = {  # fails while rows are fetched, as far as the server sends any before
    "postgresql": "SELECT 1 / (2000 - g) FROM generate_series(1, 9999) g",
    "mysql": "SELECT (SELECT v.id FROM account v WHERE v.id >= a.id) FROM account a ORDER BY a.id DESC",
    "sqlite": "SELECT abs(CASE WHEN id = 1 THEN -9223372036854775808 ELSE id END) FROM account ORDER BY id DESC",
}
_AT_ONCE = {
    "postgresql": "SELECT 1 / (1 - g) FROM generate_series(1, 9999) g",
    "mysql": "SELECT (SELECT u.id FROM uniq u, account v) FROM account a",
    "sqlite": "SELECT abs(-9223372036854775808) FROM account",
}


def _by_fetch(statements):
    async def fetch(session):
        result = await session.stream(text(statements[session.bind.dialect.name.replace("mariadb", "mysql")]))
        async for _ in result:
            pass

    return fetch


async def _by_release(session):
    """The savepoint's own statement was swallowed on the driver's connection, so PostgreSQL refuses the RELEASE."""
    async with session.begin_nested():
        with contextlib.suppress(Exception):
            await _by_raw(session)


PLACES = {
    "session": _by_session,
    "core": _by_core,
    "driver SQL": _by_driver_sql,
    "flush": _by_flush,
    "adapter's cursor": _by_adapter,
    "driver's connection": _by_raw,
    "COPY": _by_copy,
    "late fetch": _by_fetch(_LATE),
    "first fetch": _by_fetch(_AT_ONCE),
    "RELEASE": _by_release,
}


async def _check(db, manager, body):
    """Run `body` after some work, swallow what it raises, and see that nothing is said to be committed."""
    hooks = []
    with pytest.raises(errors.RollbackOnlyError):
        async with manager.begin() as unit:
            unit.session.add_all([Account(id=1), Account(id=2)])
            await unit.session.flush()
            after_commit(hooks.append, "ran")
            with contextlib.suppress(Exception):
                await body(unit.session)
    assert unit.status is Status.ROLLED_BACK
    assert hooks == []
    assert await db.rows("SELECT id FROM account") == []
    async with manager.begin() as unit:  # the pool is sound
        unit.session.add(Account(id=3))
    assert await db.rows("SELECT id FROM account") == [(3,)]


@pytest.mark.parametrize("place", PLACES)
async def test_a_failure_that_the_body_swallows(db, place):
    """On every database alike: PostgreSQL would answer COMMIT by ROLLBACK, the others would commit half."""
    if place == "COPY" and db.family != "postgresql":
        pytest.skip("COPY is PostgreSQL's")
    if place == "RELEASE" and db.family != "postgresql":
        pytest.skip(
            "only PostgreSQL refuses the RELEASE; elsewhere it is a failure on the driver's connection, see there"
        )
    await db.run("INSERT INTO uniq (id, name) VALUES (7, 'taken')")
    await _check(db, UnitOfWorkManager(db.engine(pool_size=1, max_overflow=0)), PLACES[place])


# -- listeners of the user


SESSION_EVENTS = (
    "before_flush",
    "after_flush",
    "after_flush_postexec",
    "before_commit",
    "after_begin",
    "do_orm_execute",
)
ENGINE_EVENTS = (
    "begin", "before_execute", "after_execute", "before_cursor_execute", "after_cursor_execute", "commit", "savepoint",
    "release_savepoint",
)  # fmt: skip


def _failing(armed):
    """Return a listener that sends what fails, once, and swallows it."""

    def listener(*args, **kwargs):
        if armed:
            armed.clear()
            first = args[0]
            connection = next((arg for arg in args if isinstance(arg, Connection)), None)
            if connection is None:
                connection = getattr(first, "session", first).connection()  # of do_orm_execute's state
            with contextlib.suppress(DBAPIError):
                connection.exec_driver_sql(FAILS)
        return args[2:4] if len(args) == 6 else None  # what before_cursor_execute(retval=True) wants

    return listener


async def _everything(session):
    session.add(Account(id=5))
    await session.flush()
    async with session.begin_nested():
        session.add(Account(id=6))
    await session.execute(text("SELECT 1"))


@pytest.mark.parametrize("when", ["before the manager", "after the manager"])
@pytest.mark.parametrize("name", SESSION_EVENTS + ENGINE_EVENTS)
async def test_a_failure_that_a_listener_swallows(db, name, when):
    """Whatever sends it, the work of the unit is not complete."""
    await db.run("INSERT INTO uniq (id, name) VALUES (7, 'taken')")
    engine = db.engine(pool_size=1, max_overflow=0)

    class Own(Session):
        pass

    maker = async_sessionmaker(engine, sync_session_class=Own)
    armed = []
    target = Own if name in SESSION_EVENTS else engine.sync_engine
    options = {"retval": True} if name == "before_cursor_execute" else {}
    if when == "before the manager":
        event.listen(target, name, _failing(armed), **options)
    manager = UnitOfWorkManager(maker)
    if when == "after the manager":
        event.listen(target, name, _failing(armed), **options)
    if name in ("begin", "after_begin"):
        armed.append(1)
    hooks = []
    with pytest.raises((errors.RollbackOnlyError, DBAPIError)) as caught:
        async with manager.begin() as unit:
            after_commit(hooks.append, "ran")
            unit.session.add(Account(id=1))
            await unit.session.flush()
            armed.append(1)
            await _everything(unit.session)
    assert armed == [], "the listener was never called"
    assert unit.status is Status.ROLLED_BACK, caught.value
    assert hooks == []
    assert await db.rows("SELECT id FROM account") == []


class OwnError(Exception):
    """What an application makes of the driver's errors."""


@pytest.mark.parametrize("when", ["before the manager", "after the manager"])
async def test_a_listener_that_translates_errors(db, when):
    """SQLAlchemy stops at the first listener of handle_error that raises; the unit knows all the same."""
    await db.run("INSERT INTO uniq (id, name) VALUES (7, 'taken')")
    engine = db.engine(pool_size=1, max_overflow=0)
    told = []

    def translate(context):
        told.append(context.original_exception)
        raise OwnError from context.sqlalchemy_exception

    if when == "before the manager":
        event.listen(engine.sync_engine, "handle_error", translate)
    manager = UnitOfWorkManager(engine)
    if when == "after the manager":
        event.listen(engine.sync_engine, "handle_error", translate)

    async def fail(session):
        with pytest.raises(OwnError):
            await session.execute(text(FAILS))

    await _check(db, manager, fail)
    assert len(told) == 1


async def test_a_conflict_that_a_listener_translates_is_retried(db, trouble):
    """The unit classifies what the driver said, not what a listener made of it."""
    engine = trouble.engine()

    def translate(context):
        raise OwnError from context.sqlalchemy_exception

    event.listen(engine.sync_engine, "handle_error", translate)
    manager = UnitOfWorkManager(engine)
    async for attempt in manager.attempts(retries=1, isolation=trouble.isolation):
        async with attempt as unit:
            if unit.attempt == 1:
                await trouble.strike(unit.session)
            else:
                await trouble.settle()
                unit.session.add(Account(id=12))
    assert trouble.struck == 1
    assert unit.attempt == 2
    assert await db.rows("SELECT id FROM account WHERE id > 10") == [(12,)]


async def test_a_listener_that_vetoes_the_commit(db):
    """COMMIT was never sent: the outcome is known, whoever the error is of."""
    engine = db.engine(pool_size=1, max_overflow=0)
    manager = UnitOfWorkManager(engine, ambiguous_commit="verify", retries=3)
    runs = 0

    def veto(_connection):
        nonlocal runs
        if runs:
            raise ValueError("not today")

    event.listen(engine.sync_engine, "commit", veto)
    with pytest.raises(ValueError, match="not today"):
        async with manager.begin() as unit:
            runs += 1
            unit.session.add(Account(id=1))
    assert runs == 1
    assert unit.status is Status.ROLLED_BACK
    assert await db.rows("SELECT id FROM account") == []
