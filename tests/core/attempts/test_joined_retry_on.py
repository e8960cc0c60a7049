"""R13: `retry_on` of a joined function reaches the owner of the unit, who alone can run it again."""

from __future__ import annotations

import contextlib

import pytest
from sqlalchemy.exc import IntegrityError

from sqla_uow import RetryPolicy, UnitOfWorkManager, current_session, current_unit, errors, transactional
from tests.kit.models import Note, Unique

pytestmark = pytest.mark.drivers("sqlite", "psycopg", "asyncmy")


class TakenError(Exception):
    """The function's own word for it."""


@pytest.fixture
async def manager(db):
    """Provide an active manager; the first name is taken."""
    await db.run("INSERT INTO uniq (id, name) VALUES (1, 'taken')")
    with UnitOfWorkManager(db.engine(), retry=RetryPolicy(base=0, cap=0)).activate() as manager:
        yield manager


def is_taken(error):
    """Choose what only the allocator knows."""
    return isinstance(error, (IntegrityError, TakenError))


def allocator(*, propagation="required", own_error=False, at_exit=False):
    """Return a function that finds its first choice taken, and its second free."""

    @transactional(propagation=propagation, retry_on=is_taken)
    async def allocate():
        name = "taken" if current_unit().attempt == 1 else "free"
        current_session().add(Unique(id=2, name=name))
        if at_exit:
            return
        try:
            await current_session().flush()
        except IntegrityError as error:
            if own_error:
                raise TakenError from error
            raise

    return allocate


@pytest.mark.parametrize("propagation", ["required", "nested", "mandatory"])
@pytest.mark.parametrize("how", ["error", "own error", "flush at the exit"])
async def test_the_owner_runs_again(db, manager, propagation, how):
    """Whatever the joined function makes of the error, and also where a savepoint was rolled back."""
    allocate = allocator(propagation=propagation, own_error=how == "own error", at_exit=how == "flush at the exit")

    @transactional(retries=2)
    async def work():
        current_session().add(Note(text="written"))
        await allocate()

    await work()
    assert await db.rows("SELECT name FROM uniq ORDER BY id") == [("taken",), ("free",)]
    assert await db.scalar("SELECT count(*) FROM note") == 1
    assert manager.statistics().retries == {("retry_on", None): 1}


@pytest.mark.parametrize("own_error", [False, True])
async def test_the_outer_function_swallows_it(db, manager, own_error):
    """The unit could not commit anyhow: it is run again, as the joined function has said."""
    allocate = allocator(own_error=own_error)

    @transactional(retries=2)
    async def work():
        current_session().add(Note(text="written"))
        with contextlib.suppress(IntegrityError, TakenError):
            await allocate()

    await work()
    assert await db.rows("SELECT name FROM uniq ORDER BY id") == [("taken",), ("free",)]


async def test_a_savepoint_that_recovers_is_no_reason(db, manager):
    """What the outer function has coped with is over: another error is raised as it is."""
    allocate = allocator(propagation="nested")
    runs = []

    @transactional(retries=2)
    async def work():
        runs.append(1)
        with contextlib.suppress(IntegrityError):
            await allocate()
        raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        await work()

    @transactional(retries=2)
    async def doomed():
        runs.append(2)
        with contextlib.suppress(IntegrityError):
            await allocate()
        with contextlib.suppress(IntegrityError):
            current_session().add(Unique(id=3, name="taken"))
            await current_session().flush()

    with pytest.raises(errors.RollbackOnlyError):
        await doomed()

    @transactional
    async def recovered():
        with contextlib.suppress(IntegrityError):
            await allocate()
        current_session().add(Note(text="written"))

    await recovered()
    assert runs == [1, 2]
    assert await db.scalar("SELECT count(*) FROM note") == 1


async def test_an_owner_without_retries(db, manager):
    """As for the function alone: the conflict it has chosen has outlived its retries, and the error is behind it."""
    allocate = allocator()

    @transactional
    async def work():
        await allocate()

    for call in (work, allocate):
        with pytest.raises(errors.ConflictError) as caught:
            await call()
        assert caught.value.reason == "retry_on"
        assert isinstance(caught.value.__cause__, IntegrityError)


async def test_it_is_not_asked_without_need(db, manager):
    """Of a cancellation, or of another joined function's error."""
    asked = []

    @transactional(retry_on=asked.append)
    async def first():
        """Do nothing."""

    @transactional
    async def second():
        raise KeyError

    @transactional(retries=2)
    async def work():
        await first()
        await second()

    with pytest.raises(KeyError):
        await work()
    assert asked == []
