"""What is said names what the user wrote, and what to write instead."""

from __future__ import annotations

import contextlib

import pytest
from sqlalchemy import event, text

from sqla_uow import (
    UnitOfWorkManager,
    after_commit,
    before_commit,
    current_session,
    current_unit,
    errors,
    transactional,
)
from tests.kit.models import Account


@pytest.fixture
async def manager(db):
    """A manager, activated, over one account."""
    await db.run("INSERT INTO account (id, balance) VALUES (1, 10)")
    manager = UnitOfWorkManager(db.engine())
    with manager.activate():
        yield manager


@contextlib.asynccontextmanager
async def nowhere(manager):
    """Be under an active manager alone."""
    yield manager


PLACES = {"scope": lambda manager: manager.scope(), "manager": nowhere}


@pytest.mark.parametrize(
    "use", [current_session, current_unit, lambda: after_commit(print), lambda: before_commit(print)]
)
@pytest.mark.parametrize("place", PLACES)
async def test_in_an_event_of_commit(manager, db, use, place):
    """SQLAlchemy's `before_commit`: the unit is not found any more, and the read session of the scope is none of its own."""
    caught = []

    def listener(session):
        try:
            use()
        except errors.NoUnitError as error:
            caught.append(str(error))
            raise

    @transactional
    async def work():
        current_session().add(Account(id=9))
        event.listen(current_session().sync_session, "before_commit", listener)

    async with PLACES[place](manager):
        with pytest.raises(errors.NoUnitError):
            await work()
        await manager_is_well()
    (message,) = caught
    assert message == (
        "work() is being committed, so it is not looked up any more: in an event of COMMIT use the session that the event is "
        "given, and register hooks in the function, or in before_flush"
    )
    assert await db.scalar("SELECT count(*) FROM account WHERE id = 9") == 0


@transactional
async def manager_is_well():
    """Use a unit as always."""
    assert current_session() is current_unit().session


async def test_sql_in_an_event_of_commit_works_with_its_own_session(manager, db):
    """What the message tells to use can be used."""

    @transactional
    async def work():
        current_session().add(Account(id=9))
        event.listen(
            current_session().sync_session,
            "before_commit",
            lambda session: session.execute(text("UPDATE account SET balance = 7")),
        )

    await work()
    assert await db.scalar("SELECT min(balance) FROM account") == 7


async def test_commit_in_a_read_session(manager):
    """As libraries call it that write: it never would."""
    async with manager.scope():
        session = current_session()
        await session.get_one(Account, 1)
        with pytest.raises(errors.PropagationError) as caught:
            await session.commit()
    assert str(caught.value) == (
        "COMMIT was called on a session that only reads; write in a @transactional function, which commits at its end"
    )


async def test_a_session_kept_from_before_a_rest(manager):
    """The session of a WebSocket's dependency, after `accept()` has waited for the client."""
    async with manager.scope() as scope:
        for reads in (False, True):
            session = current_session()
            if reads:
                await session.get_one(Account, 1)
            await scope.rest()
            with pytest.raises(errors.NoUnitError) as caught:
                await session.scalar(text("SELECT 1"))
            assert str(caught.value) == (
                "this session gave way to a transaction; call current_session() again, and read again what you need"
            )
        assert await current_session().scalar(text("SELECT balance FROM account")) == 10


async def test_a_session_kept_beyond_its_scope(manager):
    """It is told to ask for a new one."""
    async with manager.scope():
        session = current_session()
        await session.get_one(Account, 1)
    with pytest.raises(errors.NoUnitError) as caught:
        await session.scalar(text("SELECT 1"))
    assert str(caught.value) == (
        "the read session of this scope has ended and its session is closed; call current_session() again for each use"
    )


async def test_a_read_session_after_a_failure(manager):
    """A savepoint is no remedy where nothing is written."""
    async with manager.scope():
        with pytest.raises(Exception, match="nowhere"):
            await current_session().execute(text("SELECT nonsense FROM nowhere"))
        with pytest.raises(errors.RollbackOnlyError) as caught:
            await current_session().scalar(text("SELECT 1"))
    assert str(caught.value).endswith(
        "let the error leave the function, or read what may fail in a @transactional(read_only=True) function"
    )
