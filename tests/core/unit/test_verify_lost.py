"""C2: what became of a COMMIT whose answer was lost, found out."""

from __future__ import annotations

import asyncio
import logging

import pytest
from sqlalchemy import event, text

from sqla_uow import Status, UnitOfWorkManager, current_session, errors, transactional
from sqla_uow.errors import AmbiguousCommitError
from sqla_uow.testing import FaultPlan
from tests.kit.logged import logged
from tests.kit.models import Note
from tests.kit.waiting import until

pytestmark = pytest.mark.drivers("asyncpg", "psycopg", "asyncmy", "aiomysql")

APPLIED = pytest.mark.parametrize("applied", [False, True], ids=["before", "after"])


async def notes(db):
    """Return what is committed."""
    return [note for (note,) in await db.rows("SELECT text FROM note ORDER BY id")]


@pytest.fixture
async def wire(wire, db):
    """An account behind a proxy, and what verifying needs, as after a first unit."""
    await wire.add_one(ambiguous_commit="verify")  # makes MariaDB's marker table, with a COMMIT of its own
    await db.run("UPDATE account SET balance = 0")
    wire.units.clear()
    wire.hooks.clear()
    return wire


async def has_added_once(wire, *, applied):
    """The counter is exactly 1: the first run was committed, or it was not and the second one is."""
    ended = [Status.COMMITTED] if applied else [Status.ROLLED_BACK, Status.COMMITTED]
    hooks = ["after commit"] if applied else ["after rollback", "after commit"]
    await wire.until_left()
    return await wire.balance() == 1 and [unit.status for unit in wire.units] == ended and wire.hooks == hooks


@APPLIED
async def test_a_lost_answer_is_found_out(wire, applied):
    """C2: committed is success, with its hooks; not committed is retried."""
    lost = wire.on_commit("cut", applied=applied)
    await wire.add_one(ambiguous_commit="verify")
    assert lost.fired
    assert await has_added_once(wire, applied=applied)


@APPLIED
async def test_what_was_sent_on_the_drivers_own_connection(wire, applied):
    """It counts as written, though SQLAlchemy never saw it; else the outcome could not be asked for."""

    @transactional(using=UnitOfWorkManager(wire.engine, ambiguous_commit="verify"), retries=1)
    async def add_one():
        connection = await current_session().connection()
        raw = (await connection.get_raw_connection()).driver_connection
        sql = "UPDATE account SET balance = balance + 1"
        if hasattr(raw, "execute"):
            await raw.execute(sql)
        else:
            async with raw.cursor() as cursor:
                await cursor.execute(sql)

    lost = wire.on_commit("cut", applied=applied)
    await add_one()
    assert lost.fired
    await wire.until_left()
    assert await wire.balance() == 1


@APPLIED
async def test_the_server_may_crash_meanwhile(wire, applied):
    """C2: kill -9 at COMMIT, and a server that comes back: asked until it answers, and answered rightly."""
    server = wire.db.server

    def crash():
        wire.proxy.refuse()
        wire.proxy.cut()
        server.kill()

    crashed = wire.on_commit(crash, applied=applied)
    task = asyncio.create_task(wire.add_one(ambiguous_commit="verify", timeout=30))
    assert await asyncio.to_thread(crashed.wait)
    await asyncio.to_thread(server.restart)
    await wire.db.run("INSERT INTO note (text) VALUES ('by somebody else, before anybody asks')")
    wire.proxy.accept()
    await task
    assert await has_added_once(wire, applied=applied)


@pytest.mark.drivers("asyncpg", "aiomysql")
async def test_a_pool_that_others_hold_is_waited_for(wire, caplog):
    """C2: asked again until the deadline, also where the pool itself gives up."""
    wire.engine.pool._timeout = 0.2
    caplog.set_level(logging.DEBUG, "sqla_uow")
    held = wire.on_commit("hold", applied=True)
    task = asyncio.create_task(wire.add_one(ambiguous_commit="verify", timeout=10))
    assert await asyncio.to_thread(held.wait)
    other = asyncio.ensure_future(wire.engine.connect().__aenter__())  # next in line for the only connection
    await asyncio.sleep(0)
    wire.proxy.cut()
    connection = await other
    message = "asking for the outcome of a COMMIT failed (TimeoutError); asking again"
    await until(lambda: message in caplog.messages, seconds=5)
    await connection.close()
    await task
    assert ("DEBUG", message, {"function": "Wire._body()", "error": "TimeoutError"}) in logged(caplog)
    assert await has_added_once(wire, applied=True)


@pytest.mark.drivers("asyncpg", "psycopg")
async def test_a_question_that_is_lost_is_asked_again(wire):
    """C2: the link is cut once more, under the question itself: that is no answer, and the next one has it."""
    lost = [
        wire.on_commit("cut", applied=True),
        wire.proxy.on_client_bytes(b"pg_xact_status", "cut", after_server=False),
    ]
    await wire.add_one(ambiguous_commit="verify")
    assert all(trigger.fired for trigger in lost)
    assert await has_added_once(wire, applied=True)


@APPLIED
async def test_undecidable_by_the_deadline_is_the_error(wire, applied):
    """C2: nobody can be asked in time; not retried, no hooks."""

    def vanish():
        wire.proxy.refuse()
        wire.proxy.cut()

    wire.on_commit(vanish, applied=applied)
    with pytest.raises(AmbiguousCommitError) as caught:
        await wire.add_one(ambiguous_commit="verify", timeout=0.5)
    assert caught.value.unit is wire.units[0]
    assert [unit.status for unit in wire.units] == [Status.AMBIGUOUS]
    assert wire.hooks == []
    assert wire.engine.pool.checkedout() == 0
    assert await wire.balance() == applied


async def test_the_answer_is_not_given_too_early(wire, monkeypatch):
    """C2: while the lost transaction still lives, nobody can tell; it is asked until it has ended."""
    held = wire.on_commit("hold", applied=False)
    monkeypatch.setattr("sqla_uow._unit.ending.IDLE_SECONDS", 0.2)
    task = asyncio.create_task(wire.add_one(ambiguous_commit="verify", timeout=0.5))
    assert await asyncio.to_thread(held.wait)
    with pytest.raises(AmbiguousCommitError):
        await task
    assert wire.hooks == []


async def a_cluster(_system, _connection):
    """Stand for Galera, which takes half a minute to start and has tests of its own: what is done there is no different."""
    return True


@pytest.mark.drivers("asyncmy", "aiomysql")
async def test_on_a_cluster_the_marker_is_taken(wire, monkeypatch):
    """C2: the probe is committed, so that the COMMIT in question can never come; its row serves another unit later."""
    monkeypatch.setattr("sqla_uow._databases.mariadb.MySQL.may_lose_locks", a_cluster)
    lost = wire.on_commit("cut", applied=False)
    await wire.add_one(ambiguous_commit="verify")
    assert lost.fired
    assert await has_added_once(wire, applied=False)
    markers = await wire.db.rows("SELECT token FROM sqla_uow_commits ORDER BY token")
    assert sorted(wire._managers["verify"]._setup.verifier.markers.free) == [token for (token,) in markers]


@pytest.mark.drivers("asyncmy", "aiomysql")
async def test_on_a_cluster_a_probe_may_be_lost_as_well(wire, monkeypatch):
    """C2: then whose row it is nobody can tell, and that is said."""
    monkeypatch.setattr("sqla_uow._databases.mariadb.MySQL.may_lose_locks", a_cluster)
    both = [wire.on_commit("cut", applied=False), wire.on_commit("cut", applied=True)]
    with pytest.raises(AmbiguousCommitError):
        await wire.add_one(ambiguous_commit="verify")
    assert all(lost.fired for lost in both)
    assert await wire.balance() == 0


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
    told = {"function": "begin()", "error": "ProgrammingError"}
    assert ("WARNING", "the outcome of a COMMIT could not be verified (ProgrammingError)", told) in logged(caplog)
    assert await notes(db) == ["first", "second"]


@pytest.mark.drivers("asyncpg", "psycopg")
async def test_a_transaction_that_the_server_has_not_got_to_yet(db):
    """C2: a number that comes later was forgotten by a server that crashed: what had it is not there."""
    manager = UnitOfWorkManager(db.engine(), ambiguous_commit="verify")
    verification = manager._setup.verifier.verification()
    verification._token = str(2**40 + 5)
    async with manager.engine.connect() as connection:
        assert await verification._ask_status(connection) == "aborted"


@pytest.mark.drivers("asyncmy", "aiomysql")
async def test_a_marker_that_is_still_being_written(db, caplog):
    """C2: its transaction is under way: asked again."""
    caplog.set_level(logging.DEBUG, "sqla_uow")
    manager = UnitOfWorkManager(
        db.engine(connect_args={"init_command": "SET innodb_lock_wait_timeout = 1"}), ambiguous_commit="verify"
    )
    await manager._setup.verifier.markers.make_table()
    verification = manager._setup.verifier.verification()
    verification._token = str(1)
    async with db.outside() as other, manager.engine.connect() as connection:
        await other.execute(text("INSERT INTO sqla_uow_commits (token) VALUES ('1')"))
        assert await verification._ask_marker(connection) == "again"
    message = "probing a commit marker failed (OperationalError); probing again"
    assert logged(caplog) == [("DEBUG", message, {"error": "OperationalError"})]
