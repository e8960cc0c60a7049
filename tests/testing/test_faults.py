"""`FaultPlan` and `cancel_at`: where a fault strikes, what survives it, and what a plan refuses."""

from __future__ import annotations

import asyncio
import re

import pytest
from sqlalchemy import select, text

from sqla_uow import RetryPolicy, Status, UnitOfWorkManager, current_unit, errors, transactional
from sqla_uow.testing import FaultPlan, assert_no_leaks, cancel_at, rolled_back
from tests.kit.models import Account, Note

AT_ONCE = RetryPolicy(base=0, cap=0)
NETWORK = ("asyncpg", "psycopg", "asyncmy", "aiomysql")
EVERYWHERE = [("conflict", "statement"), ("conflict", "flush"), ("conflict", "commit"), ("lock timeout", "flush")]
ON_SERVERS = [
    ("deadlock", "statement"),
    ("deadlock", "commit"),
    ("lost", "statement"),
    ("lost", "flush"),
    ("refused", "connect"),
]


class Service:
    """A function that adds 1 to an account, and what it does."""

    def __init__(self, manager):
        self.manager = manager
        self.units = []
        self.hooks = []

    async def add_one(self, **options):
        """Run it with retries."""
        options = {"retries": 3, "retry": AT_ONCE} | options
        await transactional(using=self.manager, **options)(self.body)()

    async def body(self):
        unit = current_unit(self.manager)
        self.units.append(unit)
        unit.after_commit(self.hooks.append, len(self.units))
        account = await unit.session.get_one(Account, 1)
        await unit.session.execute(select(Note))
        account.balance += 1

    async def balance(self):
        async with self.manager.begin(read_only=True) as unit:
            return await unit.session.scalar(select(Account.balance))

    @property
    def outcomes(self):
        return [unit.status for unit in self.units]


@pytest.fixture
async def service(db):
    """Provide the service on one account, with units that commit."""
    await db.run("INSERT INTO account (id, balance) VALUES (1, 0)")
    return Service(UnitOfWorkManager(db.engine()))


async def survives(service, fault, at):
    """One retry, one hook, one row more, no connection kept."""
    with assert_no_leaks(service.manager), FaultPlan(service.manager, fault, at=at) as plan:
        await service.add_one()
    assert plan.struck == 1
    assert service.outcomes[-2:] == [Status.ROLLED_BACK, Status.COMMITTED]
    assert service.hooks == [2]
    assert await service.balance() == 1


@pytest.mark.parametrize(("fault", "at"), EVERYWHERE)
async def test_a_unit_survives_a_retry(service, fault, at):
    """What the kit is for: two lines prove that a function survives being run again."""
    await survives(service, fault, at)


@pytest.mark.drivers(*NETWORK)
@pytest.mark.parametrize(("fault", "at"), ON_SERVERS)
async def test_a_unit_survives_a_retry_on_servers(service, fault, at):
    """The same for what SQLite does not have; `refused` also where the pool had a connection."""
    await service.balance()
    await survives(service, fault, at)


@pytest.mark.parametrize(("fault", "at"), EVERYWHERE)
async def test_a_conflict_in_rolled_back(db, service, fault, at):
    """The second attempt's rows are visible in the test, its hooks ran, and after the test there is nothing."""
    async with rolled_back(service.manager) as manager:
        inside = Service(manager)
        await survives(inside, fault, at)
    assert await service.balance() == 0


@pytest.mark.drivers(*NETWORK)
@pytest.mark.parametrize(("fault", "at"), ON_SERVERS)
async def test_a_loss_in_rolled_back(db, service, fault, at):
    """A connection that is lost by the plan is not really lost, so the test's transaction goes on."""
    async with rolled_back(service.manager) as manager:
        inside = Service(manager)
        async with manager.begin() as unit:
            unit.session.add(Note(text="before"))
        await survives(inside, fault, at)
        async with manager.begin() as unit:
            assert list(await unit.session.scalars(select(Note.text))) == ["before"]
    assert await service.balance() == 0


@pytest.mark.drivers(*NETWORK)
@pytest.mark.parametrize("where", ["own", "rolled back"])
@pytest.mark.parametrize("applied", [False, True])
async def test_a_commit_whose_answer_is_lost(db, service, applied, where):
    """C1, C2: never retried; with `verify` settled by what is really there, in `rolled_back` as well."""
    at = "after commit" if applied else "commit"
    async with rolled_back(service.manager) if where == "rolled back" else _as_it_is(service.manager) as manager:
        inside = Service(manager)
        with FaultPlan(manager, "lost", at=at), pytest.raises(errors.AmbiguousCommitError):
            await inside.add_one()
        assert inside.outcomes == [Status.AMBIGUOUS]
        assert await inside.balance() == applied
        verifying = Service(UnitOfWorkManager(manager.engine, ambiguous_commit="verify"))
        with FaultPlan(manager, "lost", at=at):
            await verifying.add_one()
        assert verifying.outcomes == ([Status.COMMITTED] if applied else [Status.ROLLED_BACK, Status.COMMITTED])
        assert await inside.balance() == applied + 1


class _as_it_is:  # noqa: N801  # stands where rolled_back does
    def __init__(self, manager):
        self.manager = manager

    async def __aenter__(self):
        return self.manager

    async def __aexit__(self, *_error):
        return None


async def test_the_nth_statement_of_each_unit(service):
    """`nth` counts in each unit anew, `times` the units that are struck; the third attempt gets through."""
    with FaultPlan(service.manager, "conflict", at="statement", nth=2, times=2) as plan:
        await service.add_one(timeout=20, isolation="SERIALIZABLE")
    assert plan.struck == 2
    assert repr(plan) == "<FaultPlan: conflict at statement number 2, struck 2 of 2>"
    assert service.outcomes == [Status.ROLLED_BACK, Status.ROLLED_BACK, Status.COMMITTED]


async def test_the_nth_flush_of_a_unit(service):
    """A flush is struck in its first statement; what is read between is not counted."""
    seen = []

    @transactional(using=service.manager, retries=1, retry=AT_ONCE)
    async def two_flushes():
        session = current_unit(service.manager).session
        for text_ in ("one", "two"):
            session.add(Note(text=text_))
            await session.execute(select(Account))
            seen.append(text_)

    with FaultPlan(service.manager, "conflict", at="flush", nth=2):
        await two_flushes()
    assert seen == ["one", "one", "two"]


async def test_the_nth_commit_of_the_block(service):
    """At COMMIT and connect `nth` counts the units of the block."""
    with FaultPlan(service.manager, "conflict", at="commit", nth=2):
        await service.add_one()
        await service.add_one()
    assert service.outcomes == [Status.COMMITTED, Status.ROLLED_BACK, Status.COMMITTED]
    assert await service.balance() == 2


async def test_what_outlives_the_retries(service):
    """R7: a conflict each time is `ConflictError`, and nothing is written."""
    with FaultPlan(service.manager, "conflict", at="commit", times=9) as plan, pytest.raises(errors.ConflictError):
        await service.add_one(retries=2)
    assert (plan.struck, await service.balance()) == (3, 0)


async def test_two_plans_at_once(service):
    """Each strikes at its own point, and leaves the engine as it was."""
    manager = service.manager
    with FaultPlan(manager, "conflict", at="flush"), FaultPlan(manager, "conflict", at="commit"):
        await service.add_one()
    assert service.outcomes == [Status.ROLLED_BACK, Status.ROLLED_BACK, Status.COMMITTED]
    await service.add_one(retries=0)
    assert await service.balance() == 2
    assert "do_commit" not in vars(manager.engine.dialect)


async def test_a_pause(service):
    """`latency` strikes wherever it is, and changes nothing but the time: here it crosses a deadline."""
    for at in ("connect", "statement", "flush", "commit", "after commit"):
        with FaultPlan(service.manager, "latency", at=at, seconds=0.001):
            await service.add_one()
    with FaultPlan(service.manager, "latency", at="flush", seconds=5), pytest.raises(errors.TransactionTimeoutError):
        await service.add_one(timeout=0.2)
    assert await service.balance() == 5


@pytest.mark.parametrize("at", ["connect", "statement", "flush", "commit", "after commit"])
async def test_a_cancellation(service, at):
    """C3: the caller is cancelled; before COMMIT nothing is written, from then on the outcome is that of COMMIT."""
    with assert_no_leaks(service.manager), FaultPlan(service.manager, "cancel", at=at) as plan:
        task = asyncio.create_task(service.add_one())
        await asyncio.wait({task})
    assert task.cancelled()
    assert plan.struck == 1
    committed = at in ("commit", "after commit")
    assert service.outcomes == [Status.COMMITTED if committed else Status.ROLLED_BACK]
    assert service.hooks == ([1] if committed else [])
    assert await service.balance() == committed


async def test_only_units_are_struck(service):
    """A plain connection of the engine, and a unit of another engine, go by; so does what a unit sends for itself."""
    with pytest.raises(AssertionError) as caught, FaultPlan(service.manager, "conflict"):
        async with service.manager.engine.begin() as connection:
            await connection.execute(text("SELECT 1"))
        begun = service.manager.begin(timeout=5, isolation="SERIALIZABLE")
        async with begun as unit, unit.session.begin_nested():
            await unit.session.connection()
    assert str(caught.value) == (
        "no unit was struck by conflict at 'statement' number 1; the block has no such point, or none in a unit of this engine"
    )


async def test_a_plan_that_struck_nothing_hides_no_error(service):
    """The exception of the block says more."""
    with pytest.raises(ZeroDivisionError), FaultPlan(service.manager, "conflict"):
        raise ZeroDivisionError


NO_FAULT = (
    "FaultPlan() got 'meteor', which is not a fault; use one of 'conflict', 'deadlock', 'lock timeout', 'lost', "
    "'refused', 'latency', 'cancel'"
)
NOT_THERE = "FaultPlan('conflict') got at='after commit'; use 'statement' or 'flush' or 'commit'"
NOT_ON_SQLITE = "FaultPlan('lost') was asked of SQLite, which has none; use 'conflict' or 'lock timeout'"


@pytest.mark.drivers("sqlite")
@pytest.mark.parametrize(
    ("fault", "options", "message"),
    [
        ("meteor", {}, NO_FAULT),
        ("refused", {"at": "flush"}, "FaultPlan('refused') got at='flush'; use 'connect'"),
        ("conflict", {"at": "after commit"}, NOT_THERE),
        ("conflict", {"nth": 0}, "FaultPlan() got nth=0, times=1; use whole numbers, from 1"),
        ("conflict", {"times": 1.5}, "FaultPlan() got nth=1, times=1.5; use whole numbers, from 1"),
        ("latency", {"seconds": -1}, "FaultPlan() got seconds=-1; use a number from 0"),
        ("latency", {"seconds": float("nan")}, "FaultPlan() got seconds=nan; use a number from 0"),
        ("latency", {"seconds": "1"}, "FaultPlan() got seconds='1'; use a number from 0"),
        ("lost", {}, NOT_ON_SQLITE),
    ],
)
async def test_what_cannot_be(db, fault, options, message):
    """Refused where it is written, with what could be."""
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        FaultPlan(db.engine(), fault, **options)


@pytest.mark.drivers("sqlite")
async def test_a_plan_is_used_once(service):
    """Its counts would go on."""
    with FaultPlan(service.manager, "conflict") as plan:
        await service.add_one()
        with pytest.raises(RuntimeError, match=r"^a FaultPlan was entered twice; a plan is used once, make a new one$"):
            plan.__enter__()


# -- cancel_at


async def test_cancelled_at_each_await_in_turn(service):
    """C3: whatever the await, what is in the database is what the unit's status says, once at most, and nothing leaks."""
    nth, committed = 1, 0
    with assert_no_leaks(service.manager):
        while await cancel_at(nth, service.add_one()):
            nth += 1
            committed = service.outcomes.count(Status.COMMITTED)
            assert service.outcomes[-1] in (Status.COMMITTED, Status.ROLLED_BACK)
            assert await service.balance() == committed == len(service.hooks)
    assert nth > 3
    assert await service.balance() == service.outcomes.count(Status.COMMITTED) >= committed + 1


@pytest.mark.drivers("sqlite")
async def test_what_cancel_at_hands_on(driver):
    """An error of the call is raised; a call that ends before is not cancelled; counting begins at 1."""

    async def fails():
        await asyncio.sleep(0)
        raise ZeroDivisionError

    async def ends():
        await asyncio.sleep(0)

    with pytest.raises(ZeroDivisionError):
        await cancel_at(2, fails())
    assert await cancel_at(1, ends())
    assert not await cancel_at(2, ends())
    with pytest.raises(ValueError, match=r"^cancel_at\(\) got 0; use a whole number, from 1$"):
        await cancel_at(0, ends())
    with pytest.raises(TypeError, match=r"^cancel_at\(\) got <function .*>; call an async function there, cancel_at\("):
        await cancel_at(1, ends)
