"""Savepoints, and deletions of several rows."""

from __future__ import annotations

import contextlib

import pytest
from sqlalchemy import inspect

from sqla_uow import errors
from sqla_uow.mixins import expect_version, touch
from tests.versioning import tables
from tests.versioning.others import overtake, version_of
from tests.versioning.tables import Plain


class Undo(Exception):  # noqa: N818  # no failure
    """Rolls back a savepoint."""


@contextlib.asynccontextmanager
async def undone(session):
    """A savepoint that an exception rolls back at the end of the block."""
    with pytest.raises(Undo):
        async with session.begin_nested():
            yield
            raise Undo


@pytest.fixture
async def two(versioned):
    """Plain(1) and Plain(2) at version 1."""
    async with versioned.begin() as unit:
        unit.session.add_all([Plain(id=1), Plain(id=2)])
    return versioned


async def flush(session, row):
    """Write the object."""
    row.value = 1
    await session.flush()


async def change(_session, row):
    """Change the object; the savepoint is rolled back before anything is flushed."""
    row.value = 1


async def flush_twice(session, row):
    """Write the object twice."""
    for value in (1, 2):
        row.value = value
        await session.flush()


async def delete(session, row):
    """Delete the object."""
    await session.delete(row)
    await session.flush()


async def force(session, row):
    """Count a change where there is none."""
    touch(row)
    await session.flush()


async def deeper(session, row):
    """Write the object in a savepoint that is released into the one that is not."""
    async with session.begin_nested():
        await flush_twice(session, row)


@pytest.mark.parametrize("step", [flush, change, flush_twice, delete, force, deeper])
async def test_a_rolled_back_savepoint_gives_the_version_back(db, two, step):
    """V5, T32: readable without an await, equal to the row, and the object can be saved again without a false conflict."""
    async with two.begin() as unit:
        row = await unit.session.get_one(Plain, 1)
        row.other = 1
        await unit.session.flush()
        async with undone(unit.session):
            await step(unit.session, row)
        assert row.version == 2
        await unit.session.refresh(row, ["value"])
        assert row.value == 0
        row.value = 7
    assert row.version == 3
    assert await db.rows("SELECT value, other, version FROM plain WHERE id = 1") == [(7, 1, 3)]


async def test_an_inner_rollback_in_a_released_savepoint(db, two):
    """V5: only what the inner one did is taken back, and then all of it with the outer one."""
    async with two.begin() as unit:
        row = await unit.session.get_one(Plain, 1)
        async with undone(unit.session):
            await flush(unit.session, row)
            async with undone(unit.session):
                await flush_twice(unit.session, row)
            assert row.version == 2
        assert row.version == 1
    assert await version_of(db, Plain) == 1


async def test_a_stale_write_in_a_savepoint(db, two):
    """V5: the flush that failed gives the version back too."""
    if db.family == "sqlite":
        await stale_in_a_savepoint_of_sqlite(db, two)
        return
    async with two.begin(isolation="READ COMMITTED") as unit:
        row = await unit.session.get_one(Plain, 1)
        with pytest.raises(errors.StaleDataError):
            async with unit.session.begin_nested():
                await overtake(db, unit.session, Plain)
                await flush(unit.session, row)
        assert row.version == 1
        await unit.session.refresh(row)
        row.value = 3
    assert await db.rows("SELECT value, version FROM plain WHERE id = 1") == [(3, 3)]


async def stale_in_a_savepoint_of_sqlite(db, manager):
    """Where the other's change is one of the unit itself, it is taken back as well."""
    async with manager.begin() as unit:
        row = await unit.session.get_one(Plain, 1)
        with pytest.raises(errors.StaleDataError):
            async with unit.session.begin_nested():
                await overtake(db, unit.session, Plain)
                await flush(unit.session, row)
        assert row.version == 1
        row.value = 3
    assert await db.rows("SELECT value, version FROM plain WHERE id = 1") == [(3, 2)]


async def test_what_was_new_in_a_savepoint_can_be_added_again(db, two):
    """V5: it is transient, and its first version is 1 again."""
    async with two.begin() as unit:
        row = Plain(id=3)
        async with undone(unit.session):
            unit.session.add(row)
            await flush_twice(unit.session, row)
        assert inspect(row).transient
        unit.session.add(row)
        await unit.session.flush()
        assert row.version == 1
    assert await version_of(db, Plain, 3) == 1


async def test_expectations_are_what_they_were(db, two):
    """V2, V5: what was checked in a savepoint is unchecked with it, as the lock is gone; what was moved on is moved back."""
    async with two.begin() as unit:
        row = await unit.session.get_one(Plain, 1)
        expect_version(row, 1)
        async with undone(unit.session):
            await flush(unit.session, row)
    assert await version_of(db, Plain) == 1
    if db.family == "mysql":  # InnoDB keeps the locks of a savepoint that was rolled back, so nobody could overtake
        return
    with pytest.raises(errors.StaleVersionError):
        async with two.begin() as unit:
            row = await unit.session.get_one(Plain, 1)
            expect_version(row, 1)
            async with undone(unit.session):
                await flush(unit.session, row)
            await overtake(db, unit.session, Plain)


@pytest.mark.parametrize("model", [Plain, tables.JoinedChild, tables.ByUUID])
async def test_one_stale_row_among_several_deleted(db, versioned, model):
    """V5: SQLAlchemy drops the counts on asyncpg: no error, and the stale row survives."""
    async with versioned.begin() as unit:
        unit.session.add_all([model(id=key) for key in (1, 2, 3)])
    with pytest.raises(errors.StaleVersionError):
        async with versioned.begin() as unit:
            rows = [await unit.session.get_one(model, key) for key in (1, 2, 3)]
            await overtake(db, unit.session, model)
            for row in rows:
                await unit.session.delete(row)
    async with versioned.begin() as unit:
        for key in (1, 2, 3):
            await unit.session.delete(await unit.session.get_one(model, key))
    assert await version_of(db, model) is None
