"""A slow call in an open unit is told to the observers that want to know."""

from __future__ import annotations

import asyncio

import pytest
from sqlalchemy import text

from sqla_uow import RetryPolicy, Status, UnitOfWorkManager, current_session, transactional
from sqla_uow.events import IdleEvent, Observer
from tests.kit.models import Account


class Clock:
    """Goes on only when it is told to, so that nothing depends on how quick the machine is."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class Slow(Observer):
    def __init__(self, seconds=None):
        self.events = []
        if seconds is not None:
            self.idle_seconds = seconds

    def on_idle(self, event):
        self.events.append(event)

    @property
    def told(self):
        return [(event.function, event.attempt, event.idle) for event in self.events]


def manager_of(db, clock, *observers, **options):
    """Return a manager with this clock."""
    return UnitOfWorkManager(db.engine(), retry=RetryPolicy(clock=clock, base=0.001), observers=observers, **options)


async def test_between_statements_and_before_the_end(db):
    """From the answer to one statement until the next is sent, or the body ends; each with what was between."""
    clock, slow = Clock(), Slow()

    @transactional
    async def work(late):
        clock.now += 60  # no connection yet: nobody waits for it
        await current_session().scalar(text("SELECT 1"))
        clock.now += 0.9
        await current_session().scalar(text("SELECT 1"))
        clock.now += 1.5
        current_session().add(Account(id=late))
        await current_session().flush()
        clock.now += late

    with manager_of(db, clock, slow).activate():
        await work(3)
        await work(0)
    assert slow.told == [("work()", 1, 1.5), ("work()", 1, 3), ("work()", 1, 1.5)]
    assert all(type(event) is IdleEvent and event.status is Status.ACTIVE for event in slow.events)


async def test_who_fails_after_a_slow_call(db):
    """It is told as well, also where the unit is cancelled in it."""
    clock, slow = Clock(), Slow()
    manager = manager_of(db, clock, slow)
    with pytest.raises(ValueError, match="of the body"):
        async with manager.begin() as unit:
            await unit.session.scalar(text("SELECT 1"))
            clock.now += 2
            raise ValueError("of the body")

    async def cancelled():
        async with manager.begin() as unit:
            await unit.session.scalar(text("SELECT 1"))
            clock.now += 4
            await asyncio.Event().wait()

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await cancelled()
    assert slow.told == [("begin()", 1, 2), ("begin()", 1, 4)]


async def test_each_observer_has_its_own_patience(db):
    """And one that fails changes nothing for the others."""

    class Failing(Slow):
        def on_idle(self, event):
            raise RuntimeError("of the observer")

    clock, quick, patient = Clock(), Slow(0.01), Slow(5.0)
    async with manager_of(db, clock, Failing(0.001), quick, patient).begin() as unit:
        await unit.session.scalar(text("SELECT 1"))
        clock.now += 1
    assert (quick.told, patient.told) == ([("begin()", 1, 1)], [])
    assert unit.status is Status.COMMITTED


async def test_in_a_scope_and_in_a_later_attempt(db):
    """An observer of the scope is told, and the run that was slow is named."""
    clock, slow, runs = Clock(), Slow(), []

    def again(error):
        return isinstance(error, ValueError)

    @transactional(retries=1, retry_on=again)
    async def work():
        runs.append(1)
        await current_session().scalar(text("SELECT 1"))
        if len(runs) == 1:
            raise ValueError("once")
        clock.now += 1

    manager = manager_of(db, clock)
    async with manager.scope(observers=[slow]):
        await work()
        await current_session().scalar(text("SELECT 1"))
        clock.now += 60  # a read session is no call
    assert slow.told == [("work()", 2, 1)]


@pytest.mark.drivers("sqlite")
async def test_nobody_looks_at_the_clock_for_others(db):
    """An observer without `on_idle` costs no reading of the clock for each statement."""

    class Counting(Clock):
        readings = 0

        def __call__(self):
            self.readings += 1
            return self.now

    async def readings(observer, statements):
        clock = Counting()
        async with manager_of(db, clock, observer).begin() as unit:
            for _ in range(statements):
                await unit.session.scalar(text("SELECT 1"))
        return clock.readings

    assert await readings(Observer(), 50) == await readings(Observer(), 1)
    assert await readings(Slow(), 50) > await readings(Slow(), 1)
