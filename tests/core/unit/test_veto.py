"""What fails before COMMIT was handed to the driver: rolled back, raised as it is, never unknown and never run again for it."""

from __future__ import annotations

import time

import pytest
from sqlalchemy import event, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import async_sessionmaker
from sqlalchemy.orm import Session

from sqla_uow import (
    Status,
    UnitOfWorkManager,
    after_commit,
    after_rollback,
    current_session,
    current_unit,
    errors,
    transactional,
)
from tests.kit.models import Note


class VetoedSession(Session):
    """A class of its own for the listeners of these tests."""


class LostError(Exception):
    """An error of another driver, as that of a message broker: its code means a lost connection where it is ours."""

    sqlstate = "08006"


VETOES = [
    ValueError("no"),
    OSError("the audit log is full"),
    OperationalError("of another engine", {}, LostError()),
]


@pytest.mark.parametrize("ambiguous", ["raise", "verify"])
@pytest.mark.parametrize("veto", VETOES, ids=lambda veto: type(veto).__name__)
@pytest.mark.parametrize("where", ["engine before", "engine behind", "connection", "session"])
async def test_a_listener_vetoes(db, where, veto, ambiguous):
    """COMMIT was never sent, whoever listens and whenever that began."""
    engine = db.engine(pool_size=1, max_overflow=0, pool_timeout=5)
    units, calls, vetoing = [], [], [True]

    def refuse(_):
        if vetoing:
            raise veto

    if where == "engine before":
        event.listen(engine.sync_engine, "commit", refuse)
    manager = UnitOfWorkManager(
        async_sessionmaker(engine, sync_session_class=VetoedSession), ambiguous_commit=ambiguous
    )
    if where == "engine behind":
        event.listen(engine.sync_engine, "commit", refuse)
    elif where == "session":
        event.listen(VetoedSession, "before_commit", refuse)

    @transactional(retries=3)
    async def work():
        units.append(current_unit())
        after_commit(calls.append, "committed")
        after_rollback(calls.append, "rolled back")
        current_session().add(Note(text="vetoed"))
        if where == "connection":
            event.listen((await current_session().connection()).sync_connection, "commit", refuse)

    try:
        with manager.activate():
            with pytest.raises(type(veto)) as caught:
                await work()
            assert caught.value is veto
            assert [unit.status for unit in units] == [Status.ROLLED_BACK]
            assert calls == ["rolled back"]
            assert await db.scalar("SELECT count(*) FROM note") == 0
            vetoing.clear()
            await work()
        assert await db.scalar("SELECT count(*) FROM note") == 1
        assert engine.pool.checkedout() == 0
    finally:
        if where == "session":
            event.remove(VetoedSession, "before_commit", refuse)


@pytest.mark.parametrize("ambiguous", ["raise", "verify"])
@pytest.mark.parametrize("read_only", [False, True], ids=["writing", "reading"])
async def test_a_body_that_blocks_the_loop_past_its_deadline(db, ambiguous, read_only):
    """No timer could fire, and COMMIT is not sent any more: the deadline has passed, and that is all."""
    engine = db.engine(pool_size=1, max_overflow=0, pool_timeout=5)
    manager = UnitOfWorkManager(engine, ambiguous_commit=ambiguous)
    units = []

    @transactional(timeout=0.5, retries=3, read_only=read_only)
    async def work():
        units.append(current_unit())
        session = current_session()
        if not read_only:
            session.add(Note(text="late"))
            await session.flush()
        await session.execute(text("SELECT 1"))
        time.sleep(0.6)  # noqa: ASYNC251  # what is tested

    with (
        manager.activate(),
        pytest.raises(errors.TransactionTimeoutError, match=r"^work\(\) did not finish within 0.5 s"),
    ):
        await work()
    assert [unit.status for unit in units] == [Status.ROLLED_BACK]
    assert await db.scalar("SELECT count(*) FROM note") == 0
    assert engine.pool.checkedout() == 0
    async with manager.begin() as unit:
        assert await unit.session.scalar(text("SELECT 7")) == 7
