"""What seldom happens to a unit, and has an outcome all the same."""

from __future__ import annotations

import asyncio
import contextlib
import dis
import sys
from types import SimpleNamespace

import anyio
import pytest
from sqlalchemy import event, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.util import greenlet_spawn

import sqla_uow
import sqla_uow.mixins  # whose listeners are then there as well
from sqla_uow import (
    RetryPolicy,
    Status,
    UnitOfWorkManager,
    current_session,
    current_unit,
    errors,
    transactional,
)
from sqla_uow._attempts import loop as _loops
from sqla_uow._databases import interrupt as _settle
from sqla_uow._databases.levels import opening
from sqla_uow._retry.controller import Controller, _Rate
from sqla_uow._retry.gate import _too_late
from sqla_uow._tasks.frames import Frame
from sqla_uow._tasks.shield import shielded
from sqla_uow._unit import commit as _commit
from sqla_uow.testing import FaultPlan
from tests.models import Note, Unique
from tests.queueing import a_turn_that_does_not_come
from tests.waiting import until

AT_ONCE = RetryPolicy(base=0, cap=0)
SERVERS = ("asyncpg", "psycopg", "asyncmy", "aiomysql")


@pytest.fixture
def manager(db):
    """The manager of a fresh database."""
    return UnitOfWorkManager(db.engine())


async def notes(db):
    """Return what is committed."""
    return [note for (note,) in await db.rows("SELECT text FROM note ORDER BY id")]


# -- sessions


async def test_a_session_of_the_units_class_made_by_hand(db, manager):
    """It belongs to no unit, and does what SQLAlchemy's does."""
    async with manager.begin() as unit:
        kind = type(unit.session.sync_session)

    def use():
        session = kind(manager.engine.sync_engine)
        session.add(Note(text="undone"))
        session.flush()
        session.rollback()
        session.merge(Note(text="kept"))
        session.commit()
        session.reset()
        session.invalidate()

    await greenlet_spawn(use)
    assert await notes(db) == ["kept"]


async def test_a_session_whose_unit_has_ended(db, manager):
    """To close it once more, in whichever way, harms nobody."""
    async with manager.begin() as unit:
        unit.session.add(Note(text="kept"))
    for again in (unit.session.close, unit.session.reset, unit.session.invalidate):
        await again()
    assert unit.status is Status.COMMITTED
    assert await notes(db) == ["kept"]


async def test_what_a_listener_adds_while_it_commits(db, manager):
    """SQLAlchemy's own `before_commit` comes when the unit has flushed: what is added there is written as well."""
    async with manager.begin() as unit:
        unit.session.add(Note(text="body"))
        event.listen(
            unit.session.sync_session, "before_commit", lambda session: session.add(Note(text="listener")), once=True
        )
    assert await notes(db) == ["body", "listener"]


async def test_a_second_connection_of_the_units_engine(db, manager):
    """It is a plain one, beside the unit's."""
    async with manager.begin() as unit:
        await unit.session.execute(select(Note))

        def beside(session):
            with session.connection().engine.connect() as connection:
                return connection is not session.connection(), connection.scalar(text("SELECT 1"))

        assert await unit.session.run_sync(beside) == (True, 1)
    assert manager.engine.pool.checkedout() == 0


async def test_a_listener_that_asks_when_its_unit_is_rolled_back(db, caplog):
    """SQLAlchemy's `after_soft_rollback` may use the session: it begins anew, and that ends with the unit."""
    manager = UnitOfWorkManager(db.engine(pool_size=1, max_overflow=0, pool_timeout=5))
    asked = []

    def ask(session, _previous):
        asked.append(session.scalar(text("SELECT 1")))

    with pytest.raises(KeyError):
        async with manager.begin() as unit:
            unit.session.add(Note(text="undone"))
            await unit.session.flush()
            event.listen(unit.session.sync_session, "after_soft_rollback", ask)
            raise KeyError
    assert (asked, caplog.messages) == ([1], [])
    assert unit.status is Status.ROLLED_BACK
    assert manager.engine.pool.checkedout() == 0
    assert await notes(db) == []


async def test_trouble_in_closing_is_no_trouble_of_the_commit(db, manager, caplog):
    """D4: a listener that fails when the objects are let go: it is committed, the hooks run, and the log says so."""
    ran = []

    def fail(_session, _obj):
        raise ZeroDivisionError

    note = Note(text="kept")  # kept alive: nobody would be told of what is collected
    async with manager.begin() as unit:
        unit.session.add(note)
        unit.after_commit(ran.append, "hook")
        event.listen(unit.session.sync_session, "persistent_to_detached", fail)
    assert (unit.status, ran, await notes(db)) == (Status.COMMITTED, ["hook"], ["kept"])
    assert "closing a session after its COMMIT failed (ZeroDivisionError); the work is committed" in caplog.messages
    assert manager.engine.pool.checkedout() == 0


async def test_a_connection_that_its_user_has_invalidated(db, manager):
    """Nothing can be committed on it: nothing is, the connection is gone, and no COMMIT is called unknown."""
    with pytest.raises(Exception) as caught:  # noqa: PT011  # looked at below
        async with manager.begin() as unit:
            unit.session.add(Note(text="lost"))
            await unit.session.flush()
            await (await unit.session.connection()).invalidate()
    assert not isinstance(caught.value, errors.AmbiguousCommitError)
    assert unit.status is Status.ROLLED_BACK
    assert await notes(db) == []
    assert manager.engine.pool.checkedout() == 0


# -- savepoints


async def test_a_nested_function_that_undoes_its_own_savepoint(db, manager):
    """Its exception goes on; there is nothing left to be undone a second time."""

    @transactional(propagation="nested")
    async def inner():
        session = current_session()
        session.add(Note(text="inner"))
        await session.flush()
        await session.get_nested_transaction().rollback()
        raise KeyError

    with manager.activate():
        async with manager.begin() as unit:
            unit.session.add(Note(text="outer"))
            with pytest.raises(KeyError):
                await inner()
    assert await notes(db) == ["outer"]


async def test_a_nested_function_that_never_begins(db, manager):
    """P1: what its caller had not written yet is refused before its savepoint; the caller's own it is."""
    await db.run("INSERT INTO uniq (id, name) VALUES (1, 'taken')")
    ran = []

    @transactional(propagation="nested")
    async def inner():
        ran.append("inner")

    with manager.activate(), pytest.raises(IntegrityError):
        async with manager.begin() as unit:
            unit.session.add(Unique(name="taken"))
            await inner()
    assert (unit.status, ran) == (Status.ROLLED_BACK, [])


@pytest.mark.drivers(*SERVERS)
async def test_a_savepoint_that_cannot_be_set(db, manager):
    """The connection is gone: what joins has not begun, and the unit is run again."""
    units = []

    @transactional(propagation="nested")
    async def inner():
        current_session().add(Note(text="inner"))

    @transactional(retries=1, retry=AT_ONCE)
    async def outer():
        units.append(current_unit())
        await current_session().execute(select(Note))
        if len(units) == 1:
            await db.kill(current_session())
        await inner()

    with manager.activate():
        await outer()
    assert [unit.status for unit in units] == [Status.ROLLED_BACK, Status.COMMITTED]
    assert await notes(db) == ["inner"]


# -- COMMIT


@pytest.mark.drivers("asyncpg", "psycopg")
async def test_an_unknown_outcome_of_a_unit_that_only_reads(db):
    """R2, C1: 40003 at its COMMIT, of a temporary table's constraint, leaves nothing unknown: it is run again."""
    manager = UnitOfWorkManager(db.engine(pool_size=1, max_overflow=0))
    async with manager.begin() as unit:
        for statement in (
            "CREATE TEMPORARY TABLE scratch (id int)",
            (
                "CREATE FUNCTION pg_temp.unknown() RETURNS trigger LANGUAGE plpgsql AS "
                "$$ BEGIN RAISE EXCEPTION 'unknown' USING ERRCODE = '40003'; END $$"
            ),
            (
                "CREATE CONSTRAINT TRIGGER unknown AFTER INSERT ON scratch DEFERRABLE INITIALLY DEFERRED "
                "FOR EACH ROW EXECUTE FUNCTION pg_temp.unknown()"
            ),
            "CREATE FUNCTION pg_temp.fill() RETURNS void LANGUAGE sql AS 'INSERT INTO scratch VALUES (1)'",
        ):
            await unit.session.execute(text(statement))
    units = []

    @transactional(using=manager, retries=1, retry=AT_ONCE, read_only=True)
    async def read():
        units.append(current_unit(manager))
        await current_session(manager).execute(text("SELECT pg_temp.fill()" if len(units) == 1 else "SELECT 1"))

    await read()
    assert [unit.status for unit in units] == [Status.ROLLED_BACK, Status.COMMITTED]


async def test_an_error_of_the_socket_at_commit(db, manager, monkeypatch):
    """R3: raw, as asyncpg lets it through at times, which no server can be made to cause: unknown, and the link given up."""

    def reset(_connection):
        raise ConnectionResetError

    with pytest.raises(errors.AmbiguousCommitError):
        async with manager.begin() as unit:
            unit.session.add(Note(text="unknown"))
            await unit.session.flush()
            monkeypatch.setattr(manager.engine.sync_engine.dialect, "do_commit", reset)
    monkeypatch.undo()
    assert unit.status is Status.AMBIGUOUS
    assert manager.engine.pool.checkedout() == 0


async def test_a_hook_that_fails_when_its_caller_is_cancelled(db, manager, caplog):
    """C3, H2: the cancellation goes on, so the log has what the caller cannot be told."""

    def fail():
        raise ZeroDivisionError

    async def call():
        with FaultPlan(manager, "cancel", at="commit"):
            async with manager.begin() as unit:
                unit.session.add(Note(text="kept"))
                unit.after_commit(fail)

    with pytest.raises(asyncio.CancelledError):
        await asyncio.create_task(call())
    assert "after_commit hook of begin() failed; it is committed" in caplog.messages
    assert await notes(db) == ["kept"]


@pytest.mark.drivers("asyncmy", "aiomysql")
async def test_an_outcome_that_cannot_be_looked_up(db, caplog):
    """C2: somebody drops the table of markers: the outcome stays unknown, and the log says why."""
    engine = db.engine()
    manager = UnitOfWorkManager(engine, ambiguous_commit="verify")
    async with manager.begin() as unit:
        unit.session.add(Note(text="first"))
    with pytest.raises(errors.AmbiguousCommitError), FaultPlan(manager, "lost", at="after commit") as plan:

        @event.listens_for(engine.sync_engine, "do_connect")
        def drop(*_arguments):
            if plan.struck:
                db.server.execute("DROP TABLE IF EXISTS sqla_uow_commits", database=db.name)

        async with manager.begin() as unit:
            unit.session.add(Note(text="second"))
    assert "the outcome of a COMMIT could not be verified (ProgrammingError)" in caplog.messages
    assert await notes(db) == ["first", "second"]


@pytest.mark.drivers("asyncmy", "aiomysql")
async def test_two_first_writers_make_the_table_of_markers_once(db):
    """C2: the second waits for the first, and finds it."""
    manager = UnitOfWorkManager(db.engine(), ambiguous_commit="verify")

    async def write(number):
        async with manager.begin() as unit:
            unit.session.add(Note(text=str(number)))

    await asyncio.gather(*(write(number) for number in range(5)))
    assert len(await notes(db)) == 5


@pytest.mark.drivers("asyncpg")
async def test_an_answer_that_comes_while_the_link_is_cut(db, wire, monkeypatch):
    """C3: the bound for COMMIT is up in the very moment in which the answer is there: it counts."""
    held = wire.on_commit("hold", applied=True)
    manager = UnitOfWorkManager(wire.engine)
    monkeypatch.setattr(_commit, "COMMIT_SECONDS", 0.05)
    # Such a moment cannot be hit; so the answer is let go where the link would be cut.
    monkeypatch.setattr(_commit, "cut", lambda _connection: held.release() or True)

    async def call():
        async with manager.begin() as unit:
            await unit.session.execute(text("UPDATE account SET balance = balance + 1"))
            units.append(unit)

    units = []
    task = asyncio.create_task(call())
    await asyncio.to_thread(held.wait)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert units[0].status is Status.COMMITTED
    assert await wire.balance() == 1


# -- tasks


async def test_a_unit_begun_outside_any_task(db, manager):
    """S3: nobody could be said to use it."""
    caught = []

    def begin():
        entering = manager.begin().__aenter__()
        try:
            entering.send(None)
        except errors.TaskBoundaryError as error:
            caught.append(str(error))

    asyncio.get_running_loop().call_soon(begin)
    await asyncio.sleep(0)
    assert caught == ["begin() was begun outside any task; begin it in a coroutine that a task runs"]


async def test_without_anyio(db, manager, monkeypatch):
    """Nothing of it is needed: COMMIT is shielded from asyncio's cancellations all the same."""
    monkeypatch.delitem(sys.modules, "anyio", raising=False)
    with FaultPlan(manager, "cancel", at="commit"):
        task = asyncio.create_task(write_one(manager))
        with pytest.raises(asyncio.CancelledError):
            await task
    assert await notes(db) == ["one"]


async def write_one(manager):
    """Commit a note."""
    async with manager.begin() as unit:
        unit.session.add(Note(text="one"))


@pytest.mark.drivers("sqlite")
async def test_a_shield_without_time(driver):
    """What may not wait is begun, and not waited for."""
    outcome = await shielded(asyncio.Event().wait, limit=0)
    assert outcome.stop()


@pytest.mark.drivers("sqlite")
def test_the_module_of_errors_is_an_attribute(driver):
    """Also for who has not imported it."""
    assert sqla_uow.__getattr__("errors") is errors


@pytest.mark.drivers("asyncpg", "psycopg")
async def test_an_older_postgresql_has_no_transaction_timeout(db):
    """R6: before 17 the server has statement_timeout alone; the one that runs here is newer, and taken for an older one."""
    engine = db.engine()
    async with engine.connect():
        engine.sync_engine.dialect.server_version_info = (16, 4)
    async with UnitOfWorkManager(engine).begin(timeout=20) as unit:
        late = await unit.session.scalar(text("SELECT current_setting('transaction_timeout')"))
        statement = await unit.session.scalar(text("SELECT current_setting('statement_timeout')"))
    assert (late, statement != "0") == ("0", True)


@pytest.mark.drivers("sqlite")
async def test_a_function_that_needs_what_sqlite_always_gives(db, manager):
    """P2: SERIALIZABLE joins a unit that asks for nothing."""

    @transactional(using=manager, isolation="SERIALIZABLE")
    async def inner():
        current_session(manager).add(Note(text="inner"))

    async with manager.begin():
        await inner()
    assert await notes(db) == ["inner"]


async def test_what_is_asked_for_before_the_first_sql(db, manager):
    """P2: the strongest level that was asked for is compared with the database's own, once that is known."""
    if db.family == "sqlite":
        pytest.skip("SQLite has one level, known without a connection")

    @transactional(using=manager, isolation="READ COMMITTED")
    async def asks():
        pass

    async with manager.begin() as unit:
        await asks()
        await asks()
        unit.session.add(Note(text="kept"))
    assert await notes(db) == ["kept"]


@pytest.mark.drivers(*SERVERS)
async def test_a_read_session_whose_connection_is_lost(db, manager, caplog):
    """S7: what cannot give way is closed, the log says so, and the unit begins on another connection."""
    caplog.set_level("INFO", "sqla_uow")
    with manager.activate():
        async with manager.scope():
            await current_session().execute(select(Note))
            await db.kill(current_session())
            await write_one(manager)
    assert caplog.messages[-1].startswith("the read session could not end its transaction (")
    assert await notes(db) == ["one"]
    assert manager.engine.pool.checkedout() == 0


@pytest.mark.drivers(*SERVERS)
async def test_a_scope_does_not_rest_under_a_statement(db, manager):
    """S3: another task reads; nothing is ended under it."""
    sleep = text("SELECT pg_sleep(0.2)" if db.family == "postgresql" else "SELECT sleep(0.2)")
    with manager.activate():
        async with manager.scope() as scope:
            session = current_session()
            reading = asyncio.create_task(session.execute(sleep))
            await until(lambda: scope.reading.transaction.owner.in_flight is reading, pause=0)
            await scope.rest()
            assert scope.reading.transaction is not None
            await reading


@pytest.mark.drivers("psycopg")
async def test_a_libpq_that_has_no_cancel_request(db, manager, caplog):
    """C3: before 17, whose own way to cancel would block the loop: an interrupted connection is discarded as it is."""
    caplog.set_level("DEBUG", "sqla_uow")

    class Older:
        """Stand for the connection of such a libpq: the one that runs here is newer."""

        def __init__(self, connection):
            self.connection, self.real = connection, connection.pgconn
            connection.pgconn = self

        def __getattr__(self, name):
            return getattr(self.real, name)

        def cancel_conn(self):
            self.connection.pgconn = self.real
            raise self.connection.NotSupportedError

    event.listen(manager.engine.sync_engine, "checkout", lambda lent, *_: Older(lent.driver_connection))

    async def call():
        with anyio.CancelScope() as scopes[0]:
            async with manager.begin() as unit:
                await unit.session.execute(text("SELECT pg_sleep(20)"))

    async def is_running():
        return any(state == "active" for _pid, state in await db.sessions())

    scopes = [None]
    task = asyncio.create_task(call())
    await until(is_running)
    scopes[0].cancel()
    await task
    assert scopes[0].cancelled_caught
    assert "stopping a cancelled statement failed" not in caplog.text
    assert manager.engine.pool.checkedout() == 0


@pytest.mark.drivers("asyncpg", "psycopg")
async def test_a_statement_that_cannot_be_stopped(db, manager, monkeypatch, caplog):
    """C3: there is no time left to stop it, so the log says what its locks do."""
    monkeypatch.setattr(_settle, "SETTLE_SECONDS", 0.0)
    entered = asyncio.Event()

    async def call():
        async with manager.begin() as unit:
            await unit.session.execute(select(Note))
            entered.set()
            await unit.session.execute(text("SELECT pg_sleep(20)"))

    task = asyncio.create_task(call())
    await entered.wait()

    async def is_running():
        return any(state == "active" for _pid, state in await db.sessions())

    await until(is_running)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert any("could not be stopped on the server within 0.0 s" in message for message in caplog.messages)
    assert manager.engine.pool.checkedout() == 0


@pytest.mark.drivers("sqlite")
async def test_a_read_session_that_is_closed_twice(manager):
    """S7: who gives way may find it closed by another task after its wait."""
    with manager.activate():
        async with manager.scope() as scope:
            await current_session().execute(select(Note))
            await asyncio.gather(scope.reading.end(), scope.reading.end())
            assert manager.engine.pool.checkedout() == 0
            assert (await current_session().execute(select(Note))).all() == []


@pytest.mark.drivers("sqlite")
async def test_a_stream_that_is_closed_inside_somebody_elses_scope(manager):
    """S3: the scope there is left as it is."""

    async def stream():
        async with manager.scope():
            yield

    begun = stream()
    await asyncio.create_task(anext(begun))
    with manager.activate():
        async with manager.scope():
            session = current_session()
            await begun.aclose()
            assert current_session() is session


async def test_trouble_in_discarding_a_connection(db, manager, monkeypatch, caplog):
    """D4: a listener that fails when the objects are let go changes nothing about an unknown COMMIT."""
    note = Note(text="unknown")  # kept alive: nobody would be told of what is collected

    def reset(_connection):
        raise ConnectionResetError  # as above

    def fail(_session, _obj):
        raise ZeroDivisionError

    with pytest.raises(errors.AmbiguousCommitError):
        async with manager.begin() as unit:
            unit.session.add(note)
            await unit.session.flush()
            event.listen(unit.session.sync_session, "persistent_to_detached", fail)
            monkeypatch.setattr(manager.engine.sync_engine.dialect, "do_commit", reset)
    monkeypatch.undo()
    assert "discarding a connection failed (ZeroDivisionError)" in caplog.messages
    assert manager.engine.pool.checkedout() == 0


@pytest.mark.drivers("asyncpg", "psycopg")
async def test_a_transaction_that_the_server_has_not_got_to_yet(db):
    """C2: a number that comes later was forgotten by a server that crashed: what had it is not there."""
    manager = UnitOfWorkManager(db.engine(), ambiguous_commit="verify")
    verification = manager._setup.verifier.verification()
    verification._token = str(2**40 + 5)
    async with manager.engine.connect() as connection:
        assert await verification._ask_status(connection) == "aborted"


@pytest.mark.drivers("asyncmy", "aiomysql")
async def test_a_marker_that_is_still_being_written(db):
    """C2: its transaction is under way: asked again."""
    manager = UnitOfWorkManager(
        db.engine(connect_args={"init_command": "SET innodb_lock_wait_timeout = 1"}), ambiguous_commit="verify"
    )
    await manager._setup.verifier.markers.make_table()
    verification = manager._setup.verifier.verification()
    verification._token = str(1)
    async with db.outside() as other, manager.engine.connect() as connection:
        await other.execute(text("INSERT INTO sqla_uow_commits (token) VALUES ('1')"))
        assert await verification._ask_marker(connection) == "again"


@pytest.mark.drivers("sqlite")
def test_a_turn_that_comes_with_the_deadline(driver):
    """R10: who has it keeps it."""
    loop = asyncio.new_event_loop()
    turn = loop.create_future()
    turn.set_result(True)
    _too_late(turn)
    assert turn.result()
    loop.close()


@pytest.mark.drivers("sqlite")
def test_code_that_leads_nowhere(driver):
    """A frame whose next step cannot be told, or is told by another Python, is not taken for a loop."""
    code = test_code_that_leads_nowhere.__code__
    assert not _loops._leads_back(code, 0, 0)
    graph = _loops._graph(code)
    call = next(one for one in dis.get_instructions(code) if one.opname == "CALL")
    assert graph.at(call.offset + 2).offset == call.offset  # its cache
    assert graph.at(-2) is None


@pytest.mark.drivers("sqlite")
def test_another_python(driver, monkeypatch):
    """Whose code is not CPython's; none runs here."""
    monkeypatch.setattr(sys.implementation, "name", "pypy")
    assert not _loops._leads_back.__wrapped__(test_another_python.__code__, 0, 0)


@pytest.mark.drivers("sqlite")
def test_ancestors_that_are_gone(driver):
    """S3: who cannot use a unit any more is passed over."""
    assert list(Frame((), None, None).tasks()) == []


@pytest.mark.drivers("sqlite")
def test_a_database_that_needs_nothing_at_its_begin(driver):
    """P4: what SQLAlchemy tells it is enough; nothing is sent, so there is no connection."""
    opening(None, "oracle", "SERIALIZABLE", read_only=False, seconds=None)


@pytest.mark.drivers("sqlite")
def test_a_driver_whose_statements_nobody_can_stop(driver):
    """C3: its connection is discarded; one of a driver that is not here."""
    other = SimpleNamespace(
        dialect=SimpleNamespace(driver="oracledb"), connection=SimpleNamespace(driver_connection=None)
    )
    _settle.settle(other, None)


# -- attempts


async def test_a_turn_that_does_not_come_in_a_scope(db, manager):
    """R10, S7: the read session had given way for a unit that never began; it is closed, and the next use begins anew."""
    with manager.activate():
        async with manager.scope() as scope:
            await current_session().execute(select(Note))
            async with a_turn_that_does_not_come(manager):
                assert scope.reading.transaction is None
            await current_session().execute(select(Note))
    assert manager.engine.pool.checkedout() == 0


async def test_a_body_that_swallows_its_deadline(db, manager):
    """R6: it comes to its end, too late: rolled back, and the caller is told."""

    async def late(*, cancelled_too):
        async with manager.begin(timeout=0.05) as unit:
            units.append(unit)
            unit.session.add(Note(text="late"))
            await unit.session.flush()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.Event().wait()
            if cancelled_too:
                asyncio.current_task().cancel()

    for cancelled_too in (False, True):
        units = []
        task = asyncio.create_task(late(cancelled_too=cancelled_too))
        with pytest.raises(errors.TransactionTimeoutError):
            await task
        assert units[0].status is Status.ROLLED_BACK
    assert await notes(db) == []
    assert manager.engine.pool.checkedout() == 0


@pytest.mark.drivers(*SERVERS)
async def test_another_failure_after_a_lost_connection_was_swallowed(db, manager):
    """R2: the function has judged it, and failed for a reason of its own: that is not run again."""
    units = []

    @transactional(using=manager, retries=3, retry=AT_ONCE)
    async def work():
        units.append(current_unit(manager))
        session = current_session(manager)
        await db.kill(session)
        with contextlib.suppress(DBAPIError):
            await session.execute(select(Note))
        raise KeyError

    with pytest.raises(KeyError):
        await work()
    assert len(units) == 1


@pytest.mark.drivers("sqlite")
def test_a_narrower_width_that_brings_more_leads_on(driver):
    """R10: while time is wasted, the next one down is tried at once."""
    controller = Controller(lambda: 1.0)
    controller._best, controller._rung = 3, 2
    controller._measured[3] = _Rate().then(10, 1.0, 0.0)
    controller._compare(1.0, 1.0, 100, 0.9, held_back=True)
    assert (controller._best, controller._rung) == (2, 1)
