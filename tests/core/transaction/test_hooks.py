"""Hooks: once, in order, and only for what is committed."""

from __future__ import annotations

import asyncio
import contextlib
import functools

import pytest
from sqlalchemy import event
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import async_sessionmaker
from sqlalchemy.orm import Session

from sqla_uow import (
    RetryPolicy,
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
from tests.kit.logged import logged
from tests.kit.models import Note

# One of each database: the driver has no part in it.
pytestmark = pytest.mark.drivers("sqlite", "psycopg", "asyncmy")
AT_ONCE = RetryPolicy(base=0, cap=0)


@pytest.fixture
def manager(db):
    """Provide an active manager over a pool of one connection."""
    manager = UnitOfWorkManager(db.engine(pool_size=1, max_overflow=0), retry=AT_ONCE)
    with manager.activate():
        yield manager


async def write(text="written"):
    """Send one row."""
    current_session().add(Note(text=text))
    await current_session().flush()


# -- H1


async def test_in_order_once_with_arguments_after_the_commit(manager, db):
    """H1: sync and async alike; the row is visible to others, no transaction is open, the connection is back."""
    calls = []

    async def looking(*args, **kwargs):
        with pytest.raises(errors.NoUnitError):
            current_session()
        calls.append((args, kwargs, await db.scalar("SELECT count(*) FROM note"), manager.engine.pool.checkedout()))

    @transactional
    async def work():
        after_commit(looking, 1, key="a")
        await write()
        current_unit().after_commit(calls.append, "sync")
        after_commit(functools.partial(looking, 2), 3)
        assert calls == []

    await work()
    assert calls == [((1,), {"key": "a"}, 1, 0), "sync", ((2, 3), {}, 1, 0)]


async def test_of_a_unit_without_sql(manager):
    """H1: a unit that sent nothing is committed as well."""
    calls = []
    async with manager.begin() as unit:
        unit.after_commit(calls.append, 1)
    assert calls == [1]


async def test_dropped_with_the_unit_and_with_failed_attempts(trouble, manager):
    """H1, T15: a hook belongs to its attempt; `after_rollback` runs for each attempt that failed."""
    calls = []
    manager = UnitOfWorkManager(trouble.engine(), retries=2, retry=AT_ONCE, isolation=trouble.isolation)

    @transactional(using=manager)
    async def work():
        await trouble.settle()
        unit = current_unit(manager)
        unit.after_commit(calls.append, f"commit {unit.attempt}")
        unit.after_rollback(calls.append, f"rollback {unit.attempt}")
        if unit.attempt < 3:
            await trouble.strike(unit.session)

    await work()
    assert calls == ["rollback 1", "rollback 2", "commit 3"]


# -- savepoints


@contextlib.asynccontextmanager
async def nested(manager):
    """Open a nested frame."""
    async with manager.begin(propagation="nested"):
        yield


@contextlib.asynccontextmanager
async def begin_nested(_manager):
    """Open the session's own savepoint."""
    async with current_session().begin_nested():
        yield


def register(calls, name):
    """Register all that can be dropped."""
    after_commit(calls.append, f"commit {name}")
    before_commit(calls.append, f"before {name}")
    after_rollback(calls.append, f"rollback {name}")


@pytest.mark.parametrize("savepoint", [nested, begin_nested])
@pytest.mark.parametrize("sql", ["none", "inside", "before"])
async def test_dropped_with_their_savepoint(manager, savepoint, sql):
    """H1, H3, T12: also those of savepoints released inside it, with and without SQL; those around it stay."""
    calls = []

    @transactional
    async def work():
        if sql == "before":
            await write()
        register(calls, "outer")
        with contextlib.suppress(KeyError):
            async with savepoint(manager):
                register(calls, "inner")
                if sql == "inside":
                    await write("inner")
                async with savepoint(manager):
                    register(calls, "grandchild")
                raise KeyError
        register(calls, "later")

    await work()
    assert calls == [
        "before outer",
        "before later",
        "commit outer",
        "commit later",
        "rollback inner",
        "rollback grandchild",
    ]


@pytest.mark.parametrize("savepoint", [nested, begin_nested])
@pytest.mark.parametrize("sql", [False, True])
async def test_a_released_savepoint_shares_the_fate_of_the_unit(manager, savepoint, sql):
    """H1, H3, H4, T11, T13: RELEASE is no commit; `after_rollback` of released savepoints runs with the unit's."""
    calls = []

    @transactional
    async def work(*, fail):
        register(calls, "outer")
        async with savepoint(manager):
            register(calls, "inner")
            if sql:
                await write()
        assert calls == []
        if fail:
            raise KeyError

    with pytest.raises(KeyError):
        await work(fail=True)
    assert calls == ["rollback outer", "rollback inner"]
    calls.clear()
    await work(fail=False)
    assert calls == ["before outer", "before inner", "commit outer", "commit inner"]


async def test_each_rollback_hook_runs_once(manager):
    """H3: rolled back with its savepoint first and with the unit then, it is due once."""
    calls = []

    @transactional
    async def work():
        with contextlib.suppress(KeyError):
            async with nested(manager):
                after_rollback(calls.append, "inner")
                raise KeyError
        after_rollback(calls.append, "outer")
        raise ValueError

    with pytest.raises(ValueError, match=r"^$"):
        await work()
    assert calls == ["inner", "outer"]


# -- H2


async def test_all_run_and_failures_are_collected(manager, db):
    """H2: in one group, that can be taken apart; it is committed, and the message says so."""
    calls = []

    async def fail(error):
        calls.append(repr(error))
        raise error

    @transactional(retries=3)
    async def work():
        await write()
        after_commit(fail, KeyError("a"))
        after_commit(calls.append, "between")
        after_commit(fail, ValueError("b"))

    with pytest.raises(errors.AfterCommitError) as caught:
        await work()
    assert calls == ["KeyError('a')", "between", "ValueError('b')"]
    assert [repr(error) for error in caught.value.exceptions] == ["KeyError('a')", "ValueError('b')"]
    assert caught.value.message == (
        "work() is committed, but 2 after_commit hooks failed; repeat what they do, not the function"
    )
    assert all(isinstance(part, errors.AfterCommitError) for part in caught.value.split(KeyError))
    assert await db.rows("SELECT text FROM note") == [("written",)]


async def test_a_hook_that_meets_a_genuine_conflict_retries_nothing(trouble):
    """H2, T15: the function ran once, the row is there once, even if its `retry_on` would retry everything."""
    runs, struck = [], []
    manager = UnitOfWorkManager(trouble.engine(), retries=5, retry=AT_ONCE)

    async def meet():
        struck.append(1)
        async with trouble.engine().connect() as connection:
            if trouble.isolation:
                await connection.execution_options(isolation_level=trouble.isolation)
            await trouble.provoke(connection)

    @transactional(using=manager, retry_on=lambda _error: True)
    async def work():
        runs.append(1)
        unit = current_unit(manager)
        unit.session.add(Note(text="written"))
        unit.after_commit(meet)

    with pytest.raises(errors.AfterCommitError) as caught:
        await work()
    await trouble.settle()
    assert (len(runs), len(struck)) == (1, 1)
    [conflict] = caught.value.exceptions
    assert isinstance(conflict, DBAPIError)
    assert await trouble.db.rows("SELECT text FROM note") == [("written",)]


async def test_a_hook_may_open_a_unit_and_register_further_hooks(manager, db):
    """H2, T14: the unit's own hooks run with it; what the hook itself registers runs after those that wait already."""
    calls = []

    @transactional
    async def another():
        await write("of the hook")
        after_commit(calls.append, "of the hook's unit")

    async def first(unit):
        calls.append("first")
        after_commit(calls.append, "registered by name")
        unit.after_commit(calls.append, "registered on the unit")
        await another()

    @transactional
    async def work():
        after_commit(first, current_unit())
        after_commit(calls.append, "second")
        await write()

    await work()
    assert calls == ["first", "of the hook's unit", "second", "registered by name", "registered on the unit"]
    assert await db.rows("SELECT text FROM note ORDER BY id") == [("written",), ("of the hook",)]


async def test_a_hook_that_awaits_what_was_cancelled_is_one_failure_of_many(manager):
    """H2: all run; nobody has cancelled the caller."""
    calls = []

    async def wait_for_cancelled():
        task = asyncio.create_task(asyncio.sleep(30))
        task.cancel()
        await task

    @transactional
    async def work():
        after_commit(wait_for_cancelled)
        after_commit(calls.append, "ran")

    with pytest.raises(errors.AfterCommitError) as caught:
        await work()
    assert calls == ["ran"]
    assert [type(error) for error in caught.value.exceptions] == [errors.UnitOfWorkError]


# -- H3


async def test_before_commit_writes_in_the_transaction_and_registers_more(manager, db):
    """H3: in order, in the unit; what it registers runs too, `after_commit` included."""
    calls = []

    async def late(name):
        calls.append(name)
        await write(name)
        if name == "a":
            before_commit(late, "c")
            after_commit(calls.append, "committed")

    @transactional
    async def work():
        before_commit(late, "a")
        before_commit(late, "b")
        await write("body")
        assert calls == []

    await work()
    assert calls == ["a", "b", "c", "committed"]
    assert [text for (text,) in await db.rows("SELECT text FROM note ORDER BY id")] == ["body", "a", "b", "c"]


async def test_before_commit_that_fails_rolls_back(manager, db):
    """H3: its exception is the function's; no later one runs."""
    calls = []

    def fail():
        raise KeyError("mine")

    @transactional
    async def work():
        await write()
        before_commit(fail)
        register(calls, "outer")

    with pytest.raises(KeyError, match="mine"):
        await work()
    assert calls == ["rollback outer"]
    assert await db.rows("SELECT * FROM note") == []


async def test_before_commit_runs_in_each_attempt_and_its_conflict_is_retried(trouble):
    """H3, R1: it is inside the attempt."""
    calls = []
    manager = UnitOfWorkManager(trouble.engine(), retries=2, retry=AT_ONCE, isolation=trouble.isolation)

    async def hook(unit):
        await trouble.settle()
        calls.append(unit.attempt)
        if unit.attempt == 1:
            await trouble.strike(unit.session)

    @transactional(using=manager)
    async def work():
        current_unit(manager).before_commit(hook, current_unit(manager))

    await work()
    assert calls == [1, 2]


async def test_after_rollback_is_best_effort(manager, caplog):
    """H3: its own trouble is logged, the next one runs, and the caller gets what rolled back."""
    calls = []

    def fail():
        raise ValueError("of the hook")

    @transactional
    async def work():
        after_rollback(fail)
        after_rollback(calls.append, "ran")
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        await work()
    assert calls == ["ran"]
    [record] = caplog.records
    assert record.getMessage() == f"after_rollback hook {fail.__qualname__} failed; the rollback itself is done"
    assert record.exc_info[0] is ValueError


# -- a bound for hooks whose caller is cancelled


@pytest.mark.parametrize(
    ("register", "failure"),
    [
        pytest.param(after_commit, None, id="after a commit"),
        pytest.param(after_rollback, KeyError("mine"), id="after a rollback"),
        pytest.param(after_rollback, asyncio.CancelledError(), id="after a rollback because of the cancellation"),
    ],
)
async def test_hooks_that_hang_are_stopped_after_a_cancellation(manager, monkeypatch, caplog, register, failure):
    """C3: bounded for the hooks, whatever ended the unit; nothing of them goes on behind the caller's back."""
    monkeypatch.setattr("sqla_uow._transaction.hooks.HOOK_SECONDS", 0.1)
    running, stopped = asyncio.Event(), asyncio.Event()

    async def hang():
        running.set()
        try:
            await asyncio.Event().wait()
        finally:
            stopped.set()

    @transactional
    async def work():
        register(hang)
        if failure is not None:
            raise failure

    task = asyncio.create_task(work())
    async with asyncio.timeout(10):
        await running.wait()
        if not isinstance(failure, asyncio.CancelledError):
            task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await stopped.wait()
    message = "hooks of work() took more than 0.1 s after a cancellation; stopped"
    assert logged(caplog) == [("ERROR", message, {"function": "work()"})]


# -- H4


@pytest.mark.parametrize("function", [after_commit, before_commit, after_rollback])
async def test_outside_a_unit_there_is_nothing_to_register_with(manager, function):
    """H4: neither under an active manager nor in a scope, whose read session commits nothing."""
    with pytest.raises(errors.NoUnitError, match=r"^no unit of work is open for manager 'default'; "):
        function(print)
    async with manager.scope():
        with pytest.raises(errors.NoUnitError) as caught:
            function(print)
        name = function.__name__
        assert (
            str(caught.value) == f"{name}() was called outside a unit of work; call it inside a @transactional function"
        )


async def test_nor_with_a_unit_that_has_ended(manager):
    """H4: a unit kept beyond its end, in every status."""
    async with manager.begin() as committed:
        pass
    with pytest.raises(KeyError):
        async with manager.begin() as rolled_back:
            raise KeyError
    assert (committed.status, rolled_back.status) == (Status.COMMITTED, Status.ROLLED_BACK)
    for unit in (committed, rolled_back):
        for register in (unit.after_commit, unit.before_commit, unit.after_rollback):
            with pytest.raises(errors.NoUnitError) as caught:
                register(print)
            assert str(caught.value) == "begin() has ended; register hooks while it is open"


async def test_in_a_task_that_a_hook_left_behind(manager):
    """H4: only the hooks' own task may add to them, while they run."""
    tasks = []

    async def later():
        await asyncio.sleep(0)
        after_commit(print)

    @transactional
    async def work():
        after_commit(lambda: tasks.append(asyncio.create_task(later())))

    await work()
    with pytest.raises(errors.NoUnitError):
        await tasks[0]


@pytest.mark.parametrize("code", [None, "40001"])
async def test_a_listener_that_fails_behind_the_commit(db, code):
    """H2: SQLAlchemy's own after_commit comes when COMMIT is answered: never ambiguous, and nothing is done twice."""

    class ListenedSession(Session):
        """A class of this test alone."""

    class DriverError(Exception):
        sqlstate = code

    runs = []
    trouble = DBAPIError("SELECT 1", {}, DriverError())
    event.listen(ListenedSession, "after_commit", lambda _session: (_ for _ in ()).throw(trouble))
    manager = UnitOfWorkManager(async_sessionmaker(db.engine(pool_size=1), sync_session_class=ListenedSession))

    @transactional(retries=2, retry=AT_ONCE, using=manager)
    async def work():
        runs.append(current_unit(manager))
        current_session(manager).add(Note(text="once"))
        current_unit(manager).after_commit(runs.append, "hook")

    with pytest.raises(errors.AfterCommitError) as caught:
        await work()
    assert caught.value.exceptions == (trouble,)
    assert runs[1:] == ["hook"]
    assert runs[0].status is Status.COMMITTED
    assert await db.rows("SELECT text FROM note") == [("once",)]
    assert manager.engine.pool.checkedout() == 0


async def test_what_a_hook_was_bound_to_is_not_said(manager):
    """H2: a partial's arguments and a method's object may be secret."""

    async def send(_token):
        raise asyncio.CancelledError

    with pytest.raises(errors.AfterCommitError) as caught:
        async with manager.begin() as unit:
            unit.after_commit(functools.partial(send, "secret"))
    (failure,) = caught.value.exceptions
    assert str(failure).endswith("send awaited what was cancelled; let it catch that")
    assert "secret" not in str(failure)
