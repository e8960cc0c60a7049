"""What a manager may be bound to, and what it leaves alone: S8."""

from __future__ import annotations

import asyncio
import gc
import sys

import pytest
from sqlalchemy import create_engine, event, func, insert, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session

from sqla_uow import Status, UnitOfWorkManager, errors
from sqla_uow._session import connection as _connection
from sqla_uow._session import pool as _pool
from tests.kit.models import Account
from tests.kit.statements import statements

COUNT = select(func.count()).select_from(Account)
one_driver = pytest.mark.drivers("sqlite")  # what is about Python objects alone


class TaggedSession(AsyncSession):
    """A session class of a user, which passes keyword arguments on."""

    def __init__(self, *args, tag="", **kwargs):
        super().__init__(*args, **kwargs)
        self.tag = tag


class CountingSession(Session):
    """A class below the async one, with a method overridden."""

    flushes = 0

    def flush(self, objects=None):
        CountingSession.flushes += 1
        super().flush(objects)


class StrictAsyncSession(AsyncSession):
    """A class that knows all its arguments, so it thinks."""

    def __init__(self, bind=None):
        super().__init__(bind)


class StrictSession(Session):
    """The same below the async one."""

    def __init__(self, bind=None, binds=None):
        super().__init__(bind)


class RoutingSession(Session):
    """The reader and writer recipe."""

    def get_bind(self, *args, **kwargs):
        return super().get_bind(*args, **kwargs)


# -- refused


class TwoPhaseSession(Session):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **(kwargs | {"twophase": True}))


class TwoPhaseAsyncSession(AsyncSession):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **(kwargs | {"twophase": True}))


TWO_PHASES = (
    "{} is made with twophase=True, but a unit is one transaction on one engine, and knows what became of one COMMIT; "
    "leave it out"
)
REFUSED = {
    "sync engine": (
        lambda _engine: create_engine("sqlite://"),
        "UnitOfWorkManager got Engine; pass an AsyncEngine of create_async_engine(), or an async_sessionmaker bound to one",
    ),
    "session": (
        AsyncSession,
        (
            "UnitOfWorkManager got AsyncSession; "
            "pass an AsyncEngine of create_async_engine(), or an async_sessionmaker bound to one"
        ),
    ),
    "binds": (
        lambda engine: async_sessionmaker(binds={Account: engine}),
        "the sessionmaker has binds=, but a unit is one transaction on one engine; make a manager for each",
    ),
    "no bind": (lambda _engine: async_sessionmaker(), "the sessionmaker has no bind; bind it to an AsyncEngine"),
    "connection": (
        lambda engine: async_sessionmaker(AsyncConnection(engine)),
        "the sessionmaker has a bind of type AsyncConnection; bind it to an AsyncEngine",
    ),
    "AsyncSession without keywords": (
        lambda engine: async_sessionmaker(engine, class_=StrictAsyncSession),
        (
            "StrictAsyncSession cannot be made with expire_on_commit, close_resets_only and "
            "sync_session_class; let its __init__ pass keyword arguments on to AsyncSession"
        ),
    ),
    "Session without keywords": (
        lambda engine: async_sessionmaker(engine, sync_session_class=StrictSession),
        (
            "AsyncSession cannot be made with expire_on_commit, close_resets_only and "
            "sync_session_class; let its __init__ pass keyword arguments on to AsyncSession"
        ),
    ),
    "get_bind": (
        lambda engine: async_sessionmaker(engine, sync_session_class=RoutingSession),
        (
            "RoutingSession chooses its engine in get_bind(), but a unit is one transaction on one engine; "
            "make a manager for each engine"
        ),
    ),
    "twophase in __init__": (
        lambda engine: async_sessionmaker(engine, class_=TwoPhaseAsyncSession),
        TWO_PHASES.format("TwoPhaseAsyncSession"),
    ),
    "twophase in the sync session": (
        lambda engine: async_sessionmaker(engine, sync_session_class=TwoPhaseSession),
        TWO_PHASES.format("AsyncSession"),
    ),
    "no Session": (
        lambda engine: async_sessionmaker(engine, sync_session_class=dict),
        "sync_session_class is <class 'dict'>, not a class of Session; pass a subclass of sqlalchemy.orm.Session",
    ),
}


@one_driver
@pytest.mark.parametrize("what", REFUSED)
async def test_what_cannot_be_a_unit_is_refused_at_construction(db, what):
    """S8: not at the first unit, and with what would be right."""
    make, message = REFUSED[what]
    with pytest.raises(TypeError) as caught:
        UnitOfWorkManager(make(db.engine()))
    assert str(caught.value) == message


AUTOCOMMIT = {
    "create_engine": lambda db: db.engine(isolation_level="AUTOCOMMIT"),
    "lower case": lambda db: db.engine(execution_options={"isolation_level": "autocommit"}),
    "copy": lambda db: db.engine().execution_options(isolation_level="AUTOCOMMIT"),
    "maker": lambda db: async_sessionmaker(db.engine(isolation_level="AUTOCOMMIT")),
}


@pytest.mark.parametrize("how", AUTOCOMMIT)
async def test_an_engine_in_autocommit_is_refused(db, how):
    """S8: there is no transaction in it that could be rolled back."""
    with pytest.raises(ValueError, match=r"^the engine is in AUTOCOMMIT, where nothing can be rolled back; pass one "):
        UnitOfWorkManager(AUTOCOMMIT[how](db))


# -- session classes of users


async def test_a_users_async_session_is_the_units(db):
    """S8: its class and its keywords; the maker itself is not touched, and still makes what it made."""
    maker = async_sessionmaker(db.engine(), class_=TaggedSession, tag="mine", autoflush=False, info={"a": 1})
    async with UnitOfWorkManager(maker).begin() as unit:
        session = unit.session
        assert isinstance(session, TaggedSession)
        assert (session.tag, session.sync_session.autoflush, session.info) == ("mine", False, {"a": 1})
        session.add(Account(id=1))
    assert await db.rows("SELECT id FROM account") == [(1,)]
    async with maker() as plain:
        account = await plain.get_one(Account, 1)
        await plain.commit()
        assert "balance" not in account.__dict__  # expired, as its maker has it
        await plain.scalar(COUNT)  # and begins again


@pytest.mark.parametrize("given", ["class", "keyword"])
async def test_a_users_session_class_keeps_its_methods_and_listeners(db, given):
    """S8: the unit's rules come on top, also where its listeners were added before or after the manager was made."""
    seen = []

    class ListenedSession(CountingSession):
        """A class of this test alone."""

    class ListenedAsyncSession(AsyncSession):
        sync_session_class = ListenedSession

    options = {"class_": ListenedAsyncSession} if given == "class" else {"sync_session_class": ListenedSession}
    event.listen(ListenedSession, "before_flush", lambda *_args: seen.append("before"))
    manager = UnitOfWorkManager(async_sessionmaker(db.engine(), **options))
    event.listen(ListenedSession, "after_flush", lambda *_args: seen.append("after"))
    flushes = CountingSession.flushes
    async with manager.begin() as unit:
        unit.session.add(Account(id=1))
    assert isinstance(unit.session.sync_session, ListenedSession)
    assert seen == ["before", "after"]
    assert CountingSession.flushes > flushes
    assert await db.rows("SELECT id FROM account") == [(1,)]


async def test_the_rules_hold_for_a_users_session_class(db):
    """S8: a failed statement dooms, a conflict-free unit commits, and nobody else's session is bound by the rules."""
    manager = UnitOfWorkManager(async_sessionmaker(db.engine(), sync_session_class=CountingSession))
    with pytest.raises(DBAPIError):
        async with manager.begin() as unit:
            await unit.session.execute(insert(Account).values(id=1))
            await unit.session.execute(text("SELECT nonsense"))
    assert unit.status is Status.ROLLED_BACK
    assert await db.rows("SELECT id FROM account") == []
    async with AsyncSession(db.engine(), sync_session_class=CountingSession) as plain, plain.begin():
        plain.add(Account(id=2))
    assert await db.rows("SELECT id FROM account") == [(2,)]


# -- listeners


@pytest.mark.parametrize("copy_first", [True, False])
async def test_listeners_are_installed_once(db, copy_first, monkeypatch):
    """S8: several managers over one engine and its copies share them; a failure is told once."""
    told = []
    failed = _connection.operation_failed
    monkeypatch.setattr(
        _connection, "operation_failed", lambda unit, *a, **k: (told.append(unit), failed(unit, *a, **k))
    )
    engine = db.engine()
    copy = engine.execution_options(yield_per=10)
    binds = [copy, engine] if copy_first else [engine, copy]
    managers = [UnitOfWorkManager(bind) for bind in [*binds, *binds, async_sessionmaker(engine)]]
    for manager in managers:
        with pytest.raises(DBAPIError):
            async with manager.begin() as unit:
                await unit.session.execute(text("SELECT nonsense"))
        assert told == [unit._transaction]
        told.clear()
    reset = _pool._resetting(managers[0]._setup.database.system.restore)
    resets = [listener for listener in engine.sync_engine.pool.dispatch.reset if listener is reset]
    assert len(resets) == (1 if db.family == "sqlite" else 0)


@one_driver
async def test_no_pool_is_taken_for_an_earlier_one(db):
    """S8: SQLAlchemy knows targets by id(), and ids come again; every pool gets its listener all the same."""
    earlier, kept = set(), []
    for _ in range(100):
        engines = [create_async_engine(db.url) for _ in range(20)]
        for engine in engines:
            manager = UnitOfWorkManager(engine)
            listeners = engine.sync_engine.pool.dispatch.reset
            assert _pool._resetting(manager._setup.database.system.restore) in list(listeners)
            kept.append(listeners)  # these outlive their pools now and then; here always
        ids = {id(engine.sync_engine.pool) for engine in engines}
        if earlier & ids:
            return
        earlier |= ids
        del engine, engines, manager
        gc.collect()
    pytest.fail("no id came again")


async def test_a_listener_on_the_connection_of_one_unit(db):
    """S8: it hears that unit and no other, and the unit's own rules hold beside it."""
    manager = UnitOfWorkManager(db.engine(pool_size=1, max_overflow=0))
    heard = []
    with pytest.raises(errors.ReadOnlyError):
        async with manager.begin(read_only=True) as unit:
            connection = (await unit.session.connection()).sync_connection
            event.listen(connection, "before_cursor_execute", lambda *args: heard.append(args[2]))
            await unit.session.scalar(COUNT)
            await unit.session.execute(insert(Account).values(id=1))
    async with manager.begin() as unit:
        await unit.session.scalar(COUNT)
    assert [one.split()[0] for one in heard] == ["SELECT"]  # the refused INSERT was not for it either


async def test_plain_sessions_on_the_same_engine(db):
    """S8: commit, rollback, begin, a second transaction and a second task: nothing of it is our affair."""
    engine = db.engine(pool_size=1, max_overflow=0)
    manager = UnitOfWorkManager(engine)
    sent = statements(engine)
    async with manager.begin(read_only=True) as unit:
        await unit.session.scalar(COUNT)
    sent.clear()
    async with AsyncSession(engine) as plain:
        async with plain.begin():
            plain.add(Account(id=1))
        plain.add(Account(id=2))
        await plain.commit()
        plain.add(Account(id=3))
        await plain.flush()
        await plain.rollback()
        with pytest.raises(DBAPIError):
            await plain.execute(text("SELECT nonsense"))
        await plain.rollback()
        assert await plain.scalar(COUNT) == 2
    assert [one.split()[0] for one in sent] == ["INSERT", "INSERT", "INSERT", "SELECT", "SELECT"]
    async with engine.begin() as connection:
        await connection.execute(insert(Account).values(id=4))
    assert await db.rows("SELECT id FROM account ORDER BY id") == [(1,), (2,), (4,)]


async def test_a_warm_pool(db):
    """S8: a connection that was made before the manager serves units as any other, and plain sessions afterwards."""
    engine = db.engine(pool_size=1, max_overflow=0)
    async with engine.connect() as connection:
        before = (await connection.get_raw_connection()).driver_connection
    manager = UnitOfWorkManager(engine, isolation="SERIALIZABLE")
    with pytest.raises(ValueError, match=r"^mine$"):
        async with manager.begin() as unit:
            await unit.session.execute(insert(Account).values(id=1))
            async with unit.session.begin_nested():
                await unit.session.execute(insert(Account).values(id=2))
            raise ValueError("mine")
    assert await db.rows("SELECT id FROM account") == []
    async with manager.begin(read_only=True) as unit:
        await unit.session.scalar(COUNT)
    async with engine.begin() as connection:
        assert (await connection.get_raw_connection()).driver_connection is before
        await connection.execute(insert(Account).values(id=3))
    assert await db.rows("SELECT id FROM account") == [(3,)]


async def test_units_still_work_after_dispose(db):
    """S8: `engine.dispose()` makes a new pool; what the manager needs of it goes along."""
    engine = db.engine(pool_size=1, max_overflow=0)
    manager = UnitOfWorkManager(engine)
    for number in (1, 2):
        async with manager.begin(read_only=True) as unit:
            await unit.session.scalar(COUNT)
        async with manager.begin() as unit:
            await unit.session.execute(insert(Account).values(id=number))
        await engine.dispose()
    assert await db.scalar("SELECT count(*) FROM account") == 2


# -- SQLite's BEGIN


def add_recipe(engine, begin="BEGIN"):
    """Do what SQLAlchemy's documentation says for transactions that are real."""
    event.listen(engine.sync_engine, "connect", lambda dbapi, _record: setattr(dbapi, "isolation_level", None))
    event.listen(engine.sync_engine, "begin", lambda connection: connection.exec_driver_sql(begin))


@pytest.mark.drivers("sqlite")
@pytest.mark.parametrize("recipe", [None, "before", "after"])
@pytest.mark.parametrize("read_only", [True, False])
async def test_a_users_own_begin_is_respected(db, recipe, read_only):
    """S8: installed before or after the manager, it is sent once and ours is not; SAVEPOINT and rollback work."""
    engine = db.engine()
    if recipe == "before":
        add_recipe(engine, "BEGIN IMMEDIATE")
    manager = UnitOfWorkManager(engine)
    if recipe == "after":
        add_recipe(engine, "BEGIN IMMEDIATE")
    begins = statements(engine, lambda one: one.startswith("BEGIN"))
    async with manager.begin(read_only=read_only) as unit:
        assert await unit.session.scalar(COUNT) == 0
    ours = "BEGIN" if read_only else "BEGIN IMMEDIATE"
    assert begins == [ours if recipe is None else "BEGIN IMMEDIATE"]
    async with manager.begin() as unit:
        async with unit.session.begin_nested():
            await unit.session.execute(insert(Account).values(id=1))
        unit.doom()
    assert await db.rows("SELECT id FROM account") == []
    async with engine.begin() as connection:
        await connection.execute(insert(Account).values(id=2))
    assert await db.rows("SELECT id FROM account") == [(2,)]


EARLY_LISTENER = """
import asyncio, sys
from sqlalchemy import event, text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import Session

@event.listens_for(Session, "after_begin")
def fail_once(*_args):
    event.remove(Session, "after_begin", fail_once)
    raise ValueError

from sqla_uow import UnitOfWorkManager

async def main():
    engine = create_async_engine(sys.argv[1])
    async with UnitOfWorkManager(engine).begin() as unit:
        for _attempt in range(2):
            try:
                await unit.session.execute(text("INSERT INTO account (id, balance) VALUES (1, 0)"))
            except ValueError:
                print("failed")
    print(unit.status, engine.pool.checkedout())
    await engine.dispose()

asyncio.run(main())
"""


async def test_a_listener_that_was_there_before_the_library(db):
    """S8: the unit hears of its connection first; a listener on every Session that fails costs it nothing."""
    program = await asyncio.create_subprocess_exec(
        sys.executable, "-c", EARLY_LISTENER, db.url, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output, _ = await program.communicate()
    assert output.decode().split() == ["failed", "Status.COMMITTED", "0"], output.decode()
    assert await db.rows("SELECT id FROM account") == [(1,)]
