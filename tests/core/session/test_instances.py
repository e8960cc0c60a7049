"""R9: an object of a failed attempt is not reused by the next one."""

from __future__ import annotations

import pytest

from sqla_uow import RetryPolicy, UnitOfWorkManager, current_session, current_unit, errors, transactional
from tests.kit.models import Account, Note
from tests.kit.troubles import BusyAtCommit, ChangedSinceRead, LockWaitTimeout

AFTER_WRITES = {"postgresql": ChangedSinceRead, "mysql": LockWaitTimeout, "sqlite": BusyAtCommit}
# One of each database: the driver has no part in it.
pytestmark = pytest.mark.drivers("sqlite", "psycopg", "asyncmy")
AT_ONCE = RetryPolicy(base=0, cap=0)
REMEDY = "make or load the object inside the function, so that each attempt has its own"


@pytest.fixture
async def trouble(db):
    """Provide a conflict that is met at once, and an account of nobody's session."""
    await db.run("INSERT INTO account (id, balance) VALUES (1, 0), (2, 0)")
    trouble = AFTER_WRITES[db.family](db)
    yield trouble
    await trouble.settle()


@pytest.fixture
def run(trouble):
    """Run a body whose first attempt meets a conflict after it; return its error and how often it ran."""
    manager = UnitOfWorkManager(trouble.engine(), retries=3, retry=AT_ONCE, isolation=trouble.isolation)

    async def run(body):
        runs = []

        @transactional
        async def work():
            await trouble.settle()
            runs.append(current_unit())
            await body()
            if len(runs) == 1:
                await trouble.provoke(current_session())

        error = None
        with manager.activate():
            try:
                await work()
            except Exception as raised:  # noqa: BLE001  # looked at by the test
                error = raised
        return error, len(runs)

    return run


async def test_a_new_object_that_a_failed_attempt_flushed(run, db):
    """T34: it would keep the key of the failed attempt; meanwhile another session may have taken it."""
    note = Note(text="made outside")

    async def body():
        current_session().add(note)
        await current_session().flush()

    error, runs = await run(body)
    assert type(error) is errors.InstanceReuseError
    assert str(error) == f"Note(new) was attached in a failed attempt of work() and was put into the next one; {REMEDY}"
    assert runs == 2
    assert await db.rows("SELECT * FROM note") == []


async def test_a_new_object_that_a_failed_attempt_only_added(run, db):
    """R9: attached is enough."""
    note = Note(text="made outside")

    async def body():
        current_session().add(note)

    error, runs = await run(body)
    assert (type(error), runs) == (errors.InstanceReuseError, 2)
    assert await db.rows("SELECT * FROM note") == []


async def test_a_loaded_object_that_a_failed_attempt_changed(run, db, trouble):
    """T33: its change would be lost in silence, since it looks unchanged to the next attempt."""
    manager = UnitOfWorkManager(trouble.engine())
    async with manager.begin(read_only=True) as unit:
        account = await unit.session.get_one(Account, 2)

    async def body():
        current_session().add(account)
        account.balance = 100
        await current_session().flush()

    error, runs = await run(body)
    assert (type(error), runs) == (errors.InstanceReuseError, 2)
    assert str(error).startswith("Account(2) was attached in a failed attempt of work()")
    assert await db.rows("SELECT balance FROM account WHERE id = 2") == [(0,)]


async def test_an_object_that_the_body_left_in_a_closure(run, db):
    """R9: loaded by the first attempt, put into the second."""
    kept = []

    async def body():
        if kept:
            current_session().add(kept[0])
        kept.append(await current_session().get_one(Account, 2))

    error, runs = await run(body)
    assert (type(error), runs) == (errors.InstanceReuseError, 2)


@pytest.mark.parametrize("parent_is_new", [True, False])
async def test_an_object_that_comes_along_with_another(run, db, parent_is_new):
    """R9: by cascade, from a parent that is added or that is in the session already."""
    note = Note(text="made outside")

    async def body():
        if parent_is_new:
            current_session().add(Account(id=9, notes=[note]))
        else:
            account = await current_session().get_one(Account, 2)
            current_session().add(Note(text="made inside", account=account))
            await current_session().refresh(account, ["notes"])
            account.notes.append(note)
        await current_session().flush()

    error, runs = await run(body)
    assert (type(error), runs) == (errors.InstanceReuseError, 2)
    assert await db.rows("SELECT * FROM note") == []


async def test_what_each_attempt_makes_or_loads_is_its_own(run, db):
    """The cure: also with `merge` of plain values; the work is done once."""

    async def body():
        account = await current_session().get_one(Account, 2)
        account.balance += 1
        await current_session().merge(Note(id=7, text="merged", account_id=2))
        current_session().add(Note(id=8, text="made inside", account_id=2))
        await current_session().flush()

    error, runs = await run(body)
    assert (error, runs) == (None, 2)
    assert await db.rows("SELECT balance FROM account WHERE id = 2") == [(1,)]
    assert await db.rows("SELECT id FROM note ORDER BY id") == [(7,), (8,)]


async def test_an_object_may_be_attached_twice_in_one_attempt_and_by_another_call(db):
    """Nothing failed in between."""
    manager = UnitOfWorkManager(db.engine(), retries=3)
    note = Note(text="made outside")

    @transactional(using=manager)
    async def work():
        session = current_session(manager)
        session.add(note)
        session.expunge(note)
        session.add(note)

    await work()
    await work()
    assert await db.rows("SELECT text FROM note") == [("made outside",)]
