"""`run_twice`: every transactional function once in vain, once for real."""

from __future__ import annotations

import re

import pytest
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError

from sqla_uow import (
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
from sqla_uow.testing import rolled_back, run_twice
from tests.kit.models import Note, Unique


@pytest.fixture
async def manager(db):
    """Provide an activated manager, of units that are not retried."""
    with UnitOfWorkManager(db.engine()).activate() as manager:
        yield manager


class Seen:
    """What a function does that no rollback undoes."""

    def __init__(self):
        self.runs = []
        self.hooks = []

    async def write(self, text, *, inner=None):
        unit = current_unit()
        self.runs.append(unit)
        unit.session.add(Note(text=text))
        before_commit(self.hooks.append, "before commit")
        after_commit(self.hooks.append, "after commit")
        after_rollback(self.hooks.append, "after rollback")
        if inner is not None:
            await inner()
        return text


async def test_side_effects_show(db, manager):
    """Two runs, one commit: what is in the transaction is there once, and what is not is there twice."""
    seen = Seen()
    write = transactional(seen.write)
    assert await run_twice(write)("note") == "note"
    assert [unit.status for unit in seen.runs] == [Status.ROLLED_BACK, Status.COMMITTED]
    assert [unit.attempt for unit in seen.runs] == [1, 1]
    assert seen.hooks == ["before commit", "after rollback", "before commit", "after commit"]
    assert await db.rows("SELECT text FROM note") == [("note",)]
    await write("once")
    assert len(seen.runs) == 3


async def test_joined_functions_run_with_their_owner(db, manager):
    """The owner is what is run twice; each call of a test is a unit of its own."""
    outer, inner = Seen(), Seen()
    write, join = transactional(outer.write), transactional(inner.write)

    @run_twice
    async def calls(name):
        await write(name, inner=lambda: join("inner"))
        await write("second")

    await calls("first")
    assert (len(outer.runs), len(inner.runs)) == (4, 2)
    assert await db.rows("SELECT text FROM note ORDER BY id") == [("first",), ("inner",), ("second",)]
    assert calls.__name__ == "calls"


async def test_an_object_from_outside_is_found(db, manager):
    """R9: it keeps what the run in vain made of it, so its use in the second is refused, though there are no retries."""
    note = Note(text="from outside")

    @transactional
    async def write():
        current_session().add(note)

    with pytest.raises(errors.InstanceReuseError):
        await run_twice(write)()
    assert await db.scalar("SELECT count(*) FROM note") == 0


async def test_what_the_run_in_vain_meets_is_dropped(db, manager):
    """Its flush is done, its errors go with it; the real run raises its own."""
    seen = []

    @transactional
    async def taken():
        seen.append(current_unit())
        current_session().add_all([Unique(name="same"), Unique(name="same")])

    with pytest.raises(IntegrityError):
        await run_twice(taken)()

    @transactional
    async def at_first():
        seen.append(current_unit())
        if len(seen) == 3:
            raise ZeroDivisionError
        return list(await current_session().scalars(select(Unique.name)))

    assert await run_twice(at_first)() == []
    assert [unit.status for unit in seen] == [*[Status.ROLLED_BACK] * 3, Status.COMMITTED]


async def test_in_rolled_back(db, manager):
    """Both runs in the test's transaction: the first is undone at once, the second at the end."""
    seen = Seen()
    async with rolled_back(manager):
        await run_twice(transactional(seen.write))("note")
        async with manager.begin(read_only=True) as unit:  # the manager of the real engine
            assert list(await unit.session.scalars(select(Note.text))) == []
    assert len(seen.runs) == 2
    assert await db.scalar("SELECT count(*) FROM note") == 0


@pytest.mark.drivers("sqlite")
async def test_nothing_was_run_twice(manager):
    """A test of it that runs no transactional function would prove nothing."""

    @run_twice
    async def block():
        async with manager.begin():
            pass

    name = re.escape(block.__qualname__)
    with pytest.raises(
        AssertionError, match=rf"^no transactional function was run in {name}\(\); nothing was run twice$"
    ):
        await block()
    with pytest.raises(ZeroDivisionError):
        await run_twice(_fails)()


async def _fails():
    raise ZeroDivisionError


@pytest.mark.drivers("sqlite")
def test_what_is_no_async_function(driver):
    """A call is not a function, nor is sync code."""
    with pytest.raises(
        TypeError, match=r"^run_twice\(\) got <function .*>; pass an 'async def' function, without calling it$"
    ):
        run_twice(test_what_is_no_async_function)
