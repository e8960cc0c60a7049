"""The end of a unit: hooks, flush and checks until nothing is left to do, and hooks that raise what is no `Exception`."""

from __future__ import annotations

import asyncio
import gc

import pytest
from sqlalchemy import event
from sqlalchemy.ext.asyncio import async_sessionmaker
from sqlalchemy.orm import Session

from sqla_uow import (
    Status,
    UnitOfWorkManager,
    after_commit,
    after_rollback,
    before_commit,
    current_session,
    current_unit,
    errors,
    transactional,
)
from tests.kit.models import Account, Note
from tests.kit.queueing import narrow

# One of each database: the driver has no part in it.
pytestmark = pytest.mark.drivers("sqlite", "psycopg", "asyncmy")


class WatchedSession(Session):
    """A class of its own for the listeners of these tests."""


@pytest.fixture
def engine(db):
    """Provide a pool of one connection, so that one which is not given back is missed."""
    return db.engine(pool_size=1, max_overflow=0, pool_timeout=5)


@pytest.fixture
def manager(engine):
    """Provide an active manager over sessions that the tests listen to."""
    manager = UnitOfWorkManager(async_sessionmaker(engine, sync_session_class=WatchedSession))
    with manager.activate():
        yield manager


def listen(target, name, function):
    """Listen until the test ends."""
    event.listen(target, name, function)
    return lambda: event.remove(target, name, function)


@pytest.fixture
def listening():
    """Provide `listen`."""
    undo = []
    yield lambda *args: undo.append(listen(*args))
    for remove in undo:
        remove()


async def outbox(what):
    """Write a row in the transaction."""
    current_session().add(Note(text=what))


async def is_sound(db, manager):
    """Say whether another unit can begin at once: no connection, no turn and no lock was kept."""
    async with asyncio.timeout(5), manager.begin() as unit:
        unit.session.add(Account(id=99))
    assert manager.engine.pool.checkedout() == 0
    return await db.scalar("SELECT count(*) FROM account WHERE id = 99") == 1


# -- until nothing is left to do

FLUSH = ["after_insert", "before_flush", "after_flush", "after_flush_postexec"]


@pytest.mark.parametrize("where", FLUSH)
async def test_what_the_last_flush_registers_runs(db, manager, listening, where):
    """A listener collects work for before COMMIT; the body does not flush, so only the unit's own flush tells it."""

    def of_mapper(_mapper, _connection, target):
        before_commit(outbox, f"account {target.id}")

    def of_flush(*_):
        if not seen:
            seen.append(1)
            before_commit(outbox, "account 1")

    seen = []
    if where == "after_insert":
        listening(Account, where, of_mapper)
    else:
        listening(WatchedSession, where, of_flush)

    @transactional
    async def work():
        current_session().add(Account(id=1))

    await work()
    assert await db.rows("SELECT text FROM note") == [("account 1",)]
    assert await db.scalar("SELECT count(*) FROM account") == 1


async def test_a_chain_of_hooks_and_flushes(db, manager, listening):
    """Each hook writes what another flush tells of, to the end of it; what comes last is committed too."""

    def of_mapper(_mapper, _connection, target):
        if target.id < 5:
            before_commit(open_account, target.id + 1)
        after_commit(done.append, target.id)

    async def open_account(number):
        current_session().add(Account(id=number))

    done = []
    listening(Account, "after_insert", of_mapper)

    @transactional
    async def work():
        await open_account(1)

    await work()
    assert done == [1, 2, 3, 4, 5]
    assert await db.scalar("SELECT count(*) FROM account") == 5


async def test_objects_that_are_added_behind_the_flush(db, manager, listening):
    """They are flushed with the rest, and a hook of theirs runs."""

    def postexec(session, _context):
        if not seen:
            seen.append(1)
            session.add(Account(id=2))

    def of_mapper(_mapper, _connection, target):
        if target.id == 2:
            before_commit(outbox, "account 2")

    seen = []
    listening(WatchedSession, "after_flush_postexec", postexec)
    listening(Account, "after_insert", of_mapper)

    @transactional
    async def work():
        current_session().add(Account(id=1))

    await work()
    assert await db.rows("SELECT text FROM note") == [("account 2",)]


async def again():
    """Be due again whenever it has run."""
    before_commit(again)


async def test_hooks_that_never_end(db, manager):
    """They are told, with the name of the one that is due; nothing is committed."""

    @transactional
    async def work():
        current_session().add(Note(text="lost"))
        before_commit(again)

    message = (
        r"^the end of work\(\) made more work 100 times over: the before_commit hook again is due again; let hooks"
    )
    with pytest.raises(errors.RollbackOnlyError, match=message):
        await work()
    assert await db.scalar("SELECT count(*) FROM note") == 0
    assert await is_sound(db, manager)


async def test_flushes_that_never_end(db, manager, listening):
    """Likewise."""
    listening(WatchedSession, "after_flush_postexec", lambda session, _: session.add(Note(text="one more")))

    @transactional
    async def work():
        current_session().add(Note(text="lost"))

    with pytest.raises(errors.RollbackOnlyError, match=r"100 times over: objects are changed in each flush; let hooks"):
        await work()
    assert await db.scalar("SELECT count(*) FROM note") == 0


@pytest.mark.parametrize("where", ["session", "engine"])
async def test_a_hook_that_comes_too_late_is_refused(db, engine, manager, listening, where):
    """While COMMIT is under way nothing can run before it any more: an error, rather than a hook that is forgotten."""
    units = []

    def late(_):
        units[0].before_commit(outbox, "late")

    if where == "session":
        listening(WatchedSession, "before_commit", late)
    else:
        listening(engine.sync_engine, "commit", late)

    @transactional
    async def work():
        units.append(current_unit())
        current_session().add(Note(text="lost"))
        await current_session().flush()

    with pytest.raises(errors.NoUnitError, match=r"^work\(\) is ending and runs no more before_commit hooks"):
        await work()
    assert await db.scalar("SELECT count(*) FROM note") == 0


# -- hooks of a rollback that register more


@pytest.mark.parametrize("how", ["module", "unit"])
async def test_after_rollback_in_after_rollback(manager, caplog, how):
    """It runs behind those that wait already."""
    calls = []

    async def first(unit):
        calls.append("first")
        (unit.after_rollback if how == "unit" else after_rollback)(calls.append, "registered")
        with pytest.raises(errors.NoUnitError):
            after_commit(calls.append, "never")

    @transactional
    async def work():
        after_rollback(first, current_unit())
        after_rollback(calls.append, "second")
        raise KeyError

    with pytest.raises(KeyError):
        await work()
    assert calls == ["first", "second", "registered"]
    assert not caplog.records


async def test_in_the_rollback_of_a_savepoint(manager):
    """The unit commits, and the hooks of its undone savepoint register more all the same."""
    calls = []

    def first():
        calls.append("first")
        after_rollback(calls.append, "registered")

    @transactional(propagation="nested")
    async def part():
        after_rollback(first)
        raise KeyError

    @transactional
    async def work():
        current_session().add(Note(text="written"))
        with pytest.raises(KeyError):
            await part()

    await work()
    assert calls == ["first", "registered"]


async def test_hooks_behind_the_end_that_never_end(db, manager, caplog):
    """A chain is cut off, and told: of a commit in the `AfterCommitError`, of a rollback in the log."""

    def committed():
        after_commit(committed)

    def rolled_back():
        after_rollback(rolled_back)

    @transactional
    async def work(error=None):
        after_commit(committed)
        after_rollback(rolled_back)
        if error is not None:
            raise error

    async with asyncio.timeout(10):
        with pytest.raises(errors.AfterCommitError) as caught:
            await work()
        with pytest.raises(KeyError):
            await work(KeyError())
    [failure] = caught.value.exceptions
    message = "hooks of work() registered further hooks 100 times over; {} is not run: let the chain end"
    assert str(failure).startswith(message.format(committed.__qualname__))
    [record] = caplog.records
    assert str(record.exc_info[1]).startswith(message.format(rolled_back.__qualname__))


async def test_hooks_in_any_number(manager):
    """What is bounded is how often they register more, not how many there are."""
    ran = []
    async with manager.begin() as unit:
        for number in range(150):
            unit.after_commit(ran.append, number)
            unit.before_commit(ran.append, -1)
    assert ran == [-1] * 150 + list(range(150))
    ran.clear()
    async with manager.begin() as unit:
        for number in range(150):
            unit.after_rollback(ran.append, number)
        unit.doom()
    assert ran == list(range(150))


# -- what is no Exception

FATAL = [pytest.fail.Exception, KeyboardInterrupt, SystemExit, GeneratorExit]


@pytest.fixture
async def unheard():
    """Provide what the loop is told of tasks whose exceptions nobody has asked for."""
    told = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: told.append(context["message"]))
    yield told
    gc.collect()
    assert told == []


@pytest.mark.parametrize("fatal", FATAL, ids=lambda fatal: fatal.__name__)
@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
async def test_of_an_after_commit_hook(db, manager, unheard, fatal, asynchronous):
    """The others run first, then it is raised; the work is committed, and nothing is held."""
    calls = []

    def fail():
        raise fatal("of the hook")

    async def fail_later():
        await asyncio.sleep(0)
        fail()

    @transactional
    async def work():
        current_session().add(Note(text="written"))
        after_commit(fail_later if asynchronous else fail)
        after_commit(calls.append, "ran")

    with pytest.raises(fatal) as caught:
        await work()
    assert calls == ["ran"]
    assert caught.value.__notes__ == ["sqla_uow: raised by a hook; the outcome of work() is: committed"]
    assert await db.scalar("SELECT count(*) FROM note") == 1
    assert await is_sound(db, manager)


@pytest.mark.parametrize("fatal", FATAL, ids=lambda fatal: fatal.__name__)
async def test_of_an_after_rollback_hook(db, manager, unheard, fatal):
    """Likewise; what rolled back is its context."""
    calls = []

    def fail():
        raise fatal("of the hook")

    @transactional(retries=3)
    async def work():
        current_session().add(Note(text="undone"))
        await current_session().flush()
        after_rollback(fail)
        after_rollback(calls.append, "ran")
        raise KeyError("mine")

    with pytest.raises(fatal) as caught:
        await work()
    assert calls == ["ran"]
    assert isinstance(caught.value.__context__, KeyError)
    assert await db.scalar("SELECT count(*) FROM note") == 0
    assert await is_sound(db, manager)


async def test_of_an_after_rollback_hook_behind_a_body_that_returned(db, manager, unheard):
    """Likewise: what kept the unit from its COMMIT is not lost."""

    def fail(error):
        raise error

    with pytest.raises(SystemExit) as caught:
        async with manager.begin() as unit:
            unit.session.add(Note(text="undone"))
            unit.before_commit(fail, KeyError("mine"))
            unit.after_rollback(fail, SystemExit())
    assert isinstance(caught.value.__context__, KeyError)
    assert await db.scalar("SELECT count(*) FROM note") == 0
    assert await is_sound(db, manager)


@pytest.mark.parametrize("fatal", [*FATAL, asyncio.CancelledError], ids=lambda fatal: fatal.__name__)
async def test_of_a_before_commit_hook(db, manager, unheard, fatal):
    """The unit is rolled back, and its hooks of a rollback run."""
    calls, units = [], []

    def fail():
        raise fatal("of the hook")

    @transactional(retries=3)
    async def work():
        units.append(current_unit())
        current_session().add(Note(text="undone"))
        before_commit(fail)
        after_commit(calls.append, "committed")
        after_rollback(calls.append, "rolled back")

    with pytest.raises(fatal):
        await work()
    assert calls == ["rolled back"]
    assert [unit.status for unit in units] == [Status.ROLLED_BACK]
    assert await db.scalar("SELECT count(*) FROM note") == 0
    assert await is_sound(db, manager)


async def test_of_a_hook_in_a_call_that_has_its_turn(db, manager, unheard):
    """Contention: the slot of a call whose hooks fail so is free; as many such calls as one likes."""

    def fail():
        raise pytest.fail.Exception("of the hook")

    @transactional(retries=3)
    async def work(undo):
        current_session().add(Note(text="written"))
        (after_rollback if undo else after_commit)(fail)
        if undo:
            raise KeyError

    narrow(manager, work)
    for undo in (False, True) * 5:
        with pytest.raises(pytest.fail.Exception):
            await work(undo)
    state = manager.contention(work)
    assert state.width == 1
    assert (state.running, state.waiting) == (0, 0)
    assert await db.scalar("SELECT count(*) FROM note") == 5
    assert await is_sound(db, manager)
