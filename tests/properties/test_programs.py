"""Any program of statements, streams, savepoints, raw calls, listeners, swallowed errors and cancellations ends in one truth.

The model knows only the rows: which ones the program has written and not undone, and whether something failed that nobody
undid.  A unit that says COMMITTED has just these rows and has run its hooks; one that does not has none and has not.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import event, insert, text

from sqla_uow import Status, UnitOfWorkManager, after_commit, current_session, transactional
from sqla_uow._databases.database import driver_of
from sqla_uow._databases.driver import State
from tests.kit.models import Account, Note, Unique

PROGRAMS = int(os.environ.get("SQLA_UOW_PROGRAMS", "100"))
FAILS = "INSERT INTO uniq (id, name) VALUES (7, 'taken')"


class UndoError(Exception):
    """The program's own."""


WAYS = ["flush", "session", "core", "raw", "adapter"]

insertion = st.tuples(st.just("insert"), st.sampled_from(WAYS))
failure = st.tuples(st.just("fail"), st.sampled_from([*WAYS, "listener"]))
stream = st.tuples(st.just("stream"), st.sampled_from(["all", "left", "closed", "written under"]))
cancelled = st.tuples(st.just("cancelled"), st.integers(0, 6), st.sampled_from(["session", "stream"]))
simple = st.one_of(insertion, insertion, st.tuples(st.just("hook")), stream, failure, cancelled)


def _blocks(children):
    block = st.sampled_from(["savepoint", "nested", "joined", "child"])
    return st.tuples(
        block, st.lists(st.tuples(children, st.booleans()), max_size=3), st.sampled_from(["return", "raise"])
    )


steps = st.recursive(simple, _blocks, max_leaves=8)
programs = st.tuples(
    st.lists(st.tuples(steps, st.booleans()), min_size=1, max_size=5),
    st.sampled_from(["return", "return", "return", "raise"]),
)


class Level:
    """What the model knows of one block."""

    def __init__(self):
        self.rows = []
        self.hooks = []
        self.damaged = False

    def take_over(self, inner):
        """The inner block belongs to this one from now on."""
        self.rows += inner.rows
        self.hooks += inner.hooks
        self.damaged = self.damaged or inner.damaged


class Program:
    """One run of a program in a unit, and its model."""

    def __init__(self, bench, number):
        self.bench = bench
        self.number = number
        self.numbers = itertools.count()
        self.hooks = []
        self.failed = False  # something has, undone or not

    async def run(self, body, level):
        """Run steps of (step, is its error swallowed?)."""
        for step, swallow in body:
            try:
                await getattr(self, "do_" + step[0])(level, *step[1:])
            except UndoError:
                self.failed = True
                if not swallow:
                    raise
            except Exception:
                self.failed = True
                level.damaged = level.damaged or step[0] not in ("savepoint", "nested", "cancelled", "child")
                if not swallow:
                    raise

    async def do_insert(self, level, way):
        name = f"{self.number}-{next(self.numbers)}"
        await self.send(way, f"INSERT INTO note (text) VALUES ('{name}')", Note(text=name))
        level.rows.append(name)

    async def do_fail(self, level, way):
        if way == "listener":
            self.bench.armed = True
            await current_session().execute(text("SELECT 1"))
            level.damaged = self.failed = True
            return
        await self.send(way, FAILS, Unique(id=7, name="taken"))

    async def send(self, way, sql, instance):
        session = current_session()
        if way == "flush":
            session.add(instance)
            try:
                await session.flush()
            finally:
                if instance in session:
                    session.expunge(instance)
        elif way == "session":
            await session.execute(text(sql))
        elif way == "core":
            await (await session.connection()).exec_driver_sql(sql)
        elif way == "adapter":
            await session.run_sync(_by_adapter, sql)
        else:
            raw = (await (await session.connection()).get_raw_connection()).driver_connection
            if hasattr(raw, "execute"):
                await raw.execute(sql)
            else:
                async with raw.cursor() as cursor:
                    await cursor.execute(sql)

    async def do_hook(self, level):
        name = next(self.numbers)
        after_commit(self.hooks.append, name)
        level.hooks.append(name)

    async def do_stream(self, level, how):
        result = await current_session().stream(text("SELECT id FROM account ORDER BY id"))
        seen = 0
        async for _ in result:
            seen += 1
            if how == "written under":
                await self.do_insert(level, "session")
            elif how != "all" and seen == 10:
                break
        if how == "all":
            assert seen == 120, "rows are missing"
        if how == "closed":
            await result.close()

    async def do_cancelled(self, level, turns, what):
        child = asyncio.create_task(self.do_insert(level, what) if what == "session" else self.do_stream(level, "all"))
        for _ in range(turns):
            await asyncio.sleep(0)
        child.cancel()
        try:
            await child
        except asyncio.CancelledError:
            raise RuntimeError("the child was cancelled") from None  # an error of the program, as of gather()

    async def do_savepoint(self, level, body, leaves):
        inner = Level()
        async with current_session().begin_nested():
            await self.run(body, inner)
            if leaves == "raise":
                raise UndoError
        level.take_over(inner)

    async def do_nested(self, level, body, leaves):
        inner = Level()
        await self.bench.nested(self, body, inner, leaves)
        level.take_over(inner)

    async def do_joined(self, level, body, leaves):
        inner = Level()
        try:
            await self.bench.joined(self, body, inner, leaves)
        except BaseException:
            level.damaged = True
            raise
        level.take_over(inner)

    async def do_child(self, level, body, leaves):
        async def go():
            await self.run(body, level)
            if leaves == "raise":
                raise UndoError

        try:
            await asyncio.create_task(go())
        except UndoError:
            self.failed = True


def _by_adapter(session, sql):
    cursor = session.connection().connection.cursor()
    try:
        cursor.execute(sql)
    finally:
        cursor.close()


async def _block(program, body, level, leaves):
    await program.run(body, level)
    if leaves == "raise":
        raise UndoError


class Bench:
    """A database, a manager with a pool of one connection, and listeners that swallow."""

    def __init__(self, db):
        self.db = db
        self.engine = db.engine(pool_size=1, max_overflow=0, pool_timeout=5)
        self.armed = False
        event.listen(self.engine.sync_engine, "before_cursor_execute", self.fail_and_swallow)
        self.manager = UnitOfWorkManager(self.engine)
        self.nested = transactional(using=self.manager, propagation="nested")(_block)
        self.joined = transactional(using=self.manager)(_block)
        self.numbers = itertools.count()

    def fail_and_swallow(self, connection, *_args):
        if self.armed:
            self.armed = False
            with contextlib.suppress(Exception):
                connection.exec_driver_sql(FAILS)

    async def prepare(self):
        await self.db.create_tables()
        async with self.manager.begin() as unit:
            await unit.session.execute(insert(Account), [{"id": number, "balance": 0} for number in range(120)])
            unit.session.add(Unique(id=7, name="taken"))

    async def check(self, program):
        """Run it, and compare what is said with what is there."""
        body, leaves = program
        number = next(self.numbers)
        run, level = Program(self, number), Level()
        unit = error = None
        self.armed = False
        try:
            with self.manager.activate():
                async with self.manager.begin() as unit:
                    await _block(run, body, level, leaves)
        except Exception as caught:  # noqa: BLE001  # whatever it is, it says that nothing was committed
            error = caught
        self.armed = False
        committed = unit.status is Status.COMMITTED
        assert unit.status in (Status.COMMITTED, Status.ROLLED_BACK), unit.status
        assert committed == (error is None), error
        rows = await self.rows(number)
        if committed:
            assert not level.damaged, "something is missing"
            assert (rows, run.hooks) == (level.rows, level.hooks)
        else:
            assert (rows, run.hooks) == ([], [])
            assert run.failed or leaves == "raise", error
        await self.is_sound(number)

    async def rows(self, number):
        pattern = f"'{number}-%'"
        found = await self.db.rows(f"SELECT text FROM note WHERE text LIKE {pattern} ORDER BY id")
        return [name for (name,) in found]

    async def is_sound(self, number):
        """The next user of the pool gets a connection in no transaction, and what he writes is there."""
        assert self.engine.pool.checkedout() == 0
        async with self.engine.connect() as connection:
            raw = (await connection.get_raw_connection()).driver_connection
            assert driver_of(self.engine.dialect).state(raw) is State.NONE
        async with self.manager.begin() as unit:
            unit.session.add(Note(text=f"{number}-sound"))
        assert await self.rows(number)
        assert await self.db.is_idle()


# psycopg warns of a cursor that was not closed, where its own statement was cancelled; plain SQLAlchemy leaves it so, too.
@pytest.mark.filterwarnings("ignore:.*ServerCursorMixin:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.timeout(60 + PROGRAMS)
def test_programs(driver, databases):
    """Status, hooks and rows agree, and the pool is sound after each."""
    try:
        run_programs(driver, databases)
    finally:
        gc.collect()  # such cursors go here, where their warning is expected


def run_programs(driver, databases):
    """Run as many as were asked for, in one loop."""
    with tempfile.TemporaryDirectory() as folder, asyncio.Runner() as runner:
        db = databases.make(driver, Path(folder))
        bench = Bench(db)
        runner.run(bench.prepare())

        @settings(
            max_examples=PROGRAMS, deadline=None, database=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
        )  # fmt: skip
        @given(programs)
        def check(program):
            runner.run(bench.check(program))

        try:
            check()
        finally:
            runner.run(db.dispose())
