"""P1 to P3: what a call does when a unit is open, and what it may ask of that unit."""

from __future__ import annotations

import time

import pytest
from sqlalchemy import select, text
from sqlalchemy.exc import IntegrityError

from sqla_uow import RetryPolicy, Status, UnitOfWorkManager, current_session, current_unit, errors, transactional
from tests.kit.models import Account, Note, Unique
from tests.kit.statements import statements

ADD = text("INSERT INTO account (id, balance) VALUES (:id, 0)")
AT_ONCE = RetryPolicy(base=0, cap=0)


@pytest.fixture
def manager(db):
    """The manager of a fresh database."""
    return UnitOfWorkManager(db.engine())


async def notes(db):
    """Return what is committed."""
    return [note for (note,) in await db.rows("SELECT text FROM note ORDER BY id")]


async def connection_of(unit):
    """Return the driver's own connection of a unit."""
    connection = await unit.session.connection()
    return (await connection.get_raw_connection()).driver_connection


async def ids(db):
    """Return the keys that are committed."""
    return [key for (key,) in await db.rows("SELECT id FROM account ORDER BY id")]


# -- required


async def test_a_call_joins_the_open_unit_and_sends_nothing(db):
    """P1: the same unit and session, and not a statement more than its own."""
    engine = db.engine()
    sent = statements(engine)

    @transactional(retries=3)
    async def inner():
        return current_unit()

    with (manager := UnitOfWorkManager(engine)).activate():
        async with manager.begin() as unit:
            await unit.session.execute(ADD, {"id": 1})
            before = len(sent)
            assert await inner() is unit
            async with manager.begin() as joined:
                assert joined is unit
            assert len(sent) == before
            assert await ids(db) == []
    assert await ids(db) == [1]


async def test_a_joined_calls_database_errors_surface_in_it(db):
    """P1: it flushes at its exit, so its duplicate key is its own error; D1: swallowed, the unit rolls back."""
    await db.run("INSERT INTO account (id, balance) VALUES (1, 7)")
    raised = []

    @transactional
    async def inner():
        current_session().add(Account(id=1))

    @transactional
    async def outer():
        await current_session().execute(ADD, {"id": 2})
        try:
            await inner()
        except IntegrityError as error:
            raised.append(error)

    with UnitOfWorkManager(db.engine()).activate(), pytest.raises(errors.RollbackOnlyError) as caught:
        await outer()
    assert caught.value.__cause__ in (raised[0], raised[0].orig)
    assert await db.rows("SELECT id, balance FROM account") == [(1, 7)]


# -- nested


async def test_a_nested_call_rolls_back_alone(db):
    """P1: the outer row is committed, the inner one is not, and the duplicate key has doomed nothing."""
    manager = UnitOfWorkManager(db.engine())
    async with manager.begin() as unit:
        unit.session.add(Account(id=1))
        with pytest.raises(IntegrityError):
            async with manager.begin(propagation="nested") as nested:
                assert nested is unit
                await nested.session.execute(ADD, {"id": 2})
                await nested.session.execute(ADD, {"id": 2})
        assert unit.status is Status.ACTIVE
        unit.session.add(Account(id=3))
    assert unit.status is Status.COMMITTED
    assert await ids(db) == [1, 3]


async def test_a_nested_call_ends_with_the_outer_rollback(db):
    """P1: its release makes nothing durable (on SQLite, as SQLAlchemy ships it, RELEASE commits)."""
    manager = UnitOfWorkManager(db.engine())
    with pytest.raises(KeyError):
        async with manager.begin() as unit:
            async with manager.begin(propagation="nested"):
                unit.session.add(Account(id=1))
            assert await unit.session.scalar(select(Account.id)) == 1
            raise KeyError
    assert await ids(db) == []


async def test_nested_calls_nest(db):
    """P1: the middle savepoint takes the released inner one with it, and leaves what came before."""
    manager = UnitOfWorkManager(db.engine())
    async with manager.begin() as unit:
        await unit.session.execute(ADD, {"id": 1})
        with pytest.raises(KeyError):
            async with manager.begin(propagation="nested"):
                await unit.session.execute(ADD, {"id": 2})
                async with manager.begin(propagation="nested"):
                    await unit.session.execute(ADD, {"id": 3})
                raise KeyError
        async with manager.begin(propagation="nested"):
            await unit.session.execute(ADD, {"id": 4})
    assert await ids(db) == [1, 4]


async def test_a_nested_call_alone_is_a_unit(db):
    """P1: with nothing around it `nested` begins, and sends no SAVEPOINT."""
    engine = db.engine()
    sent = statements(engine)
    async with UnitOfWorkManager(engine).begin(propagation="nested") as unit:
        await unit.session.execute(ADD, {"id": 1})
    assert unit.status is Status.COMMITTED
    assert not [statement for statement in sent if statement.startswith("SAVEPOINT")]
    assert await ids(db) == [1]


async def test_a_nested_function_that_undoes_its_own_savepoint(db, manager):
    """Its exception goes on; there is nothing left to be undone a second time."""

    @transactional(propagation="nested")
    async def inner():
        session = current_session()
        session.add(Note(text="inner"))
        await session.flush()
        await session.get_nested_transaction().rollback()
        raise KeyError

    with manager.activate():
        async with manager.begin() as unit:
            unit.session.add(Note(text="outer"))
            with pytest.raises(KeyError):
                await inner()
    assert await notes(db) == ["outer"]


async def test_a_nested_function_that_never_begins(db, manager):
    """P1: what its caller had not written yet is refused before its savepoint; the caller's own it is."""
    await db.run("INSERT INTO uniq (id, name) VALUES (1, 'taken')")
    ran = []

    @transactional(propagation="nested")
    async def inner():
        ran.append("inner")

    with manager.activate(), pytest.raises(IntegrityError):
        async with manager.begin() as unit:
            unit.session.add(Unique(name="taken"))
            await inner()
    assert (unit.status, ran) == (Status.ROLLED_BACK, [])


@pytest.mark.drivers("asyncpg", "psycopg", "asyncmy", "aiomysql")
async def test_a_savepoint_that_cannot_be_set(db, manager):
    """The connection is gone: what joins has not begun, and the unit is run again."""
    units = []

    @transactional(propagation="nested")
    async def inner():
        current_session().add(Note(text="inner"))

    @transactional(retries=1, retry=AT_ONCE)
    async def outer():
        units.append(current_unit())
        await current_session().execute(select(Note))
        if len(units) == 1:
            await db.kill(current_session())
        await inner()

    with manager.activate():
        await outer()
    assert [unit.status for unit in units] == [Status.ROLLED_BACK, Status.COMMITTED]
    assert await notes(db) == ["inner"]


# -- requires_new


async def test_requires_new_is_another_transaction(db):
    """P1: another connection; committed at its own end, and there to stay when the outer one rolls back."""
    manager = UnitOfWorkManager(db.engine())
    with pytest.raises(KeyError):
        async with manager.begin(read_only=db.family == "sqlite") as outer:
            await outer.session.scalar(select(Account.id))
            async with manager.begin(propagation="requires_new") as inner:
                assert inner is not outer
                assert await connection_of(inner) is not await connection_of(outer)
                await inner.session.execute(ADD, {"id": 1})
                assert await ids(db) == []
            assert inner.status is Status.COMMITTED
            assert await ids(db) == [1]
            raise KeyError
    assert outer.status is Status.ROLLED_BACK
    assert await ids(db) == [1]


async def test_a_failed_requires_new_leaves_the_outer_unit_alone(db):
    """P1: its rollback, and its doom, are its own."""
    manager = UnitOfWorkManager(db.engine())
    async with manager.begin() as outer:
        with pytest.raises(KeyError):
            async with manager.begin(propagation="requires_new") as inner:
                await inner.session.execute(ADD, {"id": 1})
                raise KeyError
        await outer.session.execute(ADD, {"id": 2})
    assert (inner.status, outer.status) == (Status.ROLLED_BACK, Status.COMMITTED)
    assert await ids(db) == [2]


async def test_requires_new_may_write_inside_a_read_only_unit(db):
    """P2: it is another transaction; a joined writer is refused in the same place."""
    manager = UnitOfWorkManager(db.engine())

    @transactional(propagation="requires_new")
    async def audit():
        current_session().add(Account(id=1))

    with manager.activate():
        async with manager.begin(read_only=True) as unit:
            await unit.session.scalar(select(Account.id))
            await audit()
    assert await ids(db) == [1]


async def test_requires_new_fails_at_once_when_its_own_task_holds_the_pool(db):
    """P3: not after the pool's 30 s, and the outer units go on."""
    engine = db.engine(pool_size=1, max_overflow=1)
    manager = UnitOfWorkManager(engine)

    async with manager.begin(read_only=True) as outer:
        await outer.session.scalar(select(Account.id))
        async with manager.begin(read_only=True, propagation="requires_new") as second:
            await second.session.scalar(select(Account.id))
            started = time.monotonic()
            with pytest.raises(errors.PropagationError) as caught:
                async with manager.begin(propagation="requires_new") as third:
                    await third.session.execute(ADD, {"id": 1})
            assert time.monotonic() - started < 5
            await second.session.scalar(select(Account.id))
    assert str(caught.value) == (
        "begin() needs a connection of its own, but the units around it hold all 2 of the pool; "
        "use a pool with room for the nesting, or join the outer unit"
    )
    assert (second.status, outer.status) == (Status.COMMITTED, Status.COMMITTED)
    assert engine.pool.checkedout() == 0


async def test_another_manager_of_the_same_pool_is_counted_too(db):
    """P3: so is the read session of a scope, of which another manager knows nothing."""
    engine = db.engine(pool_size=1, max_overflow=0)
    first, second = UnitOfWorkManager(engine), UnitOfWorkManager(engine, name="second")
    started = time.monotonic()
    async with first.scope():
        await current_session().scalar(select(Account.id))
        with pytest.raises(errors.PropagationError, match="hold all 1 of the pool"):
            async with second.begin() as unit:
                await unit.session.execute(ADD, {"id": 1})
    assert time.monotonic() - started < 5
    assert await ids(db) == []


# -- mandatory and durable


async def test_mandatory_joins_and_never_begins(db):
    """P1: inside, it is the open unit; outside, an error that says what to do."""

    @transactional(propagation="mandatory")
    async def inner():
        await current_session().execute(ADD, {"id": 1})
        return current_unit()

    with (manager := UnitOfWorkManager(db.engine())).activate():
        with pytest.raises(errors.PropagationError) as caught:
            await inner()
        async with manager.begin() as unit:
            assert await inner() is unit
    assert str(caught.value) == (
        "inner() must join a unit of manager 'default', but none is open; call it from a transactional function, "
        "or drop propagation='mandatory'"
    )
    assert await ids(db) == [1]


async def test_durable_begins_and_never_joins(db):
    """P1: what it returns from is committed; inside another unit that could not be true."""
    called = []

    @transactional(propagation="durable")
    async def inner():
        called.append(current_unit())
        await current_session().execute(ADD, {"id": len(called)})

    @transactional
    async def outer():
        with pytest.raises(errors.PropagationError) as caught:
            await inner()
        return str(caught.value)

    with UnitOfWorkManager(db.engine()).activate():
        await inner()
        assert await ids(db) == [1]
        assert await outer() == (
            "inner() must be outermost to be durable, but was called inside outer(); "
            "call it after the outer one, or drop propagation='durable'"
        )
    assert len(called) == 1


@pytest.mark.drivers("sqlite")
async def test_propagation_is_checked_where_it_is_written(db):
    """P1: a misspelt propagation fails at the decoration."""
    with pytest.raises(ValueError, match="propagation") as caught:
        UnitOfWorkManager(db.engine()).begin(propagation="supports")
    assert str(caught.value) == (
        "begin() has propagation='supports', which is unknown; "
        "use one of 'required', 'requires_new', 'nested', 'mandatory', 'durable'"
    )


# -- what a call may ask of the unit it joins


async def test_read_write_does_not_join_read_only(db):
    """P2: the whole message, for a joined call and for a nested one; read-only joins both."""
    manager = UnitOfWorkManager(db.engine())

    @transactional
    async def write():
        current_session().add(Account(id=1))

    with manager.activate():
        async with manager.begin(read_only=True), manager.begin(read_only=True) as unit:
            await unit.session.scalar(select(Account.id))
            with pytest.raises(errors.IsolationConflictError) as caught:
                await write()
            with pytest.raises(errors.IsolationConflictError, match=r"^begin\(\) needs read-write"):
                async with manager.begin(propagation="nested"):
                    pass
        async with manager.begin(), manager.begin(read_only=True):
            await write()
    assert str(caught.value) == (
        "write() needs read-write but joins begin(), which is read-only; "
        "begin the outer one read-write or use propagation='requires_new'"
    )
    assert await ids(db) == [1]
