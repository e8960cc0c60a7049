"""How long hooks may take: as long as they like, unless their caller is cancelled."""

from __future__ import annotations

import asyncio
import traceback

import pytest
from sqlalchemy import insert

from sqla_uow import UnitOfWorkManager, after_commit, after_rollback, before_commit, current_session, transactional
from sqla_uow.errors import AfterCommitError
from tests.kit.models import Note


@pytest.fixture
def manager(db):
    """Provide a manager that is activated."""
    manager = UnitOfWorkManager(db.engine())
    with manager.activate():
        yield manager


async def write():
    """Send one row."""
    await current_session().execute(insert(Note).values(text="written"))


@pytest.mark.parametrize("register", [after_commit, after_rollback])
async def test_without_a_cancellation_they_are_not_stopped(manager, monkeypatch, register):
    """The bound is for callers who want to leave."""
    monkeypatch.setattr("sqla_uow._transaction.hooks.HOOK_SECONDS", 0.01)
    calls = []

    async def take_long():
        await asyncio.sleep(0.1)
        calls.append("done")

    @transactional
    async def work():
        register(take_long)
        if register is after_rollback:
            raise KeyError

    outcome = await asyncio.gather(work(), return_exceptions=True)
    assert calls == ["done"]
    assert [type(one) for one in outcome] == [KeyError if register is after_rollback else type(None)]


@pytest.mark.parametrize("register", [after_commit, after_rollback])
async def test_a_cancellation_before_them_bounds_them_too(manager, db, monkeypatch, register):
    """Of the body, or of the COMMIT: the caller waits for hooks that hang no longer than if it came under them.

    Those behind them never run: their caller has gone.
    """
    monkeypatch.setattr("sqla_uow._transaction.hooks.HOOK_SECONDS", 0.1)
    stopped = []

    async def hang():
        try:
            await asyncio.Event().wait()
        finally:
            stopped.append("the first")

    @transactional
    async def work():
        await write()
        register(hang)
        register(stopped.append, "the next")
        if register is after_rollback:
            task.cancel()
            await asyncio.sleep(0)
        before_commit(task.cancel)  # reaches it at its next wait, which is for the answer to COMMIT

    task = asyncio.create_task(work())
    done, _ = await asyncio.wait({task}, timeout=5)
    assert done
    assert task.cancelled()
    assert stopped == ["the first"]
    assert await db.rows("SELECT text FROM note") == ([("written",)] if register is after_commit else [])


async def test_a_hook_that_awaits_what_was_cancelled_says_by_what(manager):
    """The cancellation is the cause of its failure: its traceback leads to the hook."""

    async def wait_in_vain():
        other = asyncio.create_task(asyncio.sleep(60))
        other.cancel()
        await other

    @transactional
    async def work():
        after_commit(wait_in_vain)

    with pytest.raises(AfterCommitError) as caught:
        await work()
    (failure,) = caught.value.exceptions
    cause = failure.__cause__
    assert type(cause) is asyncio.CancelledError
    assert "wait_in_vain" in [frame.name for frame in traceback.extract_tb(cause.__traceback__)]
