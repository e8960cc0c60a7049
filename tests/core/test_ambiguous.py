"""C1, R3: COMMIT was sent and its answer is lost."""

from __future__ import annotations

import asyncio

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, IntegrityError

from sqla_uow import Status, UnitOfWorkManager
from sqla_uow.errors import AmbiguousCommitError

pytestmark = pytest.mark.drivers("asyncpg", "psycopg", "asyncmy", "aiomysql")

APPLIED = pytest.mark.parametrize("applied", [False, True], ids=["before", "after"])
UNKNOWN = (
    "COMMIT of Wire._body() was sent and its answer is unknown; look in the database whether the work is there before "
    "doing it again, or let ambiguous_commit='verify' look"
)


@pytest.fixture
def impatient(monkeypatch):
    """Bounds of a fifth of a second; psycopg alone would wait 5 s for the answer to its cancel request."""
    monkeypatch.setattr("sqla_uow._unit.commit.COMMIT_SECONDS", 0.2)
    monkeypatch.setattr("sqla_uow._unit.rollback.IDLE_SECONDS", 0.2)


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
