"""`capture_after_commit`, `count_queries` and its assertions, `assert_no_leaks`."""

from __future__ import annotations

import asyncio
import re

import pytest
from sqlalchemy import insert, select, text

from sqla_uow import UnitOfWorkManager, after_commit, current_session, current_unit, transactional
from sqla_uow.testing import (
    assert_max_num_queries,
    assert_no_leaks,
    assert_num_queries,
    capture_after_commit,
    count_queries,
    rolled_back,
)
from tests.kit.models import Account, Note


@pytest.fixture
async def manager(db):
    """Provide an activated manager."""
    manager = UnitOfWorkManager(db.engine())
    async with manager.begin() as unit:
        await unit.session.connection()  # the dialect asks its own questions with its first connection
    with manager.activate():
        yield manager


# -- hooks


async def later(*args, **kwargs):
    """Note that it ran."""
    RAN.append((args, kwargs))


RAN = []


@pytest.fixture(autouse=True)
def none_ran():
    """Begin with none."""
    RAN.clear()


@transactional(retries=2, retry_on=lambda error: isinstance(error, KeyError))
async def work(*, fail_first=False):
    """Register two hooks, and one in each savepoint."""
    unit = current_unit()
    after_commit(later, unit.attempt, by="name")
    await current_session().execute(select(Note))
    async with current_session().begin_nested() as savepoint:
        after_commit(later, "rolled back")
        await savepoint.rollback()
    if fail_first and unit.attempt == 1:
        raise KeyError
    after_commit(RAN.append, "sync")


async def test_hooks_are_held_back_and_can_be_run(manager):
    """The hooks of the attempt that committed, in order, not run; those of a failed attempt or savepoint are dropped."""
    with capture_after_commit() as hooks:
        await work(fail_first=True)
    assert RAN == []
    assert [(hook.function, hook.args, hook.kwargs) for hook in hooks] == [
        (later, (2,), {"by": "name"}),
        (RAN.append, ("sync",), {}),
    ]
    for hook in hooks:
        await hook()
    assert RAN == [((2,), {"by": "name"}), "sync"]


async def test_hooks_are_run_as_well(manager):
    """`execute=True`: seen, and run where they always run."""
    with capture_after_commit(execute=True) as hooks:
        await work()
        assert RAN == [((1,), {"by": "name"}), "sync"]
    assert len(hooks) == 2


async def test_hooks_run_again_after_the_block(manager):
    """Nothing stays behind, also when the block fails."""
    with pytest.raises(ZeroDivisionError), capture_after_commit():
        raise ZeroDivisionError
    await work()
    assert len(RAN) == 2


@pytest.mark.parametrize("execute", [False, True])
@pytest.mark.parametrize("outer", [False, True])
async def test_a_capture_in_a_capture(manager, outer, execute):
    """The innermost takes what is committed in it, and says whether it runs; the one around it has what is before and behind."""
    with capture_after_commit(execute=outer) as around:
        await work()
        with capture_after_commit(execute=execute) as hooks:
            await work()
        assert len(hooks) == 2
        await work()
    assert len(around) == 4
    assert len(RAN) == 4 * outer + 2 * execute


async def test_a_unit_that_rolls_back_has_none(manager):
    """H1: dropped with the unit."""
    with capture_after_commit() as hooks:
        async with manager.begin() as unit:
            unit.after_commit(later)
            unit.doom()
    assert (hooks, RAN) == ([], [])


# -- queries


async def test_queries_are_what_the_program_sends(manager):
    """Its own statements, in order, on every database; what a unit sends for itself is left out."""
    with count_queries(manager) as queries:
        async with manager.begin(isolation="SERIALIZABLE", timeout=30) as unit:
            await unit.session.execute(select(Note.id))
            async with unit.session.begin_nested():
                await unit.session.execute(insert(Note), [{"text": "a"}, {"text": "b"}])
    assert queries.count == 2
    assert [re.search("SELECT|INSERT", statement)[0] for statement in queries.statements] == ["SELECT", "INSERT"]
    assert repr(queries) == "<Queries: 2>"
    async with manager.begin() as unit:
        await unit.session.execute(select(Note.id))
    assert queries.count == 2


async def test_queries_of_an_engine_in_rolled_back(db):
    """Savepoints in place of transactions do not count either; plain connections do."""
    async with rolled_back(db.engine()) as engine:
        with count_queries(engine) as queries:
            async with UnitOfWorkManager(engine).begin() as unit:
                unit.session.add(Account(id=1))
            async with engine.connect() as connection:
                await connection.execute(text("SELECT 1"))
    assert queries.count == 2


async def test_the_number_of_queries_is_asserted(manager):
    """The statements are in the message, without their parameters."""
    with assert_num_queries(manager, 1), assert_max_num_queries(manager, 1):
        async with manager.begin() as unit:
            await unit.session.execute(text("SELECT 1"))
    with pytest.raises(AssertionError) as caught, assert_num_queries(manager, 1):
        async with manager.begin() as unit:
            await unit.session.execute(text("SELECT 1"))
            await unit.session.execute(text("SELECT\n  2"))
    assert str(caught.value) == "2 queries were sent, not 1\n1. SELECT 1\n2. SELECT 2"
    too_many = pytest.raises(AssertionError, match=r"^1 query was sent, more than 0\n")
    with too_many, assert_max_num_queries(manager, 0):
        async with manager.begin() as unit:
            await unit.session.execute(text("SELECT 1"))
    with pytest.raises(AssertionError, match=r"^0 queries were sent, not 1$"), assert_num_queries(manager, 1):
        pass


@pytest.mark.drivers("sqlite")
@pytest.mark.parametrize("number", [-1, 1.5, "1"])
async def test_a_number_of_queries_that_cannot_be(db, number):
    """Refused where it is written; nothing is counted."""
    for check in (assert_num_queries, assert_max_num_queries):
        message = f"^{check.__name__}\\(\\) got {number!r}; use a whole number, from 0$"
        with pytest.raises(ValueError, match=message), check(db.engine(), number):
            pytest.fail("the block is run")


@pytest.mark.drivers("sqlite")
@pytest.mark.parametrize("watch", [count_queries, assert_no_leaks])
def test_what_is_neither_engine_nor_manager(driver, watch):
    """Refused where it is written."""
    with (
        pytest.raises(TypeError, match=r"\(\) got str; pass an AsyncEngine or a UnitOfWorkManager$"),
        watch("sqlite://"),
    ):
        pass


# -- leaks


async def test_units_leak_nothing(manager):
    """Committed, failed and cancelled ones."""
    with assert_no_leaks(manager):
        await work()
        with pytest.raises(ZeroDivisionError):
            async with manager.begin() as unit:
                await unit.session.execute(select(Note))
                raise ZeroDivisionError
        task = asyncio.create_task(work())
        task.cancel()
        await asyncio.wait({task})


async def test_a_connection_that_is_kept_is_found(manager):
    """Who took it, and in which line."""
    with pytest.raises(AssertionError) as caught, assert_no_leaks(manager):
        kept = await manager.engine.connect()
    await kept.close()
    line = rf"{re.escape(__file__)}:\d+"
    task = re.escape(repr(asyncio.current_task().get_name()))
    assert re.fullmatch(
        rf"1 connection was not returned to the pool; taken by task {task} at {line}", str(caught.value)
    )


async def test_a_connection_that_comes_back_in_a_transaction_is_found(db):
    """D3: the next user of the pool would commit what is open on it."""
    engine = db.engine(pool_reset_on_return=None)

    async def poison():
        async with engine.connect() as connection:
            raw = (await connection.get_raw_connection()).driver_connection
            if db.family == "mysql":
                await raw.begin()
            else:
                await raw.execute("BEGIN")

    found = pytest.raises(AssertionError, match=r"^1 connection came back in a transaction; taken by task '.*:\d+$")
    with found, assert_no_leaks(engine):
        await poison()
    with assert_no_leaks(engine):  # sound code after it, on a new connection
        await engine.dispose()
        async with engine.connect() as connection:
            await connection.execute(text("SELECT 1"))
    with assert_no_leaks(engine):  # not what the pool of the last block still tells it
        async with engine.connect() as connection:
            await connection.execute(text("SELECT 1"))


async def test_the_exception_of_the_block_is_not_hidden(manager):
    """D4: it says more than the leak that it caused."""
    with pytest.raises(ZeroDivisionError), assert_no_leaks(manager):
        kept = await manager.engine.connect()
        raise ZeroDivisionError
    await kept.close()


async def test_nothing_leaks_in_rolled_back(db):
    """There the connection is in a transaction whoever returns it."""
    async with rolled_back(db.engine()) as engine:
        with assert_no_leaks(engine), UnitOfWorkManager(engine).activate():
            await work()
