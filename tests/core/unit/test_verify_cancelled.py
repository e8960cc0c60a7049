"""While an unknown COMMIT is asked for: a cancellation, with which the answer is told, and a deadline."""

from __future__ import annotations

import asyncio
import logging

import pytest

from sqla_uow import Status, errors
from tests.kit.waiting import until

pytestmark = pytest.mark.drivers("asyncpg", "psycopg", "asyncmy", "aiomysql")


@pytest.mark.parametrize("applied", [False, True], ids=["before", "after"])
async def test_cancelled_while_it_asks(wire, applied, caplog):
    """C3: it is settled all the same, its hooks run, and it is not run again."""
    caplog.set_level(logging.DEBUG, "sqla_uow")
    await wire.add_one(ambiguous_commit="verify")  # makes MariaDB's marker table, with a COMMIT of its own
    wire.units.clear()
    wire.hooks.clear()

    def vanish():
        wire.proxy.refuse()
        wire.proxy.cut()

    vanished = wire.on_commit(vanish, applied=applied)
    task = asyncio.create_task(wire.add_one(ambiguous_commit="verify", timeout=10))
    assert await asyncio.to_thread(vanished.wait)
    await until(lambda: "asking for the outcome of a COMMIT failed" in caplog.text)
    task.cancel()
    await asyncio.sleep(0)
    assert not task.done()
    wire.proxy.accept()
    with pytest.raises(asyncio.CancelledError) as caught:
        await task
    status = Status.COMMITTED if applied else Status.ROLLED_BACK
    assert [unit.status for unit in wire.units] == [status]
    assert caught.value.__notes__ == [f"sqla_uow: cancelled; the outcome of Wire._body() is: {status.value}"]
    assert wire.hooks == ["after commit" if applied else "after rollback"]
    await wire.until_left()
    assert await wire.balance() == 1 + applied
    assert wire.engine.pool.checkedout() == 0


@pytest.mark.drivers("asyncpg", "psycopg")
async def test_cancelled_while_it_waits_for_the_answer(wire, monkeypatch):
    """C3: the wait for it is bounded then, and the outcome is unknown."""
    monkeypatch.setattr("sqla_uow._unit.commit.COMMIT_SECONDS", 0.2)
    await wire.add_one(ambiguous_commit="verify")
    wire.on_commit("cut", applied=True)
    asked = wire.proxy.on_client_bytes(b"pg_xact_status", "hold", after_server=False)
    task = asyncio.create_task(wire.add_one(ambiguous_commit="verify"))
    assert await asyncio.to_thread(asked.wait)
    task.cancel()
    async with asyncio.timeout(8):
        with pytest.raises(asyncio.CancelledError) as caught:
            await task
    assert caught.value.__notes__ == ["sqla_uow: cancelled; the outcome of Wire._body() is: unknown"]
    assert wire.units[-1].status is Status.AMBIGUOUS
    asked.release()


@pytest.mark.drivers("asyncpg", "psycopg")
async def test_a_question_that_is_not_answered(wire):
    """R6: it is given up at the deadline, and the outcome is unknown."""
    await wire.add_one(ambiguous_commit="verify")
    wire.on_commit("cut", applied=True)
    asked = wire.proxy.on_client_bytes(b"pg_xact_status", "hold", after_server=False)
    async with asyncio.timeout(8):
        with pytest.raises(errors.AmbiguousCommitError):
            await wire.add_one(ambiguous_commit="verify", timeout=1)
    assert asked.fired
    assert wire.units[-1].status is Status.AMBIGUOUS
    assert wire.engine.pool.checkedout() == 0
    asked.release()
