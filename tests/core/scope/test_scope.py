"""What a scope gives outside any unit, and what a session may not do inside one: S1, S2, S6 and S7."""

from __future__ import annotations

import asyncio
import contextlib

import pytest
from sqlalchemy import event, insert, inspect, select, text, update
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import async_sessionmaker
from sqlalchemy.orm import selectinload

from sqla_uow import Status, UnitOfWorkManager, current_session, current_unit, errors, transactional
from tests.kit.models import Account, Note

CURES = (
    "write in a @transactional function: pass the key and get_one() the object inside, "
    "or open the unit around the read as well; never merge() it"
)
WRITE = "INSERT INTO account (id, balance) VALUES (9, 0)"


@pytest.fixture
async def manager(db):
    """A manager whose pool lends one connection: two for one task would be a deadlock."""
    await db.run("INSERT INTO account (id, balance) VALUES (1, 10)", "INSERT INTO account (id, balance) VALUES (2, 20)")
    engine = db.engine(pool_size=1, max_overflow=0, pool_timeout=2)
    manager = UnitOfWorkManager(engine)
    with manager.activate():
        yield manager
    assert engine.pool.checkedout() == 0


def attached_message(what, unit):
    """Return what is said of an object of the read session inside a unit."""
    return (
        f"{what} was read in the read session of this scope and was put into {unit}, where its state may be "
        "out of date; pass its key and get_one() it inside, and never merge() it"
    )


async def read(number=1):
    """Read an account in the session of the context."""
    return await current_session().get_one(Account, number)


@transactional
async def add_one(number=1):
    """Add one to a balance in a unit."""
    account = await current_session().get_one(Account, number)
    account.balance += 1


# -- S1, S2


async def test_no_scope_no_read_session(manager):
    """S7: where a manager is only activated there is nothing to read in."""
    with pytest.raises(errors.NoUnitError) as caught:
        current_session()
    assert str(caught.value) == (
        "no unit of work is open for manager 'default'; call this inside a @transactional function, "
        "'async with manager.begin()', or a scope"
    )


async def test_a_scope_without_sql_takes_no_connection(manager):
    """S2: neither a scope, nor its read session, nor a unit in it checks a connection out before the first SQL."""
    checkouts = []
    event.listen(manager.engine.sync_engine, "checkout", lambda *args: checkouts.append(args))
    async with manager.scope():
        assert current_session() is current_session()
        async with manager.begin() as unit:
            assert current_session() is unit.session
        assert current_unit().status is Status.NEW
    assert checkouts == []


async def test_after_its_scope_nothing_is_left(manager):
    """S1: the read session ends with the scope; its session refuses, and its objects stay readable."""
    async with manager.scope():
        session, account = current_session(), await read()
    assert account.balance == 10
    with pytest.raises(
        errors.NoUnitError, match=r"^the read session of this scope has ended and its session is closed; "
    ):
        await session.scalar(text("SELECT 1"))
    with pytest.raises(errors.NoUnitError):
        current_session()


async def test_a_task_that_outlives_its_scope(manager):
    """S1: it gets `NoUnitError` with the cure, and may call transactional functions, each its own unit."""
    ended = asyncio.Event()

    async def late():
        await ended.wait()
        with pytest.raises(errors.NoUnitError) as caught:
            current_session()
        await add_one()
        return str(caught.value)

    async with manager.scope():
        task = asyncio.create_task(late())
        await asyncio.sleep(0)
    ended.set()
    assert await task == (
        "the scope that was open here has ended; in a task that outlives it, or a background task, "
        "call a @transactional function, which opens its own unit"
    )


async def test_a_scope_is_used_once(manager):
    """S1: entered again, its ended places would come back."""
    scope = manager.scope()
    async with scope:
        pass
    with pytest.raises(errors.PropagationError, match=r"^a scope was entered twice; "):
        async with scope:
            pass


# -- S6


@pytest.mark.parametrize("expire", [True, False])
async def test_objects_are_readable_after_commit(db, expire):
    """S6: however the sessionmaker was made, and with no session to load them in."""
    manager = UnitOfWorkManager(async_sessionmaker(db.engine(), expire_on_commit=expire))
    async with manager.begin() as unit:
        account = Account(id=1, balance=5)
        unit.session.add(account)
    assert (account.id, account.balance) == (1, 5)
    assert inspect(account).detached


async def enter_session(session):
    """Write what plain SQLAlchemy code writes around a session."""
    async with session:
        pass


async def enter_begin(session):
    """Write what plain SQLAlchemy code writes around a transaction."""
    async with session.begin():
        pass


REFUSED = {
    "close": (
        lambda session: session.close(),
        (
            "close() was called on the session of begin(), which closes it at its own end; "
            "remove the close(), or the 'async with' around the session"
        ),
    ),
    "async with session": (
        enter_session,
        (
            "close() was called on the session of begin(), which closes it at its own end; "
            "remove the close(), or the 'async with' around the session"
        ),
    ),
    "reset": (
        lambda session: session.reset(),
        (
            "reset() was called on the session of begin(), which closes it at its own end; "
            "remove the reset(), and call doom() to roll back"
        ),
    ),
    "invalidate": (
        lambda session: session.invalidate(),
        (
            "invalidate() was called on the session of begin(), which closes it at its own end; "
            "remove the invalidate(), and call doom() to roll back"
        ),
    ),
    "begin": (
        enter_begin,
        (
            "begin() was called on the session of begin(), which has begun already; "
            "remove the begin(), or use begin_nested() for a savepoint"
        ),
    ),
    "commit": (
        lambda session: session.commit(),
        (
            "COMMIT was called inside begin(), which commits at its own end; remove the commit() "
            "or use propagation='requires_new' for a part that must be durable earlier"
        ),
    ),
}


@pytest.mark.parametrize("sql_before", [True, False])
@pytest.mark.parametrize("call", REFUSED)
async def test_the_unit_ends_its_session_itself(manager, db, call, sql_before):
    """S6: the calls of plain SQLAlchemy code are clear errors inside a unit, and doom it where they are swallowed."""
    use, message = REFUSED[call]
    with pytest.raises(errors.RollbackOnlyError) as caught:
        async with manager.begin() as unit:
            if sql_before:
                await unit.session.execute(text(WRITE))
            with pytest.raises(errors.PropagationError) as refused:
                await use(unit.session)
            assert str(refused.value) == message
            with pytest.raises(errors.RollbackOnlyError):
                await unit.session.execute(text("SELECT 1"))
    assert caught.value.__cause__ is refused.value
    assert unit.status is Status.ROLLED_BACK
    assert await db.rows("SELECT id FROM account WHERE id = 9") == []


@pytest.mark.parametrize("pending", [True, False])
async def test_rollback_dooms(manager, db, pending):
    """S6: `session.rollback()` cannot be followed by a commit of what comes after it."""
    with pytest.raises(errors.RollbackOnlyError) as caught:
        async with manager.begin() as unit:
            if pending:
                await unit.session.execute(text(WRITE))
            await unit.session.rollback()
            assert unit.status is Status.DOOMED
    assert str(caught.value) == (
        "begin() can only be rolled back: rollback() was called on its session; let the error leave the function, "
        "or guard the step that may fail with propagation='nested'"
    )
    assert await db.rows("SELECT id FROM account WHERE id = 9") == []


async def test_rollback_keeps_the_first_cause(manager):
    """S6, D1: the habitual ``except: await session.rollback()`` does not hide what had failed."""
    with pytest.raises(errors.RollbackOnlyError) as caught:
        async with manager.begin() as unit:
            with pytest.raises(IntegrityError):
                await unit.session.execute(text("INSERT INTO account (id, balance) VALUES (1, 0)"))
            await unit.session.rollback()
    assert caught.value.__cause__ is not None
    assert "1" in str(caught.value.__cause__)


async def test_a_closed_session_is_not_reopened(manager):
    """S6: after the unit neither SQL nor `add` begins a second transaction in its session."""
    async with manager.begin() as unit:
        session = unit.session
        await session.execute(text("SELECT 1"))
    with pytest.raises(errors.NoUnitError, match=r"^begin\(\) has ended and its session is closed; open a new unit"):
        await session.execute(text("SELECT 1"))
    with pytest.raises(Exception, match="permanently closed"):
        session.add(Account(id=3))
    await session.close()
    await session.rollback()


# -- S7: lazily begun, read-only, gives way


async def test_the_read_session_is_begun_by_its_first_sql(manager):
    """S7: and it is one unit until something else begins."""
    async with manager.scope():
        unit = current_unit()
        assert (unit.status, unit.read_only, manager.engine.pool.checkedout()) == (Status.NEW, True, 0)
        await read()
        assert (unit.status, manager.engine.pool.checkedout()) == (Status.ACTIVE, 1)
        assert current_unit() is unit


async def test_the_database_refuses_a_write_in_the_read_session(manager, db):
    """S7: READ ONLY is in force in the database, for SQL in which nobody else sees a write."""
    async with manager.scope():
        connection = await current_session().connection()
        with pytest.raises((errors.ReadOnlyError, DBAPIError)) as caught:
            await connection.exec_driver_sql(WRITE)
    assert str(caught.value) == f"a write was sent in a session that only reads; {CURES}"
    assert await db.rows("SELECT id FROM account WHERE id = 9") == []


@pytest.mark.parametrize(
    ("statement", "what"),
    [
        (insert(Account).values(id=9), "an INSERT, UPDATE or DELETE was sent"),
        (update(Account).values(balance=0), "an INSERT, UPDATE or DELETE was sent"),
    ],
    ids=["insert", "update"],
)
async def test_a_statement_that_writes_in_the_read_session(manager, db, statement, what):
    """S7: it is refused before it is sent, with the cures."""
    async with manager.scope():
        with pytest.raises(errors.ReadOnlyError) as caught:
            await current_session().execute(statement)
    assert str(caught.value) == f"{what} in a session that only reads; {CURES}"
    assert await db.rows("SELECT id FROM account WHERE balance = 0") == []


async def change(account):
    """Change a loaded object."""
    account.balance = 0
    return "Account(1) was changed"


async def add_new(_account):
    """Add a new object."""
    current_session().add(Account(id=9))
    return "Account(new) was changed"


async def delete(account):
    """Delete a loaded object."""
    await current_session().delete(account)
    return "Account(1) was changed"


CHANGES = [change, add_new, delete]


@pytest.mark.parametrize("how", CHANGES)
async def test_a_flush_of_the_read_session(manager, db, how):
    """S7: an autoflush says at once that nothing will be written, and names the object."""
    with pytest.raises(errors.ReadOnlyError) as caught:
        async with manager.scope():
            what = await how(await read())
            await current_session().execute(select(Account))
    assert str(caught.value) == f"{what} in a session that only reads; {CURES}"
    assert await db.rows("SELECT id, balance FROM account ORDER BY id") == [(1, 10), (2, 20)]


@pytest.mark.parametrize("how", CHANGES)
async def test_a_change_found_when_it_gives_way(manager, db, how):
    """S7: the function does not even begin."""
    with pytest.raises(errors.ReadOnlyError) as caught:
        async with manager.scope():
            what = await how(await read())
            await add_one()
    assert str(caught.value) == f"{what} in a session that only reads; {CURES}"
    assert await db.rows("SELECT id, balance FROM account ORDER BY id") == [(1, 10), (2, 20)]


async def test_a_change_found_before_commit(manager, db):
    """S7: an object of the read session that is changed inside a unit would silently not be written."""

    @transactional
    async def work(account):
        await add_one(2)
        account.balance = 0

    with pytest.raises(errors.ReadOnlyError) as caught:
        async with manager.scope():
            await work(await read())
    assert str(caught.value) == f"Account(1) was changed in a session that only reads; {CURES}"
    assert await db.rows("SELECT id, balance FROM account ORDER BY id") == [(1, 10), (2, 20)]


@pytest.mark.drivers("asyncpg", "psycopg", "asyncmy", "aiomysql")  # SQLite has one writer
async def test_an_inner_unit_does_not_end_the_watch(db):
    """S7: behind a `requires_new` inside it the outer unit still finds the change."""
    await db.run("INSERT INTO account (id, balance) VALUES (1, 10)", "INSERT INTO account (id, balance) VALUES (2, 20)")
    manager = UnitOfWorkManager(db.engine())

    async def outer(account):
        async with manager.begin():
            await add_one(2)
            async with manager.begin(propagation="requires_new") as unit:
                await unit.session.execute(text("SELECT 1"))
            assert inspect(account).persistent
            account.balance = 0

    with pytest.raises(errors.ReadOnlyError, match=r"^Account\(1\) was changed in a session that only reads"):
        async with manager.scope():
            await outer(await read())
    assert await db.rows("SELECT id, balance FROM account ORDER BY id") == [(1, 10), (2, 20)]


@pytest.mark.parametrize("how", CHANGES)
async def test_a_change_found_at_the_end_of_the_scope(manager, db, how):
    """S7: what nobody flushed is found there; an exception on its way is not replaced."""
    with pytest.raises(errors.ReadOnlyError) as caught:
        async with manager.scope():
            what = await how(await read())
    assert str(caught.value) == f"{what} in a session that only reads; {CURES}"
    with pytest.raises(ValueError, match=r"^mine$"):
        async with manager.scope():
            await how(await read())
            raise ValueError("mine")
    assert await db.rows("SELECT id, balance FROM account ORDER BY id") == [(1, 10), (2, 20)]


async def test_it_gives_way_and_comes_back(manager, db):
    """S7: never two connections for one task; its objects stay readable, and the next use reads afresh."""
    async with manager.scope():
        account = await read()
        reader = current_session()

        @transactional
        async def work():
            assert inspect(account).session is reader.sync_session
            assert (account.balance, manager.engine.pool.checkedout()) == (10, 0)
            await add_one()
            assert manager.engine.pool.checkedout() == 1
            assert current_session() is not reader

        await work()
        assert account.balance == 10
        assert current_session() is not reader
        assert (await read()).balance == 11


async def test_its_transaction_is_ended_by_commit(db):
    """S7: a rollback would expire the objects, and reading them would need the connection."""
    engine = db.engine(pool_size=1, max_overflow=0)
    manager, endings = UnitOfWorkManager(engine), []
    async with manager.scope():
        await current_session(manager).scalar(text("SELECT 1"))
        connection = (await current_session(manager).connection()).sync_connection
        for name in ("commit", "rollback"):
            event.listen(connection, name, lambda _connection, name=name: endings.append(name))
        async with manager.begin():
            assert endings == ["commit"]
            assert engine.pool.checkedout() == 0


async def test_sql_on_a_read_session_that_gave_way(manager):
    """S7: it says what to do, and takes no second connection."""
    async with manager.scope():
        reader, account = current_session(), await read()
        async with manager.begin():
            await read(2)
            for use in (reader.scalar(text("SELECT 1")), reader.refresh(account)):
                with pytest.raises(errors.NoUnitError) as caught:
                    await use
                assert str(caught.value) == (
                    "this session gave way to a transaction; call current_session() again, and read again what you need"
                )


async def test_a_read_session_without_sql_gives_way_too(manager):
    """S7: a reader that was looked up but never used takes no connection behind the scope's back."""
    async with manager.scope():
        reader = current_unit()
        await add_one()
        with pytest.raises(errors.NoUnitError):
            await reader.session.scalar(text("SELECT 1"))


@pytest.mark.drivers("sqlite", "asyncpg")
async def test_a_cancelled_giving_way_leaves_nothing_half_way(manager, monkeypatch):
    """S7: the read session is closed then, and the scope goes on with a fresh one."""
    async with manager.scope():
        await read()

        async def cancelled(*args):
            monkeypatch.undo()
            raise asyncio.CancelledError

        monkeypatch.setattr(current_session(), "run_sync", cancelled)
        with pytest.raises(asyncio.CancelledError):
            await add_one()
        assert manager.engine.pool.checkedout() == 0
        assert (await read()).balance == 10


async def test_the_end_of_a_scope_swallows_no_cancellation(manager):
    """S7: it is held up until the connection is back, and goes on."""

    async def request():
        async with manager.scope():
            await read()
            asyncio.current_task().cancel("enough")

    with pytest.raises(asyncio.CancelledError, match=r"^enough$"):
        await asyncio.create_task(request())


async def test_a_lost_read_session_does_not_stop_the_unit(manager, db):
    """S7: a read that failed ends with the read session; the function after it begins as ever."""
    async with manager.scope():
        with contextlib.suppress(Exception):
            await current_session().execute(text("SELECT nonsense"))
        await add_one()
        assert (await read()).balance == 11


# -- S7: its objects in a unit


async def add(account):
    """Add the object itself."""
    current_session().add(account)


async def cascade(account):
    """Add a new object that refers to it."""
    current_session().add(Note(account=account))


async def backref(account):
    """Refer to it from an object that the unit has."""
    note = Note()
    current_session().add(note)
    note.account = account


async def collection(account):
    """Put an object that the unit has into its collection."""
    note = Note(text="of the unit")
    current_session().add(note)
    account.notes.append(note)


async def merge(account):
    """Copy it, which would write its older state over newer data."""
    await current_session().merge(account)


PUTS = [add, cascade, backref, merge]


@pytest.mark.parametrize("put", PUTS)
async def test_an_object_of_the_read_session_in_a_unit(manager, db, put):
    """S7: refused at once, not at the flush, whether by add, cascade, backref or merge."""

    @transactional
    async def work(account):
        with pytest.raises(errors.ReadOnlyError) as caught:
            await put(account)
        assert str(caught.value) == attached_message("Account(1)", "work()")
        current_unit().doom()

    async with manager.scope():
        await work(await read())
    assert await db.rows("SELECT id, balance FROM account ORDER BY id") == [(1, 10), (2, 20)]


@pytest.mark.parametrize("put", PUTS)
async def test_an_object_of_an_earlier_read_session(manager, db, put):
    """S7: also one whose read session of this scope is closed already, and in every unit of the scope."""

    @transactional
    async def work(account):
        with pytest.raises(errors.ReadOnlyError) as caught:
            await put(account)
        assert str(caught.value) == attached_message("Account(1)", "work()")
        current_unit().doom()

    async with manager.scope():
        account = await read()
        await add_one()
        for _ in range(2):
            await work(account)
    assert await db.rows("SELECT id, balance FROM account ORDER BY id") == [(1, 11), (2, 20)]


async def test_what_the_unit_has_in_a_collection_of_the_read_session(manager, db):
    """S7: the cascade goes the other way, into a session that writes nothing, and is refused all the same."""

    @transactional
    async def work(account):
        with pytest.raises(errors.ReadOnlyError) as caught:
            await collection(account)
        assert str(caught.value) == (
            "Note(new) of work() was put into an object of the read session of this scope, where nothing is written; "
            "pass that object's key and get_one() it inside"
        )
        current_unit().doom()

    async with manager.scope():
        await work(await current_session().get_one(Account, 1, options=[selectinload(Account.notes)]))
    assert await db.rows("SELECT id FROM note") == []


async def test_merging_what_refers_to_the_read_session(manager, db):
    """S7: the cascade of merge is refused as merge itself."""

    @transactional
    async def work(account):
        note = Note(id=1)
        note.__dict__["account"] = account  # as a loader sets it: no event, no cascade
        with pytest.raises(errors.ReadOnlyError):
            await current_session().merge(note)
        current_unit().doom()

    async with manager.scope():
        await work(await read())
    assert await db.rows("SELECT id FROM note") == []


async def test_the_cure(manager, db):
    """S7: pass the key and `get_one()` it inside; an object of another, ended scope is the caller's own affair."""
    async with manager.scope():
        account = await read()
        await add_one(account.id)
    assert await db.scalar("SELECT balance FROM account WHERE id = 1") == 11


async def test_it_gives_way_once_to_units_of_siblings(db):
    """S7: units that sibling tasks begin share nothing, so that the second is not refused for the first."""
    manager = UnitOfWorkManager(db.engine())

    @transactional
    async def add(key):
        current_session().add(Account(id=key))

    with manager.activate():
        async with manager.scope():
            await current_session().scalar(select(Account.id))
            await asyncio.gather(add(1), add(2))
            assert sorted(await current_session().scalars(select(Account.id))) == [1, 2]
    assert await db.rows("SELECT id FROM account ORDER BY id") == [(1,), (2,)]


async def test_a_unit_of_a_child_closes_no_read_session_begun_beside_it(db):
    """S7: closed is what gave way to the unit; what the parent reads meanwhile goes on."""
    manager = UnitOfWorkManager(db.engine())
    begun, go_on = asyncio.Event(), asyncio.Event()

    @transactional
    async def add(key):
        current_session().add(Account(id=key))
        begun.set()
        await go_on.wait()

    with manager.activate():
        async with manager.scope():
            child = asyncio.create_task(add(1))
            await begun.wait()
            session = current_session()
            assert await session.scalar(select(Account.id)) is None
            go_on.set()
            await child
            assert await session.scalar(text("SELECT 7")) == 7
    assert await db.rows("SELECT id FROM account") == [(1,)]


async def test_close_ends_the_scope_before_its_block(db, manager):
    """S7, W5: its session is refused, transactional functions go on, to close it again does nothing."""
    write = transactional(_write)
    async with manager.scope() as scope:
        session = current_session()
        await session.scalar(select(Account.balance).where(Account.id == 1))
        await scope.close()
        assert manager.engine.pool.checkedout() == 0
        with pytest.raises(errors.NoUnitError) as caught:
            current_session()
        await write()
        await scope.close()
    assert str(caught.value) == (
        "the scope that was open here has ended; in a task that outlives it, or a background task, "
        "call a @transactional function, which opens its own unit"
    )
    assert await db.scalar("SELECT count(*) FROM account") == 3


async def _write():
    current_session().add(Account(id=9))


@pytest.mark.parametrize("how", ["close", "rest"])
async def test_close_and_rest_refuse_a_change_and_end_the_reading_all_the_same(db, manager, how):
    """S7: nothing would ever write it."""
    async with manager.scope() as scope:
        (await current_session().get_one(Account, 1)).balance = 99
        with pytest.raises(errors.ReadOnlyError):
            await getattr(scope, how)()
        assert manager.engine.pool.checkedout() == 0
    assert await db.scalar("SELECT balance FROM account WHERE id = 1") == 10


async def test_rest_gives_the_connection_back_and_the_next_use_begins_afresh(db, manager):
    """S7, W5: what was written meanwhile is seen."""
    async with manager.scope() as scope:
        await scope.rest()
        assert (await current_session().get_one(Account, 1)).balance == 10
        await scope.rest()
        assert manager.engine.pool.checkedout() == 0
        await db.run("UPDATE account SET balance = 11 WHERE id = 1")
        assert (await current_session().get_one(Account, 1)).balance == 11


async def test_rest_leaves_the_session_to_a_sibling_that_uses_it(db, manager):
    """S3: a task that waits for a message does not close the session under one that sends."""
    read, rested = asyncio.Event(), asyncio.Event()

    async def sends():
        account = await current_session().get_one(Account, 1)
        read.set()
        await rested.wait()
        await current_session().refresh(account)
        return account.balance

    async with manager.scope() as scope:
        sending = asyncio.create_task(sends())
        await read.wait()

        async def receives():
            await scope.rest()
            rested.set()

        await asyncio.create_task(receives())
        assert await sending == 10
