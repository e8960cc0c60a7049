"""What goes wrong while a unit ends changes nothing about its outcome."""

from __future__ import annotations

import asyncio

import pytest
from sqlalchemy import event

from sqla_uow import Status, UnitOfWorkManager, errors
from sqla_uow.testing import FaultPlan
from tests.kit.logged import logged
from tests.kit.models import Note

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
