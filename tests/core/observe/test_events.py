"""What observers are told, and that nothing they do changes a transaction."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import dataclasses
import logging

import pytest
from sqlalchemy import text

from sqla_uow import RetryPolicy, Status, UnitOfWorkManager, current_session, current_unit, errors, transactional
from sqla_uow.events import AttemptEvent, Observer, OutcomeEvent, RetryEvent
from sqla_uow.testing import FaultPlan
from tests.kit.models import Note
from tests.kit.queueing import a_turn_that_does_not_come

SYSTEMS = {"postgresql": "postgresql", "mysql": "mariadb", "sqlite": "sqlite"}
SELECT = text("SELECT 1")


class Recorder(Observer):
    """Keeps the events."""

    def __init__(self):
        self.events = []

    def on_attempt(self, event):
        self.events.append(event)

    def on_retry(self, event):
        self.events.append(event)

    def on_outcome(self, event):
        self.events.append(event)

    @property
    def kinds(self):
        return [type(event) for event in self.events]

    @property
    def last(self):
        return self.events[-1]


@pytest.fixture
def recorder():
    """An observer that keeps what it is told."""
    return Recorder()


async def notes(db):
    """Return how many notes are committed."""
    return await db.scalar("SELECT count(*) FROM note")


async def test_a_conflict_is_told_with_reason_and_code(db, trouble, recorder):
    """A run, its conflict, a second run and the outcome: one call, the same facts on each event."""
    manager = UnitOfWorkManager(trouble.engine(), name="bank", observers=[recorder])
    caught = []

    @transactional(using=manager, retries=3, isolation=trouble.isolation, retry=RetryPolicy(rng=lambda _, high: high))
    async def write():
        await trouble.settle()
        if not caught:
            caught.append(current_unit(manager))
            await trouble.strike(current_session(manager))
        await trouble.write(current_session(manager))

    await write()
    first, retry, second, outcome = recorder.events
    assert recorder.kinds == [AttemptEvent, RetryEvent, AttemptEvent, OutcomeEvent]
    for event in recorder.events:
        assert event.call is first.call
        assert event.function == "test_a_conflict_is_told_with_reason_and_code.<locals>.write()".rpartition(".")[2]
        assert (event.manager, event.namespace) == ("bank", manager.engine.url.database)
        assert (event.retries, event.isolation, event.read_only) == (3, trouble.isolation, False)
    assert first.system in {SYSTEMS[db.family], db.family}  # it is asked of the first connection
    assert [event.system for event in recorder.events[1:]] == [SYSTEMS[db.family]] * 3
    assert [event.attempt for event in recorder.events] == [1, 1, 2, 2]
    assert [event.status for event in recorder.events] == [
        Status.NEW, Status.ROLLED_BACK, Status.NEW, Status.COMMITTED,
    ]  # fmt: skip
    assert (retry.reason, retry.code, retry.wait) == (trouble.reason, trouble.code, 0.01)
    assert issubclass(retry.error, Exception)
    assert (retry.commit_at, retry.commit_seconds) == (None, None)
    assert (outcome.error, outcome.gave_up, outcome.doomed, outcome.reason, outcome.code) == (
        None, False, False, None, None,
    )  # fmt: skip
    assert 0 <= first.elapsed <= retry.elapsed < second.elapsed <= outcome.commit_at
    assert outcome.commit_at + outcome.commit_seconds <= outcome.elapsed
    assert outcome.connection_seconds > 0
    assert await notes(db) == 1


async def test_a_call_that_gives_up_says_so(db, trouble, recorder):
    """No event of a retry that does not come; the outcome has the last failure's reason and code."""
    manager = UnitOfWorkManager(trouble.engine(), observers=[recorder])

    @transactional(using=manager, retries=1, isolation=trouble.isolation)
    async def write():
        await trouble.settle()
        await trouble.strike(current_session(manager))

    with pytest.raises(errors.ConflictError):
        await write()
    assert recorder.kinds == [AttemptEvent, RetryEvent, AttemptEvent, OutcomeEvent]
    outcome = recorder.last
    assert (outcome.status, outcome.gave_up, outcome.doomed, outcome.attempt) == (Status.ROLLED_BACK, True, False, 2)
    assert (outcome.reason, outcome.code) == (trouble.reason, trouble.code)
    assert outcome.error is errors.ConflictError
    assert await notes(db) == 0


@pytest.mark.drivers("asyncpg", "psycopg", "asyncmy", "aiomysql")
@pytest.mark.parametrize("applied", [False, True], ids=["before", "after"])
async def test_an_unknown_commit_is_told(db, recorder, applied, wire):
    """The status, the class of the error, and the time in a COMMIT that was cut off."""
    manager = UnitOfWorkManager(wire.engine, observers=[recorder])
    lost = wire.on_commit("cut", applied=applied)
    with pytest.raises(errors.AmbiguousCommitError):
        async with manager.begin() as unit:
            await unit.session.execute(text("UPDATE account SET balance = balance + 1"))
    assert lost.fired
    outcome = recorder.last
    assert recorder.kinds == [AttemptEvent, OutcomeEvent]
    assert (outcome.function, outcome.status) == ("begin()", Status.AMBIGUOUS)
    assert (outcome.error, outcome.gave_up) == (errors.AmbiguousCommitError, False)
    assert outcome.commit_seconds > 0
    assert await wire.balance() == applied


@pytest.mark.drivers("asyncpg", "psycopg", "asyncmy", "aiomysql")
async def test_a_commit_that_is_held_back_has_its_time(db, recorder, wire, monkeypatch):
    """Given up at the deadline: the time is what was waited."""
    monkeypatch.setattr("sqla_uow._unit.commit.COMMIT_SECONDS", 0.2)
    monkeypatch.setattr("sqla_uow._unit.ending.IDLE_SECONDS", 0.2)
    manager = UnitOfWorkManager(wire.engine, observers=[recorder])
    held = wire.on_commit("hold", applied=False)
    with pytest.raises(errors.AmbiguousCommitError):
        async with manager.begin(timeout=0.5) as unit:
            await unit.session.execute(text("UPDATE account SET balance = balance + 1"))
    held.release()
    outcome = recorder.last
    assert (outcome.status, outcome.error) == (Status.AMBIGUOUS, errors.AmbiguousCommitError)
    assert 0.2 < outcome.commit_seconds <= outcome.elapsed - outcome.commit_at
    await wire.until_left()


async def test_a_conflict_at_commit_has_its_time(db, recorder):
    """A run whose COMMIT was refused tells what that took, and the wait has not begun."""
    manager = UnitOfWorkManager(db.engine(), retries=1, observers=[recorder])

    @transactional(using=manager)
    async def write():
        current_session(manager).add(Note(text="written"))

    with FaultPlan(manager, "conflict", at="commit"):
        await write()
    retry = recorder.events[1]
    assert retry.commit_at + retry.commit_seconds <= retry.elapsed
    assert await notes(db) == 1


async def test_a_doomed_unit_is_told(db, recorder):
    """Its own wish and a swallowed failure alike: the body came to its end, and nothing is written."""
    manager = UnitOfWorkManager(db.engine(), observers=[recorder])
    async with manager.begin() as unit:
        unit.session.add(Note(text="written"))
        unit.doom()
    assert (recorder.last.status, recorder.last.doomed, recorder.last.error) == (Status.ROLLED_BACK, True, None)
    with pytest.raises(errors.RollbackOnlyError):
        async with manager.begin() as unit:
            with contextlib.suppress(Exception):
                await unit.session.execute(text("SELECT nothing FROM nowhere"))
    assert (recorder.last.doomed, recorder.last.error) == (True, errors.RollbackOnlyError)
    with pytest.raises(ZeroDivisionError):
        async with manager.begin() as unit:
            unit.session.add(Note(text="written"))
            raise ZeroDivisionError
    assert (recorder.last.status, recorder.last.doomed, recorder.last.error) == (
        Status.ROLLED_BACK, False, ZeroDivisionError,
    )  # fmt: skip
    assert await notes(db) == 0


async def test_cancellations_in_the_body_and_in_the_wait_have_an_outcome(db, trouble, recorder):
    """Cancelled while it runs, and while it waits to be run again: rolled back, no success is told."""
    manager = UnitOfWorkManager(trouble.engine(), observers=[recorder])
    inside = asyncio.Event()

    @transactional(using=manager)
    async def body():
        current_session(manager).add(Note(text="written"))
        inside.set()
        await asyncio.Event().wait()

    async def sleep(_seconds):
        inside.set()
        await asyncio.Event().wait()

    @transactional(using=manager, retries=1, isolation=trouble.isolation, retry=RetryPolicy(sleep=sleep))
    async def wait():
        await trouble.settle()
        await trouble.strike(current_session(manager))

    for function in (body, wait):
        inside.clear()
        task = asyncio.create_task(function())
        await inside.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (recorder.last.status, recorder.last.error) == (Status.ROLLED_BACK, asyncio.CancelledError)
    assert recorder.kinds == [AttemptEvent, OutcomeEvent, AttemptEvent, RetryEvent, OutcomeEvent]
    assert manager.statistics().open == 0
    assert await notes(db) == 0


async def test_a_turn_that_does_not_come_has_an_outcome(db, recorder):
    """The deadline passes in the queue: no run begins, and the call has ended all the same."""
    manager = UnitOfWorkManager(db.engine(), observers=[recorder])
    async with a_turn_that_does_not_come(manager):
        assert recorder.kinds == [AttemptEvent, AttemptEvent, OutcomeEvent]
        assert (recorder.last.status, recorder.last.error) == (Status.ROLLED_BACK, errors.TransactionTimeoutError)
        seen = manager.statistics()
        assert (seen.open, seen.timed_out, seen.begun) == (2, 1, 3)
    assert manager.statistics().open == 0


async def test_calls_that_join_and_savepoints_are_part_of_the_unit(db, recorder):
    """One attempt and one outcome for the outermost; another pair for what begins a unit of its own."""
    manager = UnitOfWorkManager(db.engine(), observers=[recorder])

    @transactional(using=manager)
    async def joins():
        current_session(manager).add(Note(text="written"))

    @transactional(using=manager, propagation="nested")
    async def nested():
        await joins()

    @transactional(using=manager)
    async def outer():
        await joins()
        await nested()

    await outer()
    assert [event.function.rpartition(".")[2] for event in recorder.events] == ["outer()"] * 2

    @transactional(using=manager, propagation="requires_new", read_only=True)
    async def beside():
        await current_session(manager).execute(SELECT)

    @transactional(using=manager, read_only=True)
    async def around():
        await beside()

    await around()
    assert [event.function.rpartition(".")[2] for event in recorder.events[2:]] == [
        "around()", "beside()", "beside()", "around()",
    ]  # fmt: skip
    assert await notes(db) == 2


async def test_blocks_and_loops_are_calls(db, recorder):
    """`begin()` and `attempts()` tell as functions do; a read session is no call."""
    manager = UnitOfWorkManager(db.engine(), observers=[recorder])
    async with manager.begin(read_only=True) as unit:
        await unit.session.execute(SELECT)
    async for attempt in manager.attempts(retries=2):
        async with attempt as unit:
            unit.session.add(Note(text="written"))
    async with manager.scope():
        await current_session(manager).execute(SELECT)
    assert [event.function for event in recorder.events] == ["begin()"] * 2 + ["attempts()"] * 2
    assert [event.read_only for event in recorder.events] == [True] * 2 + [False] * 2
    assert await notes(db) == 1


async def test_observers_of_a_scope_are_told_of_the_calls_in_it(db, recorder):
    """After those of the manager, and of nothing outside."""
    other = Recorder()
    manager = UnitOfWorkManager(db.engine(), observers=[recorder])
    async with manager.begin():
        pass
    async with manager.scope(observers=[other]), manager.begin() as unit:
        unit.session.add(Note(text="written"))
    assert recorder.events[2:] == other.events
    assert other.kinds == [AttemptEvent, OutcomeEvent]
    assert await notes(db) == 1


class Raising(Observer):
    """Raises what it was given, wherever it is called."""

    def __init__(self, error, method):
        self.error = error
        self.method = method

    def _raise(self, method):
        if method == self.method:
            raise self.error

    def on_attempt(self, event):
        self._raise("on_attempt")

    def on_retry(self, event):
        self._raise("on_retry")

    def on_outcome(self, event):
        self._raise("on_outcome")


METHODS = ("on_attempt", "on_retry", "on_outcome")


@pytest.mark.parametrize(
    "raising",
    [Raising(error, method) for error in (ZeroDivisionError("oh"), asyncio.CancelledError()) for method in METHODS],
    ids=lambda raising: f"{raising.method}-{type(raising.error).__name__}",
)
async def test_an_observer_that_raises_changes_nothing(db, trouble, recorder, caplog, raising):
    """The work is committed after a retry, the others are told, and the log has a traceback."""
    manager = UnitOfWorkManager(trouble.engine(), observers=[raising, recorder])
    struck = []

    @transactional(using=manager, retries=1, isolation=trouble.isolation)
    async def write():
        await trouble.settle()
        if not struck:
            struck.append(1)
            await trouble.strike(current_session(manager))
        await trouble.write(current_session(manager))

    await write()
    assert recorder.kinds == [AttemptEvent, RetryEvent, AttemptEvent, OutcomeEvent]
    found = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert {record.getMessage() for record in found} == {
        f"an observer of manager 'default' failed in {raising.method}; the transaction is not changed by it"
    }
    assert found[0].exc_info[1] is raising.error
    assert await notes(db) == 1


@pytest.mark.parametrize("method", METHODS)
async def test_what_ends_the_program_goes_on_and_leaves_nothing_behind(db, trouble, method):
    """Ctrl-C in an observer: the transaction is as it was, no connection is held, nothing is counted as open."""
    manager = UnitOfWorkManager(trouble.engine(), observers=[Raising(KeyboardInterrupt(), method)])
    struck = []

    async def write():
        async for attempt in manager.attempts(retries=1, isolation=trouble.isolation):
            async with attempt as unit:
                await trouble.settle()
                if not struck:
                    struck.append(1)
                    await trouble.strike(unit.session)
                await trouble.write(unit.session)

    with pytest.raises(KeyboardInterrupt):
        await write()
    assert manager.engine.pool.checkedout() == 0
    assert manager.statistics().open == 0
    assert await notes(db) == (1 if method == "on_outcome" else 0)


async def test_a_context_variable_set_by_an_observer_is_seen_in_the_body(db):
    """`on_attempt` is called in the body's own context."""
    number = contextvars.ContextVar("number", default=0)

    class Numbering(Observer):
        def on_attempt(self, event):
            number.set(event.attempt)

    manager = UnitOfWorkManager(db.engine(), observers=[Numbering()])
    async with manager.begin():
        assert number.get() == 1


@pytest.mark.drivers("sqlite")
async def test_an_event_cannot_be_changed(db, recorder):
    """Frozen and slotted: one observer cannot tell another something else."""
    async with UnitOfWorkManager(db.engine(), observers=[recorder]).begin():
        pass
    for event in recorder.events:
        with pytest.raises(dataclasses.FrozenInstanceError):
            event.attempt = 7
        assert not hasattr(event, "__dict__")


@pytest.mark.drivers("sqlite")
async def test_what_is_no_observer_is_refused(db):
    """At construction, with what is one."""
    with pytest.raises(TypeError) as caught:
        UnitOfWorkManager(db.engine(), observers=7)
    assert str(caught.value) == "UnitOfWorkManager 'default' has observers=7; pass a sequence of them"
    with pytest.raises(TypeError) as caught:
        UnitOfWorkManager(db.engine(), observers=[Recorder])
    assert str(caught.value) == (
        f"UnitOfWorkManager 'default' has the observer {Recorder!r}; pass an object of a subclass of sqla_uow.events.Observer"
    )
    with pytest.raises(TypeError) as caught:
        UnitOfWorkManager(db.engine()).scope(observers=[None])
    assert str(caught.value) == (
        "scope() has the observer None; pass an object of a subclass of sqla_uow.events.Observer"
    )


@pytest.mark.drivers("sqlite")
async def test_an_observer_may_leave_out_what_it_does_not_want_to_know(db):
    """The methods of the base do nothing."""
    manager = UnitOfWorkManager(db.engine(), observers=[Observer()])
    async for attempt in manager.attempts(retries=1):
        async with attempt as unit:
            unit.session.add(Note(text="written"))
    Observer().on_retry(None)
    assert await notes(db) == 1
