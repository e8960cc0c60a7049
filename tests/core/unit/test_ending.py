"""What goes wrong while a unit ends changes nothing about its outcome."""

from __future__ import annotations

import asyncio
import contextlib

import pytest
from sqlalchemy import event
from sqlalchemy.util import await_only

from sqla_uow import Status, UnitOfWorkManager, errors
from sqla_uow.testing import FaultPlan
from tests.kit.logged import logged
from tests.kit.models import Note
from tests.kit.waiting import until

TOLD = {"function": "begin()", "error": "ZeroDivisionError"}


@pytest.fixture
def manager(db):
    """The manager of a fresh database."""
    return UnitOfWorkManager(db.engine())


async def notes(db):
    """Return what is committed."""
    return [note for (note,) in await db.rows("SELECT text FROM note ORDER BY id")]


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
    message = "closing a session after its COMMIT failed (ZeroDivisionError); the work is committed"
    assert logged(caplog) == [("WARNING", message, TOLD)]
    assert manager.engine.pool.checkedout() == 0


async def test_trouble_in_closing_replaces_nothing_at_the_rollback(db, manager, caplog):
    """D4: likewise; the body's own error is what it ends with."""
    await db.run("INSERT INTO note (id, text) VALUES (1, 'kept')")

    def fail(_session, _obj):
        raise ZeroDivisionError

    with pytest.raises(KeyError):
        async with manager.begin() as unit:
            note = await unit.session.get_one(Note, 1)  # noqa: F841  # kept alive, as above
            event.listen(unit.session.sync_session, "persistent_to_detached", fail)
            raise KeyError
    assert unit.status is Status.ROLLED_BACK
    assert logged(caplog) == [("WARNING", "closing begin() failed (ZeroDivisionError)", TOLD)]
    assert manager.engine.pool.checkedout() == 0


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


@pytest.mark.drivers("sqlite")  # others are stopped by breaking their link
async def test_a_commit_that_takes_longer_than_there_is_time(db, manager, monkeypatch):
    """R3: it is stopped, and its connection is nobody's any more."""
    dialect = manager.engine.sync_engine.dialect
    with pytest.raises(errors.AmbiguousCommitError):
        async with manager.begin(timeout=0.3) as unit:
            unit.session.add(Note(text="late"))
            await unit.session.flush()
            monkeypatch.setattr(dialect, "do_commit", lambda _connection: await_only(asyncio.sleep(3)))
    monkeypatch.undo()
    assert unit.status is Status.AMBIGUOUS
    assert manager.engine.pool.checkedout() == 0
    assert await notes(db) == []


@pytest.mark.drivers("sqlite")  # likewise
async def test_a_commit_that_nothing_stops(db, manager, monkeypatch):
    """R3: it goes on when its time is up, whatever is done to it, which no server can be made to cause: unknown, too."""
    monkeypatch.setattr("sqla_uow._unit.ending.IDLE_SECONDS", 0.05)
    go_on = asyncio.Event()
    asyncio.get_running_loop().call_later(5, go_on.set)  # if it is waited for after all

    async def swallow_cancellations():
        while not go_on.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await go_on.wait()

    dialect = manager.engine.sync_engine.dialect
    commit = dialect.do_commit

    def do_commit(connection):
        await_only(swallow_cancellations())
        commit(connection)

    with pytest.raises(errors.AmbiguousCommitError) as caught:
        async with manager.begin(timeout=0.3) as unit:
            unit.session.add(Note(text="late"))
            unit.after_commit(pytest.fail, "its outcome is unknown")
            await unit.session.flush()
            monkeypatch.setattr(dialect, "do_commit", do_commit)
    assert isinstance(caught.value.__cause__, TimeoutError)
    assert unit.status is Status.AMBIGUOUS
    go_on.set()
    monkeypatch.undo()
    await until(lambda: manager.engine.pool.checkedout() == 0, seconds=5)


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
    assert ("WARNING", "discarding a connection failed (ZeroDivisionError)", TOLD) in logged(caplog)
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
    assert logged(caplog) == [("ERROR", "after_commit hook of begin() failed; it is committed", TOLD)]
    assert [type(record.exc_info[1]) for record in caplog.records] == [ZeroDivisionError]
    assert await notes(db) == ["kept"]


async def test_a_cancellation_and_the_hooks_of_a_savepoint_that_was_undone(db, manager):
    """C3, H3: they run, and the cancellation goes on behind them."""
    ran = []

    async def call():
        with FaultPlan(manager, "cancel", at="commit"):
            async with manager.begin() as unit:
                unit.session.add(Note(text="kept"))
                with contextlib.suppress(KeyError):
                    async with manager.begin(propagation="nested"):
                        unit.after_rollback(ran.append, "undone")
                        raise KeyError

    with pytest.raises(asyncio.CancelledError):
        await asyncio.create_task(call())
    assert ran == ["undone"]
    assert await notes(db) == ["kept"]


@pytest.mark.parametrize(("failing", "said"), [(1, "1 after_commit hook failed"), (2, "2 after_commit hooks failed")])
async def test_how_many_hooks_have_failed(manager, failing, said):
    """H2: it is said, and what to do."""
    with pytest.raises(errors.AfterCommitError) as caught:
        async with manager.begin() as unit:
            for _ in range(failing):
                unit.after_commit(int, "fails")
    message = f"begin() is committed, but {said}; repeat what they do, not the function"
    assert str(caught.value).startswith(message)
