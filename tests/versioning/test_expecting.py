"""A client's version: compared at once, at each write and at the end, and never retried."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime

import pytest
from sqlalchemy import event, exc, text
from sqlalchemy.exc import NoResultFound

from sqla_uow import RetryPolicy, Status, UnitOfWorkManager, current_session, current_unit, errors, transactional
from sqla_uow.mixins import expect_version, get_versioned, touch
from tests.kit.logged import logged
from tests.kit.statements import statements
from tests.versioning import tables
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
        runs.append(row)
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
    runs.clear()
    await rename(1)
    assert len(runs) == 2
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


async def test_an_unchanged_object_is_checked_before_commit(db, one):
    """V2: the body only reads the object and writes something else; one locking SELECT finds the other's change."""
    for isolation in LEVELS[db.family]:
        version = await version_of(db, Plain)
        with pytest.raises(errors.StaleVersionError) as caught:
            async with one.begin(isolation=isolation) as unit:
                await get_versioned(unit.session, Plain, 1, version=version)
                unit.session.add(Plain(id=2))
                await unit.session.flush()
                await overtake(db, unit.session, Plain)
        assert caught.value.model is Plain
        assert len(await rows(one)) == 1


async def test_the_check_before_commit_is_one_select(db, one):
    """V2: it locks; nothing is sent for an object that the unit wrote, or in a read-only unit."""
    sent = statements(one.engine, lambda statement: "plain" in statement)
    async with one.begin() as unit:
        await get_versioned(unit.session, Plain, 1, version=1)
    assert len(sent) == 2
    assert ("FOR" in sent[1]) is (db.family != "sqlite")
    sent.clear()
    async with one.begin() as unit:
        (await get_versioned(unit.session, Plain, 1, version=1)).value = 1
    assert [word.split()[0] for word in sent] == ["SELECT", "UPDATE"]
    sent.clear()
    async with one.begin(read_only=True) as unit:
        await get_versioned(unit.session, Plain, 1, version=2)
    assert len(sent) == 1


async def test_a_refresh_does_not_forget_the_expectation(db, one):
    """V2: compared again before the flush, whatever the body has read anew meanwhile."""
    with pytest.raises(errors.StaleVersionError) as caught:
        async with one.begin() as unit:
            row = await get_versioned(unit.session, Plain, 1, version=1)
            await overtake(db, unit.session, Plain)
            await unit.session.refresh(row, with_for_update=db.family == "mysql" or None)
            row.value = 5
    assert (caught.value.expected, caught.value.found) == (1, 2)
    assert (await rows(one))[0][0] == 0


async def test_own_changes_move_the_expectation_on(one):
    """V2: several flushes, an expectation said twice, and a deletion."""
    async with one.begin() as unit:
        row = await get_versioned(unit.session, Plain, 1, version=1)
        for value in (1, 2):
            row.value = value
            await unit.session.flush()
        expect_version(row, 3)
        row.value = 3
    assert await rows(one) == [(3, 4)]
    async with one.begin() as unit:
        await unit.session.delete(await get_versioned(unit.session, Plain, 1, version=4))
    assert await rows(one) == []


async def test_a_swallowed_stale_flush_is_not_retried_either(db, one):
    """V2: any StaleDataError of a unit with expectations, also one that the body has swallowed or turned into another."""
    for wrap in (None, KeyError("mine")):
        runs = []

        @transactional(retries=3, retry=QUICK)
        async def work(wrap=wrap, runs=runs):
            runs.append(1)
            session = current_session()
            expect_version(await session.get_one(Plain, 1), await version_of(db, Plain))
            other = Plain(id=2)
            session.add(other)
            await session.flush()
            await session.execute(text("UPDATE plain SET version = 7 WHERE id = 2"))
            other.value = 1
            try:
                await session.flush()
            except errors.StaleDataError:
                if wrap is not None:
                    raise wrap  # noqa: B904  # the context is what is looked at

        with pytest.raises(errors.StaleVersionError):
            await work()
        assert runs == [1]


async def test_a_loser_without_an_expectation_is_told_what_it_lost(db, one):
    """V1: when its retries are over, the error names the row and both versions."""
    async with one.begin() as unit:
        unit.session.add(Plain(id=2))
    with pytest.raises(errors.StaleVersionError) as caught:
        async with one.begin() as unit:
            row, other = [await unit.session.get_one(Plain, key) for key in (1, 2)]
            await overtake(db, unit.session, Plain)
            row.value, other.value = 5, 5
    error = caught.value
    if db.family == "sqlite":  # the other's change went with the unit's, so no row is to be found that has changed
        assert (error.model, error.key, error.expected, error.found) == (None, None, None, None)
    else:
        assert (error.model, error.key, error.expected, error.found) == (Plain, (1,), 1, 2)


async def test_without_an_expectation_a_stale_version_is_retried(db, one):
    """R2, V2: the control of the tests above: the body reads again, and succeeds."""
    runs = []

    @transactional(retries=3, retry=QUICK)
    async def work():
        runs.append(1)
        row = await current_session().get_one(Plain, 1)
        if len(runs) == 1:
            await overtake(db, current_session(), Plain)
        row.value += 1

    await work()
    assert len(runs) == 2
    assert (await rows(one))[0][0] == 1


@pytest.mark.drivers("asyncpg", "psycopg", "asyncmy", "aiomysql")
async def test_a_conflict_with_fresh_versions_is_retried(db, one):
    """V2: a conflict that is not about an expected version is retried as any other."""
    async with one.begin() as unit:
        unit.session.add(Plain(id=2))
    level = "REPEATABLE READ" if db.family == "postgresql" else "READ COMMITTED"
    runs = []

    @transactional(retries=3, retry=QUICK, isolation=level)
    async def work():
        runs.append(1)
        row = await get_versioned(current_session(), Plain, 1, version=1)
        await current_session().get_one(Plain, 2)
        if len(runs) == 1:
            await conflict(db, current_session())
        row.value = 5

    await work()
    assert len(runs) == 2
    assert await rows(one) == [(5, 2), (int(db.family == "postgresql"), 1)]


async def conflict(db, session):
    """Raise the database's own conflict about Plain(2)."""
    if db.family == "postgresql":
        await db.run("UPDATE plain SET value = 1 WHERE id = 2")
        await session.execute(text("UPDATE plain SET value = 2 WHERE id = 2"))
    else:
        await session.execute(text("SIGNAL SQLSTATE '40001' SET MYSQL_ERRNO = 1213, MESSAGE_TEXT = 'deadlock'"))


@pytest.mark.drivers("asyncpg", "psycopg", "asyncmy", "aiomysql")  # on SQLite units that write come one after the other
async def test_both_of_two_writers_expect_the_same_version(one):
    """V2: at the strongest level of each database, one of two that saw version 1 wins and the other is told, in one run."""
    runs, barrier = [], asyncio.Barrier(2)

    @transactional(retries=5, isolation="SERIALIZABLE", retry=QUICK)
    async def work(value):
        runs.append(value)
        row = await get_versioned(current_session(), Plain, 1, version=1)
        await barrier.wait()
        row.value = value

    results = await asyncio.gather(work(1), work(2), return_exceptions=True)
    assert sorted(type(result) for result in results if result) == [errors.StaleVersionError]
    lost = next(result for result in results if result)
    assert (lost.expected, lost.found, lost.attempts) == (1, 2, 1)
    assert sorted(runs) == [1, 2]
    assert (await rows(one))[0][1] == 2


@pytest.mark.drivers("asyncpg", "psycopg", "asyncmy", "aiomysql")
async def test_a_row_that_is_gone(db, one):
    """V2: deleted by somebody else: found is None."""
    with pytest.raises(errors.StaleVersionError) as caught:
        async with one.begin() as unit:
            await get_versioned(unit.session, Plain, 1, version=1)
            await db.run("DELETE FROM plain")
    assert str(caught.value) == "Plain(1) is gone where 1 was expected; read it again, and let the client decide"
    assert caught.value.found is None


async def test_what_is_no_version_is_refused(one):
    """V2: misuse is a clear error, at once: another type, a new object, no unit, no mixin."""
    async with one.begin() as unit:
        row = await unit.session.get_one(Plain, 1)
        for version, why in ((True, "True"), ("1", "'1'"), (None, "None")):
            with pytest.raises(TypeError) as caught:
                expect_version(row, version)
            assert str(caught.value) == (
                f"the version of Plain is of type int, but {why} was expected; convert what the client sent"
            )
        stamp = tables.ByTimestamp(id=1)
        unit.session.add(stamp)
        with pytest.raises(ValueError, match="has no row yet"):
            expect_version(stamp, datetime(2000, 1, 1, tzinfo=UTC))
        await unit.session.flush()
        with pytest.raises(TypeError, match="has no time zone; give it one"):
            expect_version(stamp, datetime(2000, 1, 1))  # noqa: DTZ001  # the point
        with pytest.raises(
            TypeError, match=r"expect_version\(\) got a int, which has no version; give its model a mixin"
        ):
            expect_version(1, 1)
    for call in (lambda: expect_version(row, 1), lambda: touch(row)):
        with pytest.raises(errors.NoUnitError, match="is in no open unit"):
            call()


async def test_assigning_a_version_is_refused(one):
    """V2, T30: in SQLAlchemy it is no check, but sets the row back; an equal one, as merge() copies it, is allowed."""
    async with one.begin() as unit:
        row = await unit.session.get_one(Plain, 1)
        row.value = 4
        await unit.session.flush()
        with pytest.raises(AttributeError) as caught:
            row.version = 1
        assert str(caught.value) == (
            "the version of Plain(1) is 2 and was assigned 1, which would not check it but set the row back; call "
            "expect_version() to check a client's version, or touch() to count a change"
        )
        row.version = 2
        merged = await unit.session.merge(Plain(id=1, value=5, version=2))
        assert merged is row
    assert await rows(one) == [(5, 3)]
    for model, attribute in (
        (tables.OtherAttribute, "rev"),
        (tables.OtherAttribute, "version"),
        (tables.JoinedChild, "version"),
    ):
        async with one.begin() as unit:
            row = await unit.session.merge(model(id=1))
            await unit.session.flush()
            with pytest.raises(AttributeError):
                setattr(row, attribute, 5)


async def test_the_read_session_keeps_no_expectation(versioned):
    """V2, S7: it ends before anything is written, so nothing could be compared again."""
    async with versioned.begin() as unit:
        unit.session.add(Plain(id=1))
    with versioned.activate():
        async with versioned.scope():
            plain = await current_session().get_one(Plain, 1)
            with pytest.raises(errors.ReadOnlyError) as caught:
                expect_version(plain, 1)
    assert str(caught.value) == (
        "expect_version() was called for Plain(1) in a session that only reads; write in a @transactional function: pass "
        "the key and get_one() the object inside, or open the unit around the read as well; never merge() it"
    )


@pytest.mark.drivers("asyncpg", "asyncmy")
async def test_versions_that_cannot_be_read_afresh(db, one, caplog):
    """V2: no connection can be had by then; it is stale all the same, and the log says what is missing."""
    engine = db.engine()
    manager, none_left = UnitOfWorkManager(engine), []

    @event.listens_for(engine.sync_engine, "checkout")
    def refuse(*_args):
        if none_left:
            raise exc.TimeoutError("none left")

    with pytest.raises(errors.StaleVersionError) as caught:
        async with manager.begin() as unit:
            row = await get_versioned(unit.session, Plain, 1, version=1)
            await overtake(db, unit.session, Plain)
            row.value = 5
            none_left.append(True)
    assert str(caught.value) == (
        "begin() wrote a row that was changed since it was read, in a unit that expects a version; read it again, and let "
        "the client decide"
    )
    assert (caught.value.model, caught.value.key, caught.value.expected, caught.value.found) == (Plain, (1,), 1, None)
    fields = {"function": "begin()", "manager": "default", "error": "TimeoutError"}
    assert ("WARNING", "the versions of begin() could not be read (TimeoutError)", fields) in logged(caplog)


async def test_another_failure_is_that_failure(one):
    """V2: nothing is looked up for what is no conflict."""
    with pytest.raises(KeyError):
        async with one.begin() as unit:
            await get_versioned(unit.session, Plain, 1, version=1)
            raise KeyError
    assert (await rows(one)) == [(0, 1)]
