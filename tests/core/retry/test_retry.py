"""How often, when and with what a function is run again."""

from __future__ import annotations

import asyncio
import logging

import pytest
from sqlalchemy import String, TypeDecorator, literal, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError, StatementError

from sqla_uow import RetryPolicy, Status, UnitOfWorkManager, current_session, current_unit, errors, transactional
from tests.kit.models import Note, Unique


class Watched:
    """A policy with a clock that only its sleeps move; rng takes the upper bound, so that waits are the clamp's."""

    def __init__(self, *, base=1.0, cap=4.0, on_sleep=None):
        self.now = 100.0
        self.waits = []
        self.asked = []
        self.on_sleep = on_sleep
        self.policy = RetryPolicy(base=base, cap=cap, clock=lambda: self.now, sleep=self.sleep, rng=self.rng)

    def rng(self, low, high):
        self.asked.append((low, high))
        return high

    async def sleep(self, seconds):
        self.waits.append(seconds)
        self.now += seconds
        if self.on_sleep is not None:
            await self.on_sleep()


def always(trouble, seen):
    """Make a body that always meets a conflict."""

    async def body():
        await trouble.settle()
        seen.append(current_unit())
        await trouble.strike(current_session())

    return body


async def test_retries_5_is_six_runs_and_nested_retries_never_multiply(trouble):
    """R1, T6, T7: three calls deep with retries=5 each: six runs, five waits, one error."""
    watched, seen = Watched(), []
    options = {"retries": 5, "retry": watched.policy, "isolation": trouble.isolation}
    inner = transactional(**options)(always(trouble, seen))

    @transactional(**options)
    async def middle():
        await inner()

    @transactional(**options)
    async def outer():
        await middle()

    with UnitOfWorkManager(trouble.engine()).activate(), pytest.raises(errors.ConflictError) as caught:
        await outer()
    assert caught.value.attempts == 6
    assert watched.waits == [1, 2, 4, 4, 4]
    assert caught.value.elapsed == 15
    assert [unit.attempt for unit in seen] == [1, 2, 3, 4, 5, 6]
    assert [unit.is_last_attempt for unit in seen] == [False] * 5 + [True]


async def test_each_attempt_has_all_new_but_its_arguments(trouble):
    """R1, T10: another session, another transaction in the database, the very same arguments."""
    watched, sessions, arguments, transactions = Watched(), [], [], []
    argument = object()

    @transactional(retries=2, retry=watched.policy, isolation=trouble.isolation)
    async def work(one, *, two):
        await trouble.settle()
        sessions.append(current_session())
        arguments.append((one, two))
        if trouble.db.family == "postgresql":
            transactions.append(await current_session().scalar(text("SELECT pg_current_xact_id()::text")))
        if len(sessions) < 3:
            await trouble.strike(current_session())
        return one

    with UnitOfWorkManager(trouble.engine()).activate():
        assert await work(argument, two=2) is argument
    assert arguments == [(argument, 2)] * 3
    assert len({id(session) for session in sessions}) == 3
    assert len(set(transactions)) in (0, 3)


async def test_a_constraint_violation_runs_once_and_waits_never(db):
    """R2, T5: permanent is permanent, and is the driver's own error to the caller."""
    watched, runs = Watched(), []
    await db.run("INSERT INTO uniq (id, name) VALUES (1, 'taken')")

    @transactional(retries=5, retry=watched.policy)
    async def work():
        runs.append(current_unit())
        current_session().add(Unique(name="taken"))

    with UnitOfWorkManager(db.engine()).activate(), pytest.raises(IntegrityError):
        await work()
    assert (len(runs), watched.waits, runs[0].status) == (1, [], Status.ROLLED_BACK)
    assert await db.scalar("SELECT count(*) FROM uniq") == 1


async def test_retry_on_adds_to_the_table_for_one_function(db):
    """R4: an allocator that wants to try another key; asked with the exception that left the function."""
    watched, runs, asked = Watched(), [], []
    await db.run("INSERT INTO uniq (id, name) VALUES (1, 'key-1')")

    def taken(error):
        asked.append(type(error))
        return isinstance(error, IntegrityError)

    @transactional(retries=5, retry=watched.policy, retry_on=taken)
    async def allocate():
        runs.append(f"key-{len(runs) + 1}")
        current_session().add(Unique(name=runs[-1]))

    with UnitOfWorkManager(db.engine()).activate():
        await allocate()
    assert (runs, asked, len(watched.waits)) == (["key-1", "key-2"], [IntegrityError], 1)
    assert await db.rows("SELECT name FROM uniq ORDER BY name") == [("key-1",), ("key-2",)]


async def test_retry_on_that_never_gives_up_ends_all_the_same(db):
    """R4: within the retries; then a `ConflictError` whose reason says whose wish it was."""

    @transactional(retries=1, retry=Watched().policy, retry_on=lambda error: isinstance(error, KeyError))
    async def work():
        raise KeyError("again")

    with UnitOfWorkManager(db.engine()).activate(), pytest.raises(errors.ConflictError) as caught:
        await work()
    assert (caught.value.attempts, caught.value.reason, caught.value.code) == (2, "retry_on", None)
    assert isinstance(caught.value.__cause__, KeyError)


async def test_a_conflict_of_somebody_else_is_not_ours(trouble):
    """R4: met on another engine's connection inside the body: one run, the error as it is."""
    watched, runs = Watched(), []
    other = trouble.engine()

    @transactional(retries=5, retry=watched.policy)
    async def work():
        runs.append(1)
        async with other.connect() as connection:
            if trouble.isolation:
                await connection.execution_options(isolation_level=trouble.isolation)
            await trouble.provoke(connection)

    with UnitOfWorkManager(trouble.db.engine()).activate(), pytest.raises(DBAPIError):
        await work()
    assert (runs, watched.waits) == ([1], [])


async def test_a_conflict_of_an_inner_unit_is_the_inner_units(trouble):
    """R1, R4: `requires_new` retries by itself; its `ConflictError` does not run the outer function again."""
    watched, outer_runs, inner_runs = Watched(), [], []
    inner = transactional(propagation="requires_new", retries=1, retry=watched.policy, isolation=trouble.isolation)(
        always(trouble, inner_runs)
    )

    @transactional(retries=5, retry=watched.policy, read_only=True)
    async def outer():
        outer_runs.append(1)
        await inner()

    with UnitOfWorkManager(trouble.engine()).activate(), pytest.raises(errors.ConflictError) as caught:
        await outer()
    assert (len(outer_runs), len(inner_runs), caught.value.attempts) == (1, 2, 2)


def test_the_delay_is_full_jitter_clamped_before_the_jitter():
    """R5, T8: every wait, the first included, is uniform from 0 to the clamped bound."""
    watched = Watched(base=0.01, cap=0.1)
    assert [watched.policy.delay(retry) for retry in range(6)] == [0.01, 0.02, 0.04, 0.08, 0.1, 0.1]
    assert watched.asked == [(0.0, bound) for bound in (0.01, 0.02, 0.04, 0.08, 0.1, 0.1)]
    assert watched.policy.delay(5000) == 0.1


def test_late_waits_are_spread_over_the_whole_range():
    """R5, T8: of 400 waits at the cap a quarter falls into each quarter; clamped after the jitter, none would."""
    waits = [RetryPolicy(base=0.01, cap=1).delay(10) for _ in range(400)]
    assert min(waits) >= 0
    assert max(waits) <= 1
    assert all(sum(low <= wait < low + 0.25 for wait in waits) > 50 for low in (0, 0.25, 0.5, 0.75))


def test_the_defaults_wait_for_milliseconds_and_retry_nothing():
    """R5, T50: a first wait of at most 10 ms; retries are asked for, by the manager or the function."""
    assert RetryPolicy().base == 0.01
    assert RetryPolicy().cap == 1.0


async def test_no_wait_holds_a_connection(trouble):
    """R5: while it waits, the pool has everything back and the server knows of no transaction."""
    engine = trouble.engine(pool_size=1, max_overflow=0)
    held = []

    async def look():
        held.append((engine.pool.checkedout(), current_unit_or_none()))

    def current_unit_or_none():
        try:
            return current_unit()
        except errors.NoUnitError:
            return None

    watched = Watched(on_sleep=look)
    work = transactional(retries=2, retry=watched.policy, isolation=trouble.isolation)(always(trouble, []))
    with UnitOfWorkManager(engine).activate(), pytest.raises(errors.ConflictError):
        await work()
    assert held == [(0, None)] * 2


async def test_no_wait_crosses_the_deadline(trouble):
    """R5, R6: it raises `TransactionTimeoutError` at once instead, from the conflict; the message says both."""
    watched, seen = Watched(base=2.0, cap=16.0), []
    work = transactional(retries=9, timeout=10, retry=watched.policy, isolation=trouble.isolation)(
        always(trouble, seen)
    )
    with UnitOfWorkManager(trouble.engine()).activate(), pytest.raises(errors.TransactionTimeoutError) as caught:
        await work()
    assert watched.waits == [2, 4]
    assert (caught.value.attempts, caught.value.elapsed, caught.value.timeout, len(seen)) == (3, 6, 10, 3)
    assert str(caught.value) == (
        f"body() did not finish within 10 s: {trouble.reason} {trouble.code}, and the next wait would cross the deadline in "
        "attempt 3; raise the timeout, or shorten the transaction"
    )
    assert isinstance(caught.value.__cause__, DBAPIError)


async def test_the_deadline_also_ends_what_is_no_sql(db):
    """R6: a body that sleeps is cancelled, rolled back, and answered with `TransactionTimeoutError`."""
    seen = []

    @transactional(timeout=0.1, retries=3)
    async def work():
        seen.append(current_unit())
        current_session().add(Note(text="late"))
        await current_session().flush()
        await asyncio.sleep(30)

    with UnitOfWorkManager(db.engine()).activate(), pytest.raises(errors.TransactionTimeoutError) as caught:
        await work()
    assert [unit.status for unit in seen] == [Status.ROLLED_BACK]
    assert caught.value.elapsed >= 0.1
    assert caught.value.elapsed < 5
    assert isinstance(caught.value, TimeoutError)
    assert asyncio.current_task().cancelling() == 0
    assert await db.rows("SELECT * FROM note") == []


@pytest.mark.drivers("asyncpg", "psycopg", "asyncmy", "aiomysql")
async def test_the_deadline_ends_a_query_on_the_server_too(db):
    """R6: what is left of it is given to the server; nothing of ours runs on, and the pool's connection is sound."""
    engine = db.engine(pool_size=1, max_overflow=0)
    manager = UnitOfWorkManager(engine, timeout=0.3, retries=3)
    sleep = text("SELECT pg_sleep(30)" if db.family == "postgresql" else "SELECT sleep(30)")
    with pytest.raises(errors.TransactionTimeoutError):
        async with manager.begin() as unit:
            await unit.session.execute(sleep)
    assert [state for _pid, state in await db.sessions() if state in ("active", "RUNNING")] == []
    async with manager.begin() as unit:
        assert await unit.session.scalar(text("SELECT 1")) == 1


async def test_the_deadline_counts_all_attempts_together(trouble):
    """R6: an attempt begins with what the earlier ones and their waits have left."""
    left = []
    watched = Watched(base=2.0, cap=2.0)

    @transactional(retries=2, timeout=10, retry=watched.policy, isolation=trouble.isolation)
    async def work():
        await trouble.settle()
        left.append(current_unit()._transaction.deadline - watched.now)
        if len(left) < 3:
            await trouble.strike(current_session())

    with UnitOfWorkManager(trouble.engine()).activate():
        await work()
    assert left == [10, 8, 6]


async def test_a_cancelled_wait_is_cancelled(trouble):
    """R5: a cancellation between two attempts goes on at once; there is no unit to roll back."""
    waiting = asyncio.Event()

    async def wait_for_ever(_seconds):
        waiting.set()
        await asyncio.Event().wait()

    seen = []
    policy = RetryPolicy(sleep=wait_for_ever)
    work = transactional(retries=2, retry=policy, isolation=trouble.isolation)(always(trouble, seen))
    with UnitOfWorkManager(trouble.engine()).activate():
        task = asyncio.create_task(work())
        await waiting.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert [unit.status for unit in seen] == [Status.ROLLED_BACK]


async def test_what_is_logged(trouble, caplog):
    """R7: INFO for each retry with attempt, reason and wait; WARNING once; nothing else, and no SQL in it."""
    caplog.set_level(logging.INFO, "sqla_uow")
    watched = Watched()
    work = transactional(retries=2, retry=watched.policy, isolation=trouble.isolation)(always(trouble, []))
    with UnitOfWorkManager(trouble.engine()).activate(), pytest.raises(errors.ConflictError):
        await work()
    why = f"{trouble.reason} {trouble.code}"
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        (
            "INFO",
            f"always.<locals>.body(): attempt 1 of 3 failed ({why}); again in 1000.0 ms".partition("<locals>.")[2],
        ),
        ("INFO", f"body(): attempt 2 of 3 failed ({why}); again in 2000.0 ms"),
        ("WARNING", f"body(): gave up after 3 attempts and 3.000 s ({why})"),
    ]


async def test_the_functions_options_win_over_the_managers(trouble):
    """R7: retries, timeout and policy; None leaves the choice to the manager."""
    mine, theirs, seen = Watched(), Watched(), []
    manager = UnitOfWorkManager(trouble.engine(), retries=2, retry=theirs.policy, isolation=trouble.isolation)
    body = always(trouble, seen)
    with manager.activate():
        for options, runs in (({}, 3), ({"retries": 0}, 1), ({"retries": 1, "retry": mine.policy}, 2)):
            seen.clear()
            with pytest.raises(errors.ConflictError):
                await transactional(**options)(body)()
            assert len(seen) == runs
    assert (len(theirs.waits), len(mine.waits)) == (2, 1)


async def test_a_joined_calls_retries_are_ignored_and_said_so(db, caplog):
    """R7: at DEBUG, naming both."""
    caplog.set_level(logging.DEBUG, "sqla_uow")

    @transactional(retries=3)
    async def inner():
        return current_unit()

    @transactional
    async def outer():
        assert await inner() is current_unit()

    with UnitOfWorkManager(db.engine()).activate():
        await outer()
    assert [(record.levelname, record.getMessage()) for record in caplog.records if record.name == "sqla_uow"] == [
        ("DEBUG", "inner() joins outer(), which alone retries")
    ]


async def test_the_message_of_a_conflict_error(trouble):
    """A fact with values, a remedy; one line, and nothing of the SQL."""
    watched = Watched()
    work = transactional(retry=watched.policy, isolation=trouble.isolation)(always(trouble, []))
    with UnitOfWorkManager(trouble.engine()).activate():
        with pytest.raises(errors.ConflictError) as once:
            await work()
        with pytest.raises(errors.ConflictError) as twice:
            await transactional(retries=1, retry=watched.policy, isolation=trouble.isolation)(work.__wrapped__)()
    why = f"last by {trouble.reason} {trouble.code}"
    assert str(once.value) == f"body() failed in its only attempt within 0.000 s, {why}; give it retries"
    assert str(twice.value) == (
        f"body() failed in each of 2 attempts within 1.000 s, {why}; call it again later, or shorten the transaction"
    )
    assert await trouble.db.rows("SELECT text FROM note") == []


@pytest.mark.parametrize(("base", "cap"), [(-1, 1), (2, 1), (0, float("inf")), (float("nan"), 1), ("1", 1)])
def test_a_policy_that_cannot_wait_is_refused(base, cap):
    """Bounds must be seconds, the base not above the cap."""
    with pytest.raises(
        ValueError, match=r"^RetryPolicy\(base=.*, cap=.*\) cannot wait; use seconds with 0 <= base <= cap$"
    ):
        RetryPolicy(base=base, cap=cap)


def test_a_policy_of_unknown_contention_is_refused():
    """With what is known."""
    with pytest.raises(ValueError, match=r"^RetryPolicy\(contention='on'\) is unknown; use 'auto' .* or 'off'$"):
        RetryPolicy(contention="on")


async def test_an_oserror_of_the_users_code_is_no_lost_connection(db):
    """R2: only what the connection reported counts; a column type that asks a service is not it."""

    class Sealed(TypeDecorator):
        impl = String
        cache_ok = True

        def process_bind_param(self, value, dialect):
            raise ConnectionRefusedError(value)

    runs = []

    @transactional(retries=2)
    async def seal():
        runs.append(current_session())
        await runs[-1].execute(text("SELECT 1"))
        await runs[-1].scalar(select(literal("sealing", Sealed)))

    with UnitOfWorkManager(db.engine()).activate(), pytest.raises(StatementError, match="sealing"):
        await seal()
    assert len(runs) == 1
