"""C2, the quiet days: what verification leaves in the database while no answer is lost."""

from __future__ import annotations

import asyncio
import secrets

import pytest
from sqlalchemy import event, make_url, text
from sqlalchemy.exc import DBAPIError

from sqla_uow import Status, UnitOfWorkManager, current_session, current_unit, transactional
from sqla_uow._unit.markers import MARKERS
from sqla_uow.errors import ConflictError
from tests.kit.models import Account, Note

MARKED = ("sqlite", "asyncmy", "aiomysql")
COUNT = "SELECT count(*) FROM sqla_uow_commits"


async def notes(db):
    """Return what is committed."""
    return [note for (note,) in await db.rows("SELECT text FROM note ORDER BY id")]


@pytest.fixture
async def unmarked(db):
    """The test's database, before anybody has made the marker table in it, and after."""
    await db.run("DROP TABLE IF EXISTS sqla_uow_commits")
    yield db
    await db.run("DROP TABLE IF EXISTS sqla_uow_commits")


@pytest.mark.drivers(*MARKED)
async def test_the_first_unit_makes_the_marker_table(unmarked):
    """Also on SQLite, whose only writer is this unit, and with a pool that has no second connection."""
    engine = unmarked.engine(pool_size=1, max_overflow=0, pool_timeout=5)
    manager = UnitOfWorkManager(engine, ambiguous_commit="verify")
    for key in (1, 2):
        async with manager.begin() as unit:
            unit.session.add(Account(id=key))
        assert unit.status is Status.COMMITTED
    assert await unmarked.rows("SELECT id FROM account ORDER BY id") == [(1,), (2,)]
    assert await unmarked.scalar(COUNT) == 1


@pytest.mark.drivers(*MARKED)
async def test_a_marker_table_that_another_process_has_made(unmarked):
    """It serves both, each with a row of its own."""
    for key in (1, 2):
        async with UnitOfWorkManager(unmarked.engine(), ambiguous_commit="verify").begin() as unit:
            unit.session.add(Account(id=key))
        assert unit.status is Status.COMMITTED
    assert await unmarked.rows("SELECT id FROM account ORDER BY id") == [(1,), (2,)]
    assert await unmarked.scalar(COUNT) == 2


@pytest.mark.drivers("asyncmy", "aiomysql")
async def test_another_process_makes_the_marker_table_meanwhile(unmarked):
    """Between the look whether it is there and its making: that is as good."""
    manager = UnitOfWorkManager(unmarked.engine(), ambiguous_commit="verify")
    made = []

    def make(*_arguments, **_options):
        unmarked.server.execute("CREATE TABLE sqla_uow_commits (token VARCHAR(36) PRIMARY KEY)", database=unmarked.name)
        made.append(True)

    event.listen(MARKERS, "before_create", make)
    try:
        async with manager.begin() as unit:
            unit.session.add(Account(id=1))
    finally:
        event.remove(MARKERS, "before_create", make)
    assert (made, await unmarked.scalar(COUNT)) == ([True], 1)


@pytest.mark.drivers(*MARKED)
async def test_a_marker_serves_one_unit_after_the_other(unmarked):
    """The table has as many rows as there were units at a time, and each unit a token of its own."""
    manager = UnitOfWorkManager(unmarked.engine(), ambiguous_commit="verify")
    tokens = set()
    for key in range(1, 4):
        async with manager.begin() as unit:
            unit.session.add(Account(id=key))
        tokens.update(await unmarked.rows("SELECT token FROM sqla_uow_commits"))
        assert await unmarked.scalar(COUNT) == 1
    assert len(tokens) == 3
    if unmarked.family == "mysql":
        async with manager.begin() as unit, manager.begin(propagation="requires_new") as inner:
            unit.session.add(Account(id=5))
            inner.session.add(Account(id=6))
        assert await unmarked.scalar(COUNT) == 2


@pytest.mark.drivers(*MARKED)
async def test_a_marker_stays_free_when_the_unit_that_takes_it_fails(unmarked):
    """In the body, at its COMMIT, or by somebody who emptied the table: the next unit has one."""
    manager = UnitOfWorkManager(unmarked.engine(), ambiguous_commit="verify")
    async with manager.begin() as unit:
        unit.session.add(Account(id=1))
    for failing in (failing_body, failing_end):
        with pytest.raises(ValueError, match="mine"):
            async with manager.begin() as unit:
                await failing(unit)
    async with manager.begin() as unit:
        unit.session.add(Account(id=2))
    assert await unmarked.scalar(COUNT) == 1
    await unmarked.run("DELETE FROM sqla_uow_commits")
    async with manager.begin() as unit:
        unit.session.add(Account(id=3))
    assert await unmarked.scalar(COUNT) == 1
    assert await unmarked.rows("SELECT id FROM account ORDER BY id") == [(1,), (2,), (3,)]


async def failing_body(unit):
    """Fail before anything was marked."""
    unit.session.add(Account(id=9))
    await unit.session.flush()
    raise ValueError("mine")


async def failing_end(unit):
    """Fail behind the marker, just before COMMIT is sent."""
    unit.session.add(Account(id=9))

    @event.listens_for(unit.session.sync_session, "before_commit", once=True)
    def fail(_session):
        raise ValueError("mine")


@pytest.mark.drivers("asyncmy", "aiomysql")
async def test_a_marker_is_no_conflict_of_its_own(unmarked):
    """innodb_snapshot_isolation: a unit may touch no row that is younger than its snapshot, its marker neither."""
    engine = unmarked.engine()
    event.listen(
        engine.sync_engine, "connect", lambda raw, _: raw.cursor().execute("SET SESSION innodb_snapshot_isolation = ON")
    )
    manager = UnitOfWorkManager(engine, ambiguous_commit="verify")
    async with manager.begin() as unit:
        unit.session.add(Account(id=1))
    async with manager.begin() as early:
        await early.session.scalar(text("SELECT count(*) FROM account"))
        async with manager.begin(propagation="requires_new") as late:
            late.session.add(Account(id=2))
        early.session.add(Account(id=3))
    assert early.status is late.status is Status.COMMITTED
    assert await unmarked.rows("SELECT id FROM account ORDER BY id") == [(1,), (2,), (3,)]


@pytest.mark.drivers("asyncmy", "aiomysql")
async def test_a_marker_table_that_cannot_be_made_rolls_the_unit_back(unmarked):
    """An ending that fails before COMMIT is a rollback: no row, no connection kept, and run again where that may help."""
    engine = unmarked.engine()
    manager = UnitOfWorkManager(engine, ambiguous_commit="verify")
    async with engine.connect():  # the pool's first connection, with what a dialect asks for at its first
        pass

    refusing = True

    @event.listens_for(engine.sync_engine, "do_connect")
    def refuse(*_):
        if refusing:
            raise ConnectionRefusedError

    with pytest.raises(ConflictError) as caught:
        async with manager.begin() as unit:
            unit.session.add(Account(id=1))
    assert (caught.value.reason, type(caught.value.__cause__)) == ("not started", ConnectionRefusedError)
    assert unit.status is Status.ROLLED_BACK
    assert engine.pool.checkedout() == 0
    assert await unmarked.rows("SELECT id FROM account") == []
    statuses = []

    @transactional(using=manager, retries=1)
    async def open_account():
        nonlocal refusing
        current_session(manager).add(Account(id=1))
        current_unit(manager).after_rollback(statuses.append, current_unit(manager))
        refusing = not statuses

    await open_account()
    assert [unit.status for unit in statuses] == [Status.ROLLED_BACK]
    assert await unmarked.rows("SELECT id FROM account") == [(1,)]


@pytest.mark.drivers("asyncmy", "aiomysql")
async def test_a_user_that_may_not_make_the_marker_table(unmarked):
    """C2: what the database says goes on, of a unit that is rolled back; it is no table that is there already."""
    password = secrets.token_hex(8)
    rights = f"SELECT, INSERT, UPDATE, DELETE ON {unmarked.name}.*"
    await unmarked.run(f"GRANT {rights} TO writer@'%' IDENTIFIED BY '{password}'")
    engine = unmarked.engine(url=make_url(unmarked.url).set(username="writer", password=password))
    manager = UnitOfWorkManager(engine, ambiguous_commit="verify")
    with pytest.raises(DBAPIError) as caught:
        async with manager.begin() as unit:
            unit.session.add(Account(id=1))
    await engine.dispose()
    await unmarked.run("DROP USER writer@'%'")
    assert caught.value.orig.args[0] == 1142  # ER_TABLEACCESS_DENIED_ERROR
    assert unit.status is Status.ROLLED_BACK
    assert await unmarked.rows("SELECT id FROM account") == []


@pytest.mark.drivers("asyncmy", "aiomysql")
@pytest.mark.parametrize("of", ["engine", "unit"])
async def test_a_schema_for_each_tenant_needs_no_marker_table_for_each(unmarked, of):
    """The markers stay in the connection's own schema, whichever the map leads the tables of a unit to."""
    tenant = f"{unmarked.name}_tenant"
    await unmarked.run(f"CREATE DATABASE {tenant}", f"CREATE TABLE {tenant}.account LIKE account")
    try:
        schemas = {"schema_translate_map": {None: tenant}}
        engine = unmarked.engine(execution_options=schemas if of == "engine" else {})
        manager = UnitOfWorkManager(engine, ambiguous_commit="verify")
        for key in (1, 2):
            async with manager.begin() as unit:
                if of == "unit":
                    await unit.session.connection(execution_options=schemas)
                unit.session.add(Account(id=key))
            assert unit.status is Status.COMMITTED
        assert await unmarked.rows(f"SELECT id FROM {tenant}.account ORDER BY id") == [(1,), (2,)]
        assert await unmarked.scalar(COUNT) == 1
    finally:
        await unmarked.run(f"DROP DATABASE {tenant}")


@pytest.mark.drivers("asyncmy", "aiomysql")
async def test_two_first_writers_make_the_table_of_markers_once(db):
    """C2: the second waits for the first, and finds it."""
    manager = UnitOfWorkManager(db.engine(), ambiguous_commit="verify")

    async def write(number):
        async with manager.begin() as unit:
            unit.session.add(Note(text=str(number)))

    await asyncio.gather(*(write(number) for number in range(5)))
    assert len(await notes(db)) == 5
