"""What is not run again, whatever `retry_on` says."""

from __future__ import annotations

import asyncio

import pytest

from sqla_uow import UnitOfWorkManager, after_commit, current_session, errors, transactional
from tests.kit.models import Note


async def is_cancelled(_):
    """Be cancelled."""
    raise asyncio.CancelledError


async def exits(_):
    """End the program."""
    raise SystemExit


async def takes_too_long(_):
    """Go on for longer than there is time."""
    await asyncio.sleep(5)


async def has_a_hook_that_fails(_):
    """Let what comes after the commit fail."""
    after_commit(int, "fails")


async def has_a_commit_without_an_answer(monkeypatch):
    """Let the socket break at COMMIT, as no server can be made to do on each driver."""

    def reset(_connection):
        raise ConnectionResetError

    monkeypatch.setattr(current_session().bind.sync_engine.dialect, "do_commit", reset)


@pytest.mark.parametrize(
    ("body", "raised", "kept"),
    [
        (is_cancelled, asyncio.CancelledError, False),
        (exits, SystemExit, False),
        (takes_too_long, errors.TransactionTimeoutError, False),
        (has_a_hook_that_fails, errors.AfterCommitError, True),
        (has_a_commit_without_an_answer, errors.AmbiguousCommitError, False),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
async def test_retry_on_is_not_asked(db, monkeypatch, body, raised, kept):
    """R4: the program or the time is over, the work is there already, or nobody knows."""
    manager = UnitOfWorkManager(db.engine())
    runs, asked = [], []

    def always(error):
        asked.append(error)
        return True

    @transactional(retries=3, retry_on=always, timeout=1 if body is takes_too_long else None)
    async def work():
        runs.append(1)
        current_session().add(Note(text=f"run {len(runs)}"))
        await current_session().flush()
        await body(monkeypatch)

    with manager.activate(), pytest.raises(raised):
        await work()
    monkeypatch.undo()
    assert (runs, asked) == ([1], [])
    assert await db.rows("SELECT text FROM note") == ([("run 1",)] if kept else [])
    assert manager.engine.pool.checkedout() == 0
