"""One unit, several tasks: S3, S4 and S5."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import sys
import time
import weakref

import anyio
import anyio.to_thread
import pytest
import sqlalchemy
from sqlalchemy import event, literal_column, select, text
from sqlalchemy import insert as insert_into

from sqla_uow import Status, UnitOfWorkManager, current_session, current_unit, errors, transactional
from sqla_uow._tasks.frames import Frame, Place
from sqla_uow._unit import ending as _ending
from tests.kit import waiting
from tests.kit.models import Account

few_drivers = pytest.mark.drivers("sqlite", "asyncpg")  # what is about tasks alone
SLOW = {
    "postgresql": "SELECT pg_sleep({seconds})",
    "mysql": "SELECT sleep({seconds})",
    "sqlite": "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c WHERE n < {seconds} * 4000000) SELECT max(n) FROM c",
}


@pytest.fixture
def manager(db):
    """The manager of a fresh database."""
    return UnitOfWorkManager(db.engine())


def slow(db, seconds):
    """Return a statement that keeps the connection busy for about that long."""
    return text(SLOW[db.family].format(seconds=seconds))


def row(number):
    """Return a statement that inserts an account."""
    return insert_into(Account).values(id=number)


until = functools.partial(waiting.until, seconds=5, pause=0)
"""Look again in every turn of the loop, for five seconds at most."""


async def in_flight(unit):
    """Wait until a statement of the unit is with the driver; return whose it is."""
    await until(lambda: unit._transaction.owner.in_flight is not None and unit._transaction.connection is not None)
    return unit._transaction.owner.in_flight


def pool_of_three(db):
    """Return a manager whose pool lends three connections and no more."""
    return UnitOfWorkManager(db.engine(pool_size=3, max_overflow=0, pool_timeout=5))


async def assert_pool_is_whole(manager):
    """Nothing is checked out, and each of three connections serves a unit."""
    assert manager.engine.pool.checkedout() == 0
    barrier = asyncio.Barrier(3)

    async def use():
        async with manager.begin(read_only=True) as unit:
            await unit.session.execute(text("SELECT 1"))
            await barrier.wait()
            assert await unit.session.scalar(text("SELECT 7")) == 7

    async with asyncio.timeout(5), asyncio.TaskGroup() as group:
        for _ in range(3):
            group.create_task(use())
    async with manager.begin() as unit:
        await unit.session.execute(row(777))
        await unit.session.execute(text("DELETE FROM account WHERE id = 777"))
    assert manager.engine.pool.checkedout() == 0


class Gathered:
    """``asyncio.gather``: the first error comes out while the other task goes on."""

    def __init__(self):
        self.tasks = []

    async def __call__(self, **coroutines):
        self.tasks = [asyncio.create_task(coroutine, name=name) for name, coroutine in coroutines.items()]
        await asyncio.gather(*self.tasks)


class Grouped:
    """``asyncio.TaskGroup``: the first error cancels the other task and comes out in a group."""

    def __init__(self):
        self.tasks = []

    async def __call__(self, **coroutines):
        try:
            async with asyncio.TaskGroup() as group:
                self.tasks = [group.create_task(coroutine, name=name) for name, coroutine in coroutines.items()]
        except BaseExceptionGroup as group:
            (error,) = group.exceptions
            raise error from None


async def two_calls(manager, together, *, via, between):
    """Insert a row from each of two tasks of one unit; return the unit and what came out."""
    units, used, go_on = [], asyncio.Event(), asyncio.Event()

    @transactional
    async def work():
        units.append(current_unit())
        held = current_session() if via == "closure" else None

        async def first():
            await (held or current_session()).execute(row(1))
            used.set()
            if between:
                await go_on.wait()

        async def second():
            await (used.wait() if between else in_flight(units[0]))
            try:
                await (held or current_session()).execute(row(2))
            finally:
                go_on.set()

        await together(first=first(), second=second())

    with manager.activate(), pytest.raises(errors.TaskBoundaryError) as caught:
        await work()
    await asyncio.wait(together.tasks)
    return units[0], caught.value


@pytest.mark.parametrize("between", [False, True], ids=["in_flight", "between_statements"])
@pytest.mark.parametrize("via", ["current_session", "closure"])
async def test_siblings_may_not_share_a_unit(db, via, between):
    """S3: the error names both tasks and the cure, dooms the unit and leaves the pool whole, cold or warm."""
    manager = pool_of_three(db)
    for together in (Gathered(), Grouped(), Gathered()):  # the first on a cold pool
        unit, error = await two_calls(manager, together, via=via, between=between)
        assert str(error) == (
            "work() was used by task 'second' while task 'first' uses it and "
            f"{'is still running' if between else 'has a statement in flight'}; await one after the other, "
            "or give each task its own unit with propagation='requires_new'"
        )
        assert unit.status is Status.ROLLED_BACK
        assert await db.rows("SELECT id FROM account") == []
        await assert_pool_is_whole(manager)
    unit, _error = await two_calls(pool_of_three(db), Grouped(), via=via, between=between)
    assert unit.status is Status.ROLLED_BACK


async def test_tasks_one_after_the_other_share_a_unit(db):
    """S3, the positive control: a finished last user hands the unit on, and both rows are committed."""
    manager = pool_of_three(db)
    async with manager.begin() as unit:
        for number in (1, 2):
            await asyncio.create_task(unit.session.execute(row(number)))
    assert await db.rows("SELECT id FROM account ORDER BY id") == [(1,), (2,)]


async def test_a_swallowed_boundary_error_still_rolls_back(db):
    """S3: it dooms the unit, so that a body which ignores it cannot commit half of its work."""
    manager = pool_of_three(db)
    with pytest.raises(errors.RollbackOnlyError) as caught:
        async with manager.begin() as unit:
            await unit.session.execute(text("SELECT 1"))
            first = asyncio.create_task(unit.session.execute(row(1)))
            await in_flight(unit)
            results = await asyncio.gather(first, unit.session.execute(row(2)), return_exceptions=True)
            assert [type(one).__name__ for one in results] == ["CursorResult", "TaskBoundaryError"]
    assert caught.value.__cause__ is results[1]
    assert await db.rows("SELECT id FROM account") == []
    await assert_pool_is_whole(manager)


async def test_the_end_waits_for_a_siblings_statement(db):
    """S3: ROLLBACK comes after the statement in flight, and no further one is let in between."""
    manager = pool_of_three(db)
    done = []

    async def write(session):
        for number in range(1, 1000):
            await session.execute(slow(db, 0.05))
            done.append(number)
            await session.execute(row(number))

    with pytest.raises(ValueError, match=r"^mine$"):
        async with manager.begin() as unit:
            await unit.session.execute(text("SELECT 1"))
            sibling = asyncio.create_task(write(unit.session))
            assert await in_flight(unit) is sibling
            raise ValueError("mine")
    assert done == [1]
    with pytest.raises(errors.NoUnitError):
        await sibling
    assert await db.rows("SELECT id FROM account") == []
    await assert_pool_is_whole(manager)


async def test_the_end_waits_for_a_siblings_flush(db, caplog):
    """S3: the statements of one flush, and the ROLLBACK that SQLAlchemy sends when it fails, are one operation."""
    manager = pool_of_three(db)
    with pytest.raises(ValueError, match=r"^mine$"):
        async with manager.begin() as unit:
            await unit.session.execute(row(3))
            # psycopg runs a short flush through in one turn of the loop, where nobody can meet it in flight
            slowly = select(literal_column("1")).select_from(slow(db, 0.05).columns().subquery()).scalar_subquery()
            unit.session.add_all([Account(id=1, balance=slowly), Account(id=3), Account(id=2, notes=[])])
            sibling = asyncio.create_task(unit.session.flush())
            assert await in_flight(unit) is sibling
            raise ValueError("mine")
    with pytest.raises(Exception):  # noqa: B017, PT011  # a unique violation, or refused behind the first INSERT
        await sibling
    assert await db.rows("SELECT id FROM account") == []
    assert [
        record.getMessage() for record in caplog.records if record.name == "sqla_uow"
    ] == []  # no trouble in ROLLBACK
    await assert_pool_is_whole(manager)


async def test_a_body_may_not_return_while_a_child_has_a_statement_in_flight(db):
    """S3: the end of the unit is a use of it."""
    manager = pool_of_three(db)
    with pytest.raises(
        errors.TaskBoundaryError, match=r"^begin.. was used by task 'parent' while task 'child' uses it "
    ):
        async with manager.begin() as unit:
            asyncio.current_task().set_name("parent")
            await unit.session.execute(row(1))
            child = asyncio.create_task(unit.session.execute(slow(db, 0.05)), name="child")
            assert await in_flight(unit) is child
    await asyncio.wait([child])
    assert await db.rows("SELECT id FROM account") == []
    await assert_pool_is_whole(manager)


async def test_the_wait_for_a_sibling_is_bounded(db, monkeypatch, caplog):
    """S3: behind the bound the connection is discarded, and neither leaks nor reaches anybody else."""
    monkeypatch.setattr(_ending, "IDLE_SECONDS", 0.05)
    manager = pool_of_three(db)
    began = time.monotonic()
    with pytest.raises(ValueError, match=r"^mine$"):
        async with manager.begin() as unit:
            await unit.session.execute(row(1))
            sibling = asyncio.create_task(unit.session.execute(slow(db, 0.6)))
            assert await in_flight(unit) is sibling
            raise ValueError("mine")
    if db.family != "sqlite":  # its driver closes a connection behind the statement
        assert time.monotonic() - began < 0.5
    assert [record.getMessage() for record in caplog.records if record.name == "sqla_uow"] == []  # no ROLLBACK is tried
    await asyncio.wait([sibling])
    assert await db.rows("SELECT id FROM account") == []
    await assert_pool_is_whole(manager)


@pytest.mark.drivers("asyncpg", "asyncmy", "aiomysql")  # psycopg complains of the cursor that the sibling leaves behind
async def test_the_end_under_a_siblings_stream(db):
    """S3: rows that another task is fetching are no statement that could be waited for; the pool stays whole all the same."""
    manager, rows = pool_of_three(db), []
    statement = {
        "postgresql": "SELECT n, pg_sleep(0.01) FROM generate_series(1, 200) n",
        "mysql": "SELECT seq, sleep(0.01) FROM seq_1_to_40",
    }[db.family]

    async def fetch(session):
        async for one in await session.stream(text(statement), execution_options={"yield_per": 5}):
            rows.append(one)  # noqa: PERF401  # seen while they come

    with pytest.raises(ValueError, match=r"^mine$"):
        async with manager.begin() as unit:
            await unit.session.execute(row(1))
            sibling = asyncio.create_task(fetch(unit.session))
            await until(lambda: len(rows) > 6)
            raise ValueError("mine")
    async with asyncio.timeout(5):
        await asyncio.wait([sibling])
    assert await db.rows("SELECT id FROM account") == []
    await assert_pool_is_whole(manager)


async def test_a_connection_that_comes_after_the_end_goes_back(db, monkeypatch):
    """S3: a sibling that still waits for the pool when the unit ends leaks neither connection nor turn."""
    monkeypatch.setattr(_ending, "IDLE_SECONDS", 0.02)
    manager = UnitOfWorkManager(db.engine(pool_size=1, max_overflow=0, pool_timeout=5))
    async with manager.begin() as other:
        await other.session.execute(row(1))
        with pytest.raises(ValueError, match=r"^mine$"):
            async with manager.begin(propagation="requires_new") as unit:
                unit._transaction.enclosing = ()  # as in a context that does not know of `other`
                sibling = asyncio.create_task(unit.session.execute(row(2)))
                await asyncio.sleep(0)
                raise ValueError("mine")
        assert not sibling.done()
    with pytest.raises(errors.NoUnitError):
        await sibling
    assert manager.engine.pool.checkedout() == 0
    async with asyncio.timeout(2), manager.begin() as unit:
        await unit.session.execute(row(3))
    assert await db.rows("SELECT id FROM account ORDER BY id") == [(1,), (3,)]


async def test_rollback_by_a_sibling_is_no_way_around(db):
    """S3: `session.rollback()` and COMMIT of another task are refused under a statement in flight."""
    manager = pool_of_three(db)
    with pytest.raises(errors.RollbackOnlyError):
        async with manager.begin() as unit:
            await unit.session.execute(text("SELECT 1"))
            first = asyncio.create_task(unit.session.execute(row(1)))
            await in_flight(unit)
            others = (unit.session.rollback(), unit.session.commit())
            results = await asyncio.gather(first, *others, return_exceptions=True)
            kinds = [type(one).__name__ for one in results]
            assert kinds == ["CursorResult", "TaskBoundaryError", "PropagationError"]
    assert await db.rows("SELECT id FROM account") == []
    await assert_pool_is_whole(manager)


async def insert(number):
    """Insert a row in the unit of the context."""
    await current_session().execute(row(number))


async def nothing():
    """Send no SQL."""


async def in_anyio_group(number):
    """Insert from the only child of an anyio task group."""
    async with anyio.create_task_group() as group:
        group.start_soon(insert, number)


async def in_timeout(number):
    """Insert in the same task, under asyncio's and anyio's timeouts."""
    async with asyncio.timeout(5):
        with anyio.fail_after(5):
            await insert(number)


@few_drivers
async def test_one_child_at_a_time(db):
    """S3: `asyncio.wait_for` (a child task on 3.11), timeouts, an anyio group with one child and its portal work."""
    manager = pool_of_three(db)

    @transactional
    async def work():
        await insert(1)
        await asyncio.wait_for(insert(2), 5)
        await in_timeout(3)
        await in_anyio_group(4)
        await anyio.to_thread.run_sync(anyio.from_thread.run, insert, 5)
        await asyncio.shield(insert(6))
        await insert(7)

    with manager.activate():
        await work()
    assert [number for (number,) in await db.rows("SELECT id FROM account ORDER BY id")] == [1, 2, 3, 4, 5, 6, 7]


async def test_a_wait_that_times_out_leaves_the_pool_whole(db):
    """S3: a child that `wait_for` cancels in its statement takes the unit with it, and nothing else."""
    manager = pool_of_three(db)
    with manager.activate(), pytest.raises(TimeoutError):
        async with manager.begin() as unit:
            await unit.session.execute(row(1))
            await asyncio.wait_for(unit.session.execute(slow(db, 0.3)), 0.05)
    assert unit.status is Status.ROLLED_BACK
    assert await db.rows("SELECT id FROM account") == []
    await assert_pool_is_whole(manager)


async def test_a_unit_begun_outside_any_task(db, manager):
    """S3: nobody could be said to use it."""
    caught = []

    def begin():
        entering = manager.begin().__aenter__()
        try:
            entering.send(None)
        except errors.TaskBoundaryError as error:
            caught.append(str(error))

    asyncio.get_running_loop().call_soon(begin)
    await asyncio.sleep(0)
    assert caught == ["begin() was begun outside any task; begin it in a coroutine that a task runs"]


# -- threads


def of_own_loop():
    """Look for the session in an event loop of the thread's own."""

    async def look():
        return current_session()

    return asyncio.run(look())


THREAD_MESSAGE = (
    "{name} was used from a thread other than the one of its event loop; "
    "read beforehand what the thread needs, or open a unit inside it"
)


@few_drivers
@pytest.mark.parametrize("look", [current_session, of_own_loop])
@pytest.mark.parametrize("start", [asyncio.to_thread, anyio.to_thread.run_sync])
async def test_no_session_in_a_thread(db, start, look):
    """S5: also in one with an event loop of its own; the unit is doomed."""
    manager = UnitOfWorkManager(db.engine())

    @transactional
    async def work():
        await insert(1)
        with pytest.raises(errors.TaskBoundaryError) as caught:
            await start(look)
        assert str(caught.value) == THREAD_MESSAGE.format(name="work()")

    with manager.activate(), pytest.raises(errors.RollbackOnlyError):
        await work()
    assert await db.rows("SELECT id FROM account") == []


@few_drivers
@pytest.mark.parametrize("read_before", [False, True])
@pytest.mark.parametrize("look", [current_session, of_own_loop])
async def test_no_read_session_in_a_thread(db, look, read_before):
    """S5: a sync endpoint gets no session of its scope, whether or not the scope has read already."""
    async with UnitOfWorkManager(db.engine()).scope():
        if read_before:
            await current_session().scalar(text("SELECT 1"))
        with pytest.raises(errors.TaskBoundaryError) as caught:
            await asyncio.to_thread(look)
        assert str(caught.value) == THREAD_MESSAGE.format(name="the read session of this scope")


@few_drivers
async def test_a_thread_may_not_join_nor_use_a_held_session(db):
    """S5: `@transactional` and a session from a closure in another loop are refused as well."""
    manager = UnitOfWorkManager(db.engine())
    joining, idle = transactional(insert), transactional(nothing)
    for use in (lambda _session: joining(1), lambda _session: idle(), lambda session: session.execute(row(2))):
        with pytest.raises(errors.TaskBoundaryError):
            async with manager.begin() as unit:
                session = unit.session
                await asyncio.to_thread(lambda use=use, session=session: asyncio.run(as_coroutine(use(session))))
        assert unit.status is Status.ROLLED_BACK
    assert await db.rows("SELECT id FROM account") == []


async def as_coroutine(awaitable):
    """Await what asyncio.run would not take."""
    return await awaitable


# -- ancestry


@pytest.mark.skipif(sys.version_info < (3, 12), reason="asyncio has eager tasks since Python 3.12")
@few_drivers
async def test_eager_tasks_are_siblings_too(db):
    """S3: a task that runs before `create_task` returns is a task nevertheless."""
    manager = pool_of_three(db)
    loop = asyncio.get_running_loop()
    before = loop.get_task_factory()
    loop.set_task_factory(asyncio.eager_task_factory)
    try:
        for via in ("current_session", "closure"):
            unit, error = await two_calls(manager, Gathered(), via=via, between=False)
            assert unit.status is Status.ROLLED_BACK
            # 3.12 gives the other one its name after its start.
            assert "while task 'first' uses it and has a statement in flight" in str(error)
        async with manager.begin() as unit:
            await asyncio.create_task(unit.session.execute(row(1)))
            await asyncio.wait_for(unit.session.execute(row(2)), 5)
    finally:
        loop.set_task_factory(before)
    assert await db.rows("SELECT id FROM account ORDER BY id") == [(1,), (2,)]
    await assert_pool_is_whole(manager)


class Layer:
    """What a `BaseHTTPMiddleware` does: the inner app runs in a child task, which lives on after its response began."""

    def __init__(self, app, *, before=False, after=False, group=anyio.create_task_group):
        self.app, self.before, self.after, self.group = app, before, after, group

    async def __call__(self, started, finish):
        if self.before:
            await insert_next()
        async with self.group() as group:
            response, consumed = asyncio.Event(), asyncio.Event()
            start = getattr(group, "start_soon", None)
            if start is not None:
                start(self.app, response, consumed)
            else:
                group.create_task(self.app(response, consumed))
            await response.wait()
            if self.after:
                await insert_next()
            started.set()
            await finish.wait()
            consumed.set()


async def insert_next():
    """Insert one more row in the unit of the context."""
    await current_session().execute(text("INSERT INTO account (id, balance) SELECT count(*), 0 FROM account"))


async def endpoint(started, finish):
    """Use the unit, and then be alive, sending, until the body is consumed."""
    await insert_next()
    started.set()
    await finish.wait()


def gone():
    """Return an event that is set: the client has read it all."""
    event = asyncio.Event()
    event.set()
    return event


LAYERS = [
    [{"after": True}],
    [{"before": True, "after": True}],
    [{}, {"after": True}],  # outermost first: the inner one looks only when its child is alive and was the last
    [{"after": True}, {"after": True}],
    [{}, {"after": True}, {}],  # the middle one looks when its grandchild was the last
    [{"before": True, "after": True}, {}, {"before": True, "after": True}],
]


@few_drivers
@pytest.mark.parametrize("layers", LAYERS, ids=repr)
async def test_stacked_middlewares(db, layers):
    """S3: any stack of `BaseHTTPMiddleware` may use the session before and after `call_next`."""
    app = endpoint
    for options in reversed(layers):
        app = Layer(app, **options)
    manager = pool_of_three(db)
    with manager.activate():
        async with manager.begin():
            await app(asyncio.Event(), gone())
    uses = 1 + sum(sum(options.values()) for options in layers)
    assert await db.scalar("SELECT count(*) FROM account") == uses


@few_drivers
@pytest.mark.parametrize("looked", [True, False])
async def test_ancestry_without_anyio(db, looked, monkeypatch):
    """S3: where anyio is not loaded, ancestors are those that looked at the ContextVar; others are taken for siblings."""
    manager = pool_of_three(db)
    app = Layer(Layer(endpoint, before=looked, after=True, group=asyncio.TaskGroup), group=asyncio.TaskGroup)
    expected = contextlib.nullcontext() if looked else pytest.raises(ExceptionGroup)
    with manager.activate(), monkeypatch.context() as patch, expected as caught:
        patch.delitem(sys.modules, "anyio")
        async with manager.begin():
            await app(asyncio.Event(), gone())
    if caught is not None:
        assert caught.value.split(errors.TaskBoundaryError)[1] is None
    assert await db.scalar("SELECT count(*) FROM account") == (3 if looked else 0)


@few_drivers
async def test_a_child_of_anyio_that_was_started_before_its_parent_used_the_unit(db):
    """S3: it has inherited nothing that tells of its parent; anyio knows."""
    manager = pool_of_three(db)
    turn = asyncio.Event()

    async def child():
        await turn.wait()
        await insert(2)

    async def parent():
        async with anyio.create_task_group() as group:
            group.start_soon(child)
            await asyncio.sleep(0)
            await insert(1)
            turn.set()

    with manager.activate():
        async with manager.begin():
            await asyncio.create_task(parent())
    assert await db.rows("SELECT id FROM account ORDER BY id") == [(1,), (2,)]


@few_drivers
async def test_a_statement_of_a_child_that_was_never_sent(db):
    """S3: a listener raises; when the child is done, it has nothing in flight, and is not what its parent is told of."""
    manager = pool_of_three(db)

    def refuse(_connection, _cursor, statement, *_rest):
        if "wrong" in statement:
            raise ValueError(statement)

    event.listen(manager.engine.sync_engine, "before_cursor_execute", refuse)
    dooms = sqlalchemy.__version__ >= "2.1"  # 2.0 tells nobody of such an error, and nothing was sent
    with pytest.raises(errors.RollbackOnlyError) if dooms else contextlib.nullcontext():
        async with manager.begin() as unit:
            await unit.session.execute(row(1))
            with pytest.raises(ValueError, match="wrong"):
                await asyncio.create_task(unit.session.execute(text("SELECT 'wrong'")))
            await unit.session.execute(row(2))
    assert await db.rows("SELECT id FROM account ORDER BY id") == ([] if dooms else [(1,), (2,)])
    await assert_pool_is_whole(manager)


@few_drivers
async def test_a_parent_takes_the_unit_back_for_good(db):
    """S3: it may use the unit while its child lives; then the child has lost it, and says so."""
    manager = pool_of_three(db)
    turn = asyncio.Event()

    async def child():
        await insert(1)
        turn.set()
        await turn_back.wait()
        await insert(3)

    turn_back = asyncio.Event()

    @transactional
    async def work():
        task = asyncio.create_task(child(), name="child")
        await turn.wait()
        await insert(2)
        turn_back.set()
        await task

    with manager.activate(), pytest.raises(errors.TaskBoundaryError) as caught:
        await work()
    assert str(caught.value) == (
        "work() was taken back by the task that started task 'child'; finish the child before its parent goes on, "
        "or give it a unit of its own with propagation='requires_new'"
    )
    assert await db.rows("SELECT id FROM account") == []
    await assert_pool_is_whole(manager)


@pytest.mark.drivers("sqlite")
def test_ancestors_that_are_gone(driver):
    """S3: who cannot use a unit any more is passed over."""
    assert list(Frame((), None, None).tasks()) == []


# -- S4


@few_drivers
async def test_a_transactional_child_joins(db):
    """S4: in a child task it joins the open unit, as a call would; the parent's rollback takes it along."""
    manager = pool_of_three(db)
    joining = transactional(insert)
    with manager.activate():
        async with manager.begin() as unit:
            await asyncio.create_task(joining(1))
            assert await unit.session.scalar(text("SELECT count(*) FROM account")) == 1
            unit.doom()
    assert await db.rows("SELECT id FROM account") == []


async def test_a_transactional_sibling_is_refused(db):
    """S4: it never opens an unrelated transaction beside the open one."""
    manager = pool_of_three(db)
    joining = transactional(insert)

    @transactional
    async def work():
        results = await asyncio.gather(joining(1), joining(2), return_exceptions=True)
        assert isinstance(results[1], errors.TaskBoundaryError)

    with manager.activate(), pytest.raises((errors.RollbackOnlyError, errors.TaskBoundaryError)):
        await work()
    assert await db.rows("SELECT id FROM account") == []
    await assert_pool_is_whole(manager)


@pytest.mark.drivers("asyncpg", "psycopg", "asyncmy", "aiomysql")  # SQLite has one writer
async def test_requires_new_says_aloud_that_it_is_another_one(db):
    """S4: children with `requires_new` have units of their own, side by side, and outlive the parent's rollback."""
    manager = pool_of_three(db)
    barrier = asyncio.Barrier(2)

    @transactional(propagation="requires_new")
    async def child(number):
        await insert(number)
        await barrier.wait()  # both are open at once

    with manager.activate():
        async with manager.begin() as unit:
            await insert(9)
            async with asyncio.timeout(5):
                await asyncio.gather(child(1), child(2))
            unit.doom()
    assert await db.rows("SELECT id FROM account ORDER BY id") == [(1,), (2,)]
    await assert_pool_is_whole(manager)


@few_drivers
async def test_a_child_that_outlives_the_unit(db):
    """S1, S4: on a closed handle a call is outermost, and `current_session()` never falls through to the scope around."""
    manager = pool_of_three(db)
    ended, seen = asyncio.Event(), []
    outermost = transactional(insert)

    async def late():
        await ended.wait()
        with pytest.raises(errors.NoUnitError) as caught:
            current_session()
        seen.append(str(caught.value))
        await outermost(1)
        with pytest.raises(errors.NoUnitError):
            current_session()

    async with manager.scope():
        async with manager.begin():
            task = asyncio.create_task(late())
            await asyncio.sleep(0)
        assert await current_session().scalar(text("SELECT 1")) == 1  # the read session of the parent's own context
        ended.set()
        await task
    assert seen == [
        (
            "the unit of work that was open here has ended; in a task that outlives it, or a background task, "
            "call a @transactional function, which opens its own"
        )
    ]
    assert await db.rows("SELECT id FROM account") == [(1,)]


@few_drivers
async def test_the_ends_of_two_managers_are_kept_apart(db):
    """S4: an ended unit of one manager hides what is around it although another manager's ended behind it."""
    first, second = UnitOfWorkManager(db.engine(), name="first"), UnitOfWorkManager(db.engine(), name="second")
    ended = asyncio.Event()

    async def late():
        await ended.wait()
        with second.activate(), first.activate():
            pass
        for name in ("first", "second"):
            with pytest.raises(errors.NoUnitError, match=r"^the unit of work that was open here has ended"):
                current_session(name)

    async with first.scope(), second.scope():
        async with first.begin(), second.begin(), first.begin(propagation="requires_new"):
            task = asyncio.create_task(late())
            await asyncio.sleep(0)
        ended.set()
        await task


async def test_a_copied_context_keeps_nothing_alive(db):
    """S1: a task that outlives unit and scope holds neither session nor connection nor unit."""
    manager = pool_of_three(db)
    release, kept = asyncio.Event(), {}

    async def late():
        current_session()
        await release.wait()

    async def request():
        async with manager.scope():
            reader = current_session()
            await reader.execute(text("SELECT 1"))
            async with manager.begin() as unit:
                await unit.session.execute(text("SELECT 1"))
                kept["connection"] = weakref.ref((await unit.session.connection()).sync_connection)
                kept["unit"], kept["session"] = weakref.ref(unit), weakref.ref(unit.session.sync_session)
                kept["reader"] = weakref.ref(reader.sync_session)
                task = asyncio.create_task(late())
                await asyncio.sleep(0)
            return task

    task = await request()
    gc.collect()
    assert not task.done()
    assert {name for name, ref in kept.items() if ref() is not None} == set()
    assert manager.engine.pool.checkedout() == 0
    release.set()
    await task


@few_drivers
@pytest.mark.parametrize("place", ["activate", "scope", "begin"])
async def test_a_task_that_starts_its_successor_for_ever_does_not_grow(db, place):
    """S1: neither ended tasks nor ended places pile up in the contexts they were copied into."""
    manager = pool_of_three(db)
    done = asyncio.Event()
    most = {Frame: 0, Place: 0}

    def alive():
        gc.collect()
        things = gc.get_objects()
        return {kind: sum(isinstance(thing, kind) for thing in things) for kind in most}

    left_by_other_tests = alive()

    def count():
        for kind, number in alive().items():
            most[kind] = max(most[kind], number - left_by_other_tests[kind])

    async def generation(number):
        async with contextlib.AsyncExitStack() as stack:
            context = getattr(manager, place)()
            if place == "activate":
                stack.enter_context(context)
            else:
                await stack.enter_async_context(context)
            if number % 25 == 0:
                count()
            if number == 0:
                done.set()
                return
            looked = asyncio.Event()
            asyncio.create_task(successor(number - 1, looked))  # noqa: RUF006  # it outlives this one
            await looked.wait()

    async def successor(number, looked):
        current = asyncio.create_task(generation(number))
        await asyncio.sleep(0)
        looked.set()
        await current

    with manager.activate():
        asyncio.create_task(generation(100))  # noqa: RUF006  # likewise
        await done.wait()
    assert most[Frame] < 60
    assert most[Place] < 60


# -- async generators


async def rows_in_a_unit(manager):
    """Yield from inside a unit, as people do."""
    async with manager.begin() as unit:
        for number in range(1, 10):
            await unit.session.execute(row(number))
            yield number


async def rows_in_a_scope(manager):
    """Yield from inside a scope."""
    async with manager.scope():
        for number in range(1, 10):
            await current_session().execute(text("SELECT 1"))
            yield number


@pytest.mark.parametrize("make", [rows_in_a_unit, rows_in_a_scope])
async def test_an_async_generator_closed_in_another_task(db, make):
    """S1: no token is reset in a context that never set it; the unit ends and the pool is whole."""
    manager = pool_of_three(db)
    generator = make(manager)
    assert await anext(generator) == 1
    await asyncio.create_task(generator.aclose())
    with pytest.raises(errors.NoUnitError, match="has ended"):
        current_session(manager)
    assert await db.rows("SELECT id FROM account") == []
    await assert_pool_is_whole(manager)


@pytest.mark.parametrize("make", [rows_in_a_unit, rows_in_a_scope])
async def test_an_async_generator_that_nobody_closes(db, make):
    """S1: the event loop closes it in a task of its own, and that ends the unit too."""
    manager = pool_of_three(db)

    async def consume():
        async for number in make(manager):
            assert number == 1
            break
        assert manager.engine.pool.checkedout() == 1

    await asyncio.create_task(consume())
    gc.collect()
    await until(lambda: manager.engine.pool.checkedout() == 0)
    assert await db.rows("SELECT id FROM account") == []
    await assert_pool_is_whole(manager)


@few_drivers
async def test_a_generator_begun_in_one_task_and_finished_in_another(db):
    """S3: it commits where the first task has finished."""
    manager = pool_of_three(db)
    generator = rows_in_a_unit(manager)

    async def first():
        return await anext(generator)

    async def rest():
        return [number async for number in generator]

    assert await asyncio.create_task(first()) == 1
    assert await asyncio.create_task(rest()) == list(range(2, 10))
    assert await db.scalar("SELECT count(*) FROM account") == 9
