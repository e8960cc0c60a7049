"""Units of their own inside another's task or context, begun and ended in any order: the one around is found again."""

from __future__ import annotations

import asyncio
import gc

import pytest
from sqlalchemy import text

from sqla_uow import Status, UnitOfWorkManager, current_session, current_unit, errors
from sqla_uow._tasks.frames import Frame
from tests.kit.models import Note


@pytest.fixture
def manager(db):
    """An activated manager."""
    manager = UnitOfWorkManager(db.engine())
    with manager.activate():
        yield manager


async def test_a_child_that_had_a_unit_of_its_own(db, manager):
    """It is a child all the same, and may go on in its parent's unit, inside its own one and after it."""

    async def write(parents):
        async with manager.begin(read_only=True, propagation="requires_new") as own:
            await own.session.execute(text("SELECT 1"))
            parents.session.add(Note(text="inside"))
            await parents.session.execute(text("SELECT 1"))
        current_unit().session.add(Note(text="after"))

    async with manager.begin() as unit:
        await unit.session.execute(text("SELECT 1"))
        await asyncio.create_task(write(unit))
    assert unit.status is Status.COMMITTED
    assert sorted(await db.rows("SELECT text FROM note")) == [("after",), ("inside",)]


async def test_units_that_end_in_the_order_they_began(manager):
    """The first ends below the second, and is not in the way of the one around both."""

    async def own():
        async with manager.begin(read_only=True, propagation="requires_new") as unit:
            yield unit

    async with manager.begin() as around:
        first, second = own(), own()
        await anext(first)
        inner = await anext(second)
        await first.aclose()
        assert current_unit() is inner
        await second.aclose()
        assert current_unit() is around


@pytest.mark.parametrize("crosswise", [False, True])
async def test_a_child_whose_own_units_have_ended(manager, crosswise):
    """In whatever order: it is still a child."""

    async def own():
        async with manager.begin(read_only=True, propagation="requires_new"):
            yield

    async def child():
        first, second = own(), own()
        await anext(first)
        await anext(second)
        for one in (first, second) if crosswise else (second, first):
            await one.aclose()
        return await current_unit().session.scalar(text("SELECT 1"))

    async with manager.begin() as unit:
        await unit.session.execute(text("SELECT 1"))
        assert await asyncio.create_task(child()) == 1


async def test_who_has_opened_a_scope_and_reads_only_after_its_child(manager):
    """Though the child is still alive: who opens a scope is known as its parent."""
    used, go_on = asyncio.Event(), asyncio.Event()

    async def child():
        await current_session().execute(text("SELECT 1"))
        used.set()
        await go_on.wait()

    async with manager.scope():
        task = asyncio.create_task(child())
        await used.wait()
        assert await current_session().scalar(text("SELECT 1")) == 1
        go_on.set()
        await task


async def test_a_unit_of_another_manager_around_one_that_has_ended(db):
    """A task that has inherited both finds the one that is still open, also below a place of its own."""
    first, second = UnitOfWorkManager(db.engine(), name="first"), UnitOfWorkManager(db.engine(), name="second")
    ended = asyncio.Event()

    async def late():
        await ended.wait()
        with first.activate():
            assert current_unit("second") is around

    async with second.begin() as around:
        async with first.begin():
            task = asyncio.create_task(late())
            await asyncio.sleep(0)
        ended.set()
        await task


async def test_a_grandchild_of_whom_the_unit_was_taken_back_from(manager):
    """What its parent may not do any more it may, when that has ended: it is a child of who has the unit."""
    used, go_on, ended = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def grandchild():
        await ended.wait()
        return await unit.session.scalar(text("SELECT 1"))

    async def child():
        await unit.session.execute(text("SELECT 1"))
        used.set()
        await go_on.wait()
        return asyncio.create_task(grandchild())

    async with manager.begin() as unit:
        task = asyncio.create_task(child())
        await used.wait()
        await unit.session.execute(text("SELECT 1"))  # takes it back
        go_on.set()
        inner = await task
        ended.set()
        assert await inner == 1


async def test_two_children_that_the_unit_was_taken_back_from(manager):
    """The first one is not forgotten for the second."""
    go_on = asyncio.Event()

    async def child(used):
        await current_unit().session.execute(text("SELECT 1"))
        used.set()
        await go_on.wait()

    async def again(used):
        await child(used)
        with pytest.raises(errors.TaskBoundaryError, match="was taken back"):
            current_unit()

    children = []
    with pytest.raises(errors.RollbackOnlyError):
        async with manager.begin() as unit:
            for work in (again, child):
                used = asyncio.Event()
                children.append(asyncio.create_task(work(used)))
                await used.wait()
                await unit.session.execute(text("SELECT 1"))  # takes it back
            go_on.set()
            await asyncio.gather(*children)


async def opens_units(manager, _scope):
    """Open one unit after the other."""
    while True:
        async with manager.begin():
            pass
        yield


async def rests_beside_its_parent(_manager, scope):
    """Let a child rest the reading of its parent, again and again."""
    turns = asyncio.Queue()

    async def child():
        while (done := await turns.get()) is not None:
            await scope.rest()
            done.set()

    current_session()
    task = asyncio.create_task(child())
    try:
        while True:
            await current_session().execute(text("SELECT 1"))
            await turns.put(done := asyncio.Event())
            await done.wait()
            yield
    finally:
        await turns.put(None)
        await task


@pytest.mark.parametrize("work", [opens_units, rests_beside_its_parent])
async def test_a_task_that_goes_on_for_long_does_not_grow(manager, work):
    """What it did is no part of where it stands."""

    def frames():
        gc.collect()
        return sum(isinstance(thing, Frame) for thing in gc.get_objects())

    async with manager.scope() as scope:
        rounds = work(manager, scope)
        for _ in range(3):
            await anext(rounds)
        before = frames()
        for _ in range(30):
            await anext(rounds)
        assert frames() < before + 10
        await rounds.aclose()
