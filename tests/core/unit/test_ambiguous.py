"""C1, R3: COMMIT was sent and its answer is lost."""

from __future__ import annotations

import asyncio

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, IntegrityError

from sqla_uow import RetryPolicy, Status, UnitOfWorkManager, current_session, current_unit, transactional
from sqla_uow._unit import commit as _commit
from sqla_uow._unit import ending as _ending
from sqla_uow.errors import AmbiguousCommitError

pytestmark = pytest.mark.drivers("asyncpg", "psycopg", "asyncmy", "aiomysql")

APPLIED = pytest.mark.parametrize("applied", [False, True], ids=["before", "after"])
UNKNOWN = (
    "COMMIT of Wire._body() was sent and its answer is unknown; look in the database whether the work is there before "
    "doing it again, or let ambiguous_commit='verify' look"
)
AT_ONCE = RetryPolicy(base=0, cap=0)


@pytest.fixture
def impatient(monkeypatch):
    """Bounds of a fifth of a second; psycopg alone would wait 5 s for the answer to its cancel request."""
    monkeypatch.setattr("sqla_uow._unit.commit.COMMIT_SECONDS", 0.2)
    monkeypatch.setattr("sqla_uow._unit.ending.IDLE_SECONDS", 0.2)


@APPLIED
async def test_a_lost_answer_is_never_retried(wire, applied):
    """C1, T3: one run though there are retries, no hooks, the unit and the cause on the error, nothing left behind."""
    lost = wire.on_commit("cut", applied=applied)
    with pytest.raises(AmbiguousCommitError) as caught:
        await wire.add_one()
    assert lost.fired
    assert str(caught.value) == UNKNOWN
    assert wire.hooks == []
    assert [unit.status for unit in wire.units] == [Status.AMBIGUOUS]
    assert caught.value.unit is wire.units[0]
    assert isinstance(caught.value.__cause__, DBAPIError)
    assert wire.engine.pool.checkedout() == 0
    assert await wire.balance() == applied


@APPLIED
async def test_an_answer_that_does_not_come_until_the_deadline_is_lost(wire, applied, impatient):
    """C1, R6: held back, the COMMIT is given up at the deadline; its connection never serves again."""
    await wire.add_one()
    held = wire.on_commit("hold", applied=applied)
    with pytest.raises(AmbiguousCommitError, match="its answer is unknown") as caught:
        await wire.add_one(timeout=0.5)
    assert held.fired
    assert (type(caught.value.__cause__), str(caught.value.__cause__)) == (
        TimeoutError,
        "COMMIT was not answered in time",
    )
    assert caught.value.unit is wire.units[-1]
    assert [unit.status for unit in wire.units] == [Status.COMMITTED, Status.AMBIGUOUS]
    assert wire.engine.pool.checkedout() == 0
    held.release()
    await wire.add_one()
    assert wire.connected == 2
    await wire.until_left()
    assert await wire.balance() in {2 + applied, 3}  # held before the server, it may have arrived in the end


@APPLIED
async def test_the_connection_of_a_lost_answer_is_not_used_again(wire, applied):
    """C1: whatever still arrives on it reaches nobody."""
    await wire.add_one()
    wire.on_commit("cut", applied=applied)
    with pytest.raises(AmbiguousCommitError):
        await wire.add_one()
    await wire.add_one()
    assert wire.connected == 2
    assert wire.hooks == ["after commit"] * 2
    assert await wire.balance() == 2 + applied


@APPLIED
async def test_a_read_only_units_lost_answer_is_retried(wire, applied):
    """C2: nothing was written, so nothing is unknown."""
    lost = wire.on_commit("cut", applied=applied)
    await wire.add_one(read_only=True)
    assert lost.fired
    assert [unit.status for unit in wire.units] == [Status.ROLLED_BACK, Status.COMMITTED]
    assert wire.hooks == ["after rollback", "after commit"]


async def test_a_cancelled_commit_is_given_up_after_a_while(wire, impatient):
    """C3: bounded; then the outcome is unknown, no hook runs, the connection is discarded, the cancellation goes on."""
    held = wire.on_commit("hold", applied=False)
    task = asyncio.create_task(wire.add_one())
    assert await asyncio.to_thread(held.wait)
    task.cancel()
    with pytest.raises(asyncio.CancelledError) as caught:
        await task
    assert caught.value.__notes__ == ["sqla_uow: cancelled; the outcome of Wire._body() is: unknown"]
    assert wire.units[0].status is Status.AMBIGUOUS
    assert wire.hooks == []
    assert wire.engine.pool.checkedout() == 0
    wire.proxy.cut()
    await wire.add_one()
    assert wire.connected == 2
    assert await wire.balance() == 1


async def test_a_cancelled_commit_is_waited_for(wire):
    """C3: an answer within the bound counts: committed, hooks run, and then the cancellation goes on."""
    held = wire.on_commit("hold", applied=True)
    task = asyncio.create_task(wire.add_one())
    assert await asyncio.to_thread(held.wait)
    task.cancel()
    await asyncio.sleep(0)
    assert not task.done()
    held.release()
    with pytest.raises(asyncio.CancelledError) as caught:
        await task
    assert caught.value.__notes__ == ["sqla_uow: cancelled; the outcome of Wire._body() is: committed"]
    assert wire.units[0].status is Status.COMMITTED
    assert wire.hooks == ["after commit"]
    assert await wire.balance() == 1


@pytest.mark.drivers("asyncpg", "psycopg")
async def test_a_refusal_at_commit_is_no_lost_answer(db):
    """R3: a deferred constraint fails at COMMIT: rolled back, the error itself to the caller, the connection kept."""
    await db.run("CREATE TABLE child (id int, parent int REFERENCES account DEFERRABLE INITIALLY DEFERRED)")
    engine = db.engine(pool_size=1, max_overflow=0)
    manager, hooks = UnitOfWorkManager(engine, retries=5), []
    with pytest.raises(IntegrityError) as caught:
        async with manager.begin() as unit:
            unit.after_commit(hooks.append, 1)
            number = await unit.session.scalar(text("SELECT pg_backend_pid()"))
            await unit.session.execute(text("INSERT INTO child VALUES (1, 99)"))
    assert caught.value.orig.sqlstate == "23503"
    assert (unit.status, hooks) == (Status.ROLLED_BACK, [])
    assert engine.pool.checkedout() == 0
    async with manager.begin() as unit:
        assert await unit.session.scalar(text("SELECT pg_backend_pid()")) == number
    assert await db.rows("SELECT * FROM child") == []


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


@pytest.mark.drivers("asyncpg")
async def test_an_answer_that_comes_while_the_link_is_cut(db, wire, monkeypatch):
    """C3: the bound for COMMIT is up in the very moment in which the answer is there: it counts."""
    held = wire.on_commit("hold", applied=True)
    manager = UnitOfWorkManager(wire.engine)
    monkeypatch.setattr(_commit, "COMMIT_SECONDS", 0.05)
    # Such a moment cannot be hit; so the answer is let go where the link would be cut.
    monkeypatch.setattr(_ending, "break_link", lambda _connection: held.release() or True)

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
