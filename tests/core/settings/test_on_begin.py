"""`on_begin`: called when a transaction begins, before the first statement of the body; on every database."""

from __future__ import annotations

import pytest
from sqlalchemy import select, text
from sqlalchemy.orm.exc import StaleDataError

from sqla_uow import UnitOfWorkManager, after_commit, current_session, current_unit, transactional
from sqla_uow.errors import ConflictError, NoUnitError, RollbackOnlyError
from sqla_uow.testing import FaultPlan, assert_no_leaks, rolled_back
from tests.kit.models import Account, Note

ONE = text("SELECT 1")


class Hook:
    """Writes down what it is called with, and sends a statement."""

    def __init__(self):
        self.calls = []
        self.failing = []

    async def __call__(self, unit):
        assert await unit.session.scalar(ONE) == 1
        self.calls.append((unit.attempt, unit.read_only))
        if self.failing:
            raise self.failing.pop(0)


@pytest.fixture
def hook():
    """A hook to be looked at."""
    return Hook()


@pytest.fixture
def manager(db, hook):
    """A manager that calls it, over one connection."""
    return UnitOfWorkManager(db.engine(pool_size=1, max_overflow=0), on_begin=hook, retries=2)


async def test_with_the_first_statement_and_once(manager, hook):
    """A unit without SQL calls nothing; a second statement neither."""
    async with manager.begin() as unit:
        pass
    assert hook.calls == []
    async with manager.begin() as unit:
        await unit.session.execute(select(Account))
        await unit.session.execute(select(Account))
    async with manager.begin(read_only=True, timeout=5) as unit:
        await unit.session.execute(select(Account))
    assert hook.calls == [(1, False), (1, True)]


@pytest.mark.parametrize("first", ["flush", "savepoint", "connection", "get", "stream"])
async def test_whatever_the_first_statement_is(db, manager, hook, first):
    """What it writes is written once, and outside a savepoint of the body."""

    async def on_begin(unit):
        unit.session.add(Note(text="begun"))
        await unit.session.execute(ONE)

    manager = UnitOfWorkManager(manager.engine, on_begin=on_begin)
    async with manager.begin() as unit:
        session = unit.session
        if first == "flush":
            session.add(Account(id=1))
            await session.flush()
        elif first == "savepoint":
            async with manager.begin(propagation="nested") as inner:
                session.add(Account(id=1))
            with pytest.raises(KeyError):
                async with manager.begin(propagation="nested"):
                    await session.execute(ONE)
                    raise KeyError
            assert inner is unit
        elif first == "connection":
            await (await session.connection()).execute(ONE)
        elif first == "get":
            assert await session.get(Account, 1) is None
        else:
            rows = await session.stream(select(Account))
            assert await rows.all() == []
    assert await db.rows("SELECT text FROM note") == [("begun",)]


async def test_a_savepoint_that_is_rolled_back_does_not_take_it_back(db, hook):
    """Even if the body's first statement is in one."""

    async def on_begin(unit):
        await unit.session.execute(text("INSERT INTO note (id, text) VALUES (1, 'begun')"))

    manager = UnitOfWorkManager(db.engine(), on_begin=on_begin)
    async with manager.begin() as unit:
        with pytest.raises(KeyError):
            async with unit.session.begin_nested():
                await unit.session.execute(ONE)
                raise KeyError
    assert await db.rows("SELECT text FROM note") == [("begun",)]


async def test_in_each_attempt(manager, hook):
    """A conflict calls it again."""

    @transactional(using=manager)
    async def write():
        current_session(manager).add(Account(id=1))

    with FaultPlan(manager, "conflict", at="commit"):
        await write()
    assert hook.calls == [(1, False), (2, False)]


async def test_its_error_is_the_attempts(db, manager, hook):
    """Raised to the caller if it is permanent, and retried if it is not."""

    @transactional(using=manager)
    async def write():
        current_session(manager).add(Account(id=1))

    with assert_no_leaks(manager):
        hook.failing = [ZeroDivisionError()]
        with pytest.raises(ZeroDivisionError):
            await write()
        assert hook.calls == [(1, False)]
        with FaultPlan(manager, "conflict", at="statement", times=3), pytest.raises(ConflictError) as caught:
            await write()
        assert caught.value.attempts == 3
        assert await db.rows("SELECT * FROM account") == []
        with FaultPlan(manager, "conflict", at="statement"):
            await write()
    assert await db.scalar("SELECT count(*) FROM account") == 1


async def test_an_error_that_is_swallowed(db, manager, hook):
    """No statement of the body runs without it, also behind a savepoint."""
    hook.failing = [ZeroDivisionError()]
    with pytest.raises(RollbackOnlyError, match="ZeroDivisionError"):
        async with manager.begin() as unit:
            try:
                async with unit.session.begin_nested():
                    await unit.session.execute(text("INSERT INTO account (id, balance) VALUES (1, 0)"))
            except ZeroDivisionError:
                await unit.session.execute(text("INSERT INTO account (id, balance) VALUES (2, 0)"))
    assert await db.rows("SELECT * FROM account") == []
    assert manager.engine.pool.checkedout() == 0


async def test_read_sessions(manager, hook):
    """Each one that begins; there hooks are refused, as ever."""
    with manager.activate():
        async with manager.scope():
            await current_session().execute(select(Account))
            await current_session().execute(select(Account))
            async with manager.begin() as unit:
                await unit.session.execute(select(Account))
            await current_session().execute(select(Account))
    assert hook.calls == [(1, True), (1, False), (1, True)]

    async def registering(unit):
        after_commit(print)

    manager = UnitOfWorkManager(manager.engine, on_begin=registering)
    with manager.activate():
        async with manager.scope():
            with pytest.raises(NoUnitError, match="outside a unit of work"):
                await current_session().execute(ONE)


async def test_it_may_register_hooks_and_use_the_current_unit(db):
    """As a part of the body."""
    seen = []

    async def on_begin(unit):
        assert current_unit() is unit
        after_commit(seen.append, "committed")

    manager = UnitOfWorkManager(db.engine(), on_begin=on_begin)
    with manager.activate():
        async with manager.begin() as unit:
            await unit.session.execute(ONE)
    assert seen == ["committed"]


async def test_in_a_test_that_is_rolled_back(manager, hook):
    """The kit's manager calls it too."""
    async with rolled_back(manager) as inside, inside.begin() as unit:
        await unit.session.execute(select(Account))
    assert hook.calls == [(1, False)]


@pytest.mark.drivers("asyncpg", "psycopg", "asyncmy", "aiomysql")
async def test_a_read_session_that_begins_again(db, manager, hook):
    """A dead connection is found by the hook, which is called again on the next one."""
    with manager.activate():
        async with manager.scope():
            await current_session().execute(select(Account))
            number = text("SELECT pg_backend_pid()" if db.family == "postgresql" else "SELECT connection_id()")
            number = await current_session().scalar(number)
        if db.family == "postgresql":
            await db.rows(f"SELECT pg_terminate_backend({number}, 10000)")
        else:
            await db.run(f"KILL {number}")
        async with manager.scope():
            assert (await current_session().execute(select(Account))).all() == []
    assert hook.calls == [(1, True), (1, True)]


@pytest.mark.parametrize("wrong", [print, "x", lambda unit: None])
def test_what_is_no_hook(db, wrong):
    """Refused where it is given."""
    with pytest.raises(
        TypeError, match=r"^UnitOfWorkManager 'default' has an on_begin that is no 'async def' function"
    ):
        UnitOfWorkManager(db.engine(), on_begin=wrong)


async def test_a_stale_version_in_it(db):
    """Retried as in the body."""
    failing = [StaleDataError("stale")]

    async def on_begin(unit):
        await unit.session.execute(ONE)
        if failing:
            raise failing.pop()

    manager = UnitOfWorkManager(db.engine(), on_begin=on_begin)
    with pytest.raises(StaleDataError):  # of nobody's flush: not ours
        async with manager.begin() as unit:
            await unit.session.execute(ONE)
