"""S7: a change of what the read session has read is never lost without a word, whatever came between."""

from __future__ import annotations

import asyncio
import gc
import weakref

import pytest

from sqla_uow import UnitOfWorkManager, current_session, transactional
from sqla_uow.errors import NoUnitError, ReadOnlyError
from tests.kit.models import Account, Note

CHANGED = (
    r"^Account\(1\) was changed in a session that only reads; write in a @transactional function: pass the key and "
    r"get_one\(\) the object inside, or open the unit around the read as well; never merge\(\) it$"
)


@pytest.fixture
async def manager(db):
    """A manager whose pool lends two connections, activated, over one account."""
    await db.run("INSERT INTO account (id, balance) VALUES (1, 10)")
    engine = db.engine(pool_size=2, max_overflow=0, pool_timeout=2)
    manager = UnitOfWorkManager(engine)
    with manager.activate():
        yield manager
    assert engine.pool.checkedout() == 0


@transactional
async def work(text="work"):
    """Write a note."""
    current_session().add(Note(text=text))


async def nothing():
    """Come between by nothing."""


async def two_at_once():
    """Come between by two siblings."""
    await asyncio.gather(work("a"), work("b"))


async def a_failure():
    """Come between by a unit that fails."""
    with pytest.raises(ValueError, match="of the body"):
        await fail()


@transactional
async def fail():
    """Raise out of a unit."""
    raise ValueError("of the body")


async def another_reading():
    """Come between by a unit, another read session, and a unit again."""
    await work()
    assert (await current_session().get_one(Account, 1)).balance == 10
    await work()


@pytest.mark.parametrize("between", [nothing, work, two_at_once, a_failure, another_reading])
@pytest.mark.parametrize("end", ["close", "rest"])
async def test_a_change_after_units(manager, db, between, end):
    """It is found where the scope ends, is closed before a response, or rests."""
    async with manager.scope() as scope:
        account = await current_session().get_one(Account, 1)
        await between()
        account.balance = 99
        del account
        gc.collect()
        with pytest.raises(ReadOnlyError, match=CHANGED):
            await getattr(scope, end)()
    assert await db.scalar("SELECT balance FROM account") == 10


@pytest.mark.parametrize("between", [work, two_at_once, a_failure, another_reading])
async def test_the_end_of_the_scope_and_the_next_unit_find_it(manager, db, between):
    """The block of the scope raises; and a unit that begins later, or commits, is refused."""
    with pytest.raises(ReadOnlyError, match=CHANGED):
        async with manager.scope():
            account = await current_session().get_one(Account, 1)
            await between()
            account.balance = 99
    written = await db.scalar("SELECT count(*) FROM note")
    with pytest.raises(ReadOnlyError, match=CHANGED):
        async with manager.scope():
            account = await current_session().get_one(Account, 1)
            await between()
            account.balance = 99
            await work("refused")
    assert await db.scalar("SELECT count(*) FROM note") == 2 * written
    assert await db.scalar("SELECT count(*) FROM note WHERE text = 'refused'") == 0


async def test_a_change_inside_a_unit_of_what_was_read_before_the_last(manager, db):
    """It fails the unit in which it happens, as a change of what the current read session has read does."""

    @transactional
    async def changes(account):
        account.balance = 99
        current_session().add(Note(text="refused"))

    with pytest.raises(ReadOnlyError, match=CHANGED):
        async with manager.scope():
            account = await current_session().get_one(Account, 1)
            await work()
            await changes(account)
    assert await db.scalar("SELECT count(*) FROM note WHERE text = 'refused'") == 0


async def test_after_a_rest(manager):
    """What was read before the scope rested, as between two messages, is still watched."""
    with pytest.raises(ReadOnlyError, match=CHANGED):
        async with manager.scope() as scope:
            account = await current_session().get_one(Account, 1)
            await scope.rest()
            account.balance = 99
            await scope.rest()


async def test_a_scope_that_lasts_long_keeps_only_what_somebody_has(manager):
    """The sessions that gave way are let go with the last of their objects."""
    sessions = []
    async with manager.scope():
        for _ in range(20):
            account = await current_session().get_one(Account, 1)
            sessions.append(weakref.ref(current_session().sync_session))
            await work()
        del account
        await current_session().get(Account, 1)
        await work()
        gc.collect()
        assert sum(session() is not None for session in sessions) <= 2


async def test_sql_in_a_session_that_gave_way(manager):
    """It says what to do: read again."""
    async with manager.scope():
        session = current_session()
        await session.get_one(Account, 1)
        await work()
        with pytest.raises(
            NoUnitError, match=r"^this session gave way to a transaction; call current_session\(\) again"
        ):
            await session.get(Account, 2)
        assert (await current_session().get_one(Account, 1)).balance == 10
