"""A client's version: compared at once, at each write and at the end, and never retried."""

from __future__ import annotations

import pytest
from sqlalchemy import text
from sqlalchemy.exc import NoResultFound

from sqla_uow import RetryPolicy, Status, current_session, current_unit, errors, transactional
from sqla_uow.mixins import get_versioned
from tests.versioning.others import overtake, version_of
from tests.versioning.tables import Plain

LEVELS = {
    "sqlite": ["SERIALIZABLE"],
    "postgresql": ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"],
    "mysql": ["READ COMMITTED", "REPEATABLE READ"],  # at SERIALIZABLE a row that was read is locked
}
QUICK = RetryPolicy(base=0.001, cap=0.001)


@pytest.fixture
async def one(versioned):
    """Plain(1) at version 1."""
    async with versioned.begin() as unit:
        unit.session.add(Plain(id=1))
    with versioned.activate():
        yield versioned


async def test_another_version_is_refused_at_once(one):
    """V2: the error names the object, its key and both versions; the call is run once."""
    runs = []

    @transactional(retries=5)
    async def rename(version):
        runs.append(current_unit())
        row = await get_versioned(current_session(), Plain, 1, version=version)
        row.value = 9

    with pytest.raises(errors.StaleVersionError) as caught:
        await rename(7)
    assert (
        str(caught.value) == "Plain(1) is at version 1 where 7 was expected; read it again, and let the client decide"
    )
    error = caught.value
    assert (error.model, error.key, error.expected, error.found) == (Plain, (1,), 7, 1)
    assert (error.attempts, error.reason) == (1, "stale version")
    assert [unit.status for unit in runs] == [Status.ROLLED_BACK]
    await rename(1)
    assert (await rows(one)) == [(9, 2)]


async def rows(manager):
    """Return what is committed in `plain`."""
    async with manager.engine.connect() as connection:
        return [tuple(row) for row in await connection.execute(text("SELECT value, version FROM plain ORDER BY id"))]


async def test_a_missing_row_is_no_result(one):
    """V2: get_versioned raises SQLAlchemy's own error for a row that is not there."""
    with pytest.raises(NoResultFound):
        async with one.begin() as unit:
            await get_versioned(unit.session, Plain, 5, version=1)


async def test_a_race_is_never_retried(db, one):
    """V2: whatever retries and isolation say, each kind of race on a client's version is one run and StaleVersionError."""
    for isolation in LEVELS[db.family]:
        for change in (True, False):
            runs = []

            @transactional(retries=5, isolation=isolation, retry=QUICK)
            async def work(version, change=change, runs=runs):
                runs.append(1)
                row = await get_versioned(current_session(), Plain, 1, version=version)
                await overtake(db, current_session(), Plain)
                if change:
                    row.value = 99

            version = await version_of(db, Plain)
            with pytest.raises(errors.StaleVersionError) as caught:
                await work(version)
            assert len(runs) == 1, (isolation, change)
            error = caught.value
            assert (error.model, error.key, error.expected, error.attempts) == (Plain, (1,), version, 1)
            if db.family != "sqlite":  # there the other's change is rolled back with the unit's
                assert error.found == version + 1
            assert (await rows(one))[0][0] == 0
