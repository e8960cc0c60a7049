"""What forbids a COMMIT, and that nothing of a doomed unit ever becomes durable."""

from __future__ import annotations

import contextlib
import logging

import pytest
from sqlalchemy import insert, text
from sqlalchemy.exc import DBAPIError, IntegrityError, SQLAlchemyError, StatementError

from sqla_uow import (
    Status,
    UnitOfWorkManager,
    after_commit,
    after_rollback,
    current_session,
    current_unit,
    errors,
    transactional,
)
from tests.kit.databases import POOLED
from tests.kit.models import Note, Unique

SERVERS = pytest.mark.drivers("asyncpg", "psycopg", "asyncmy", "aiomysql")


@pytest.fixture
async def manager(db):
    """Provide a manager over a pool of one connection that it does not roll back itself, and a key that is taken."""
    await db.run("INSERT INTO uniq (id, name) VALUES (1, 'taken')")
    return UnitOfWorkManager(db.engine(pool_size=1, max_overflow=0, pool_reset_on_return=None))


@pytest.fixture
def run(manager, db):
    """Run a function as a unit; then let the next user of the only connection commit; return what is durable."""

    async def run(body, **options):
        hooks, units = [], []

        @transactional(**options)
        async def work():
            units.append(current_unit())
            after_commit(hooks.append, "committed")
            after_rollback(hooks.append, "rolled back")
            return await body()

        result = error = None
        with manager.activate():
            try:
                result = await work()
            except Exception as raised:  # noqa: BLE001  # looked at by the test
                error = raised
        assert manager.engine.pool.checkedout() == 0
        async with manager.begin() as unit:
            unit.session.add(Note(text="of the next user"))
        rows = [text for (text,) in await db.rows("SELECT text FROM note ORDER BY id")]
        assert rows.pop() == "of the next user"
        return Outcome(result, error, units[0], hooks, rows)

    return run


class Outcome:
    def __init__(self, result, error, unit, hooks, rows):
        self.result = result
        self.error = error
        self.unit = unit
        self.hooks = hooks
        self.rows = rows

    def refused(self):
        """Assert that the body returned normally and nothing became of it; return the first cause."""
        assert type(self.error) is errors.RollbackOnlyError
        assert (self.unit.status, self.hooks, self.rows) == (Status.ROLLED_BACK, ["rolled back"], [])
        return self.error.__cause__

    def committed(self, *rows):
        """Assert that these rows were committed."""
        assert self.error is None
        assert (self.unit.status, self.hooks, self.rows) == (Status.COMMITTED, ["committed"], list(rows))


async def write(text="written"):
    """Send one row."""
    current_session().add(Note(text=text))
    await current_session().flush()


async def violate():
    """Meet a unique key in a statement."""
    await current_session().execute(insert(Unique).values(name="taken"))


async def violate_in_flush():
    """Meet a unique key in a flush."""
    current_session().add(Unique(name="taken"))
    await current_session().flush()


@transactional
async def joined(step):
    """Do a step in a joined call."""
    await step()


@transactional(propagation="nested")
async def nested(step):
    """Do a step in a savepoint."""
    await step()


async def begin_nested(step):
    """Do a step in the session's own savepoint."""
    async with current_session().begin_nested():
        await step()


async def fail():
    """Fail for a reason that is not the database's."""
    await write("before the failure")
    raise KeyError("mine")


def swallowing(step, frame=None, error=Exception):
    """Make a body that writes, then swallows what a step raises."""

    async def body():
        await write()
        with contextlib.suppress(error):
            await (step() if frame is None else frame(step))

    return body


# -- D1, D3: swallowed failures


@pytest.mark.parametrize("step", [violate, violate_in_flush])
@pytest.mark.parametrize("frame", [None, joined])
async def test_a_swallowed_statement_error_dooms(run, db, step, frame):
    """D3: on every database alike; the first cause is chained, and a COMMIT is never silently a ROLLBACK."""
    outcome = await run(swallowing(step, frame))
    assert isinstance(outcome.refused(), IntegrityError)
    code = {"postgresql": "23505", "mysql": "1062", "sqlite": "SQLITE_CONSTRAINT_UNIQUE"}[db.family]
    assert str(outcome.error) == (
        f"work() can only be rolled back: IntegrityError (permanent {code}) was raised in it; let the error leave the "
        "function, or guard the step that may fail with propagation='nested'"
    )


@pytest.mark.parametrize("step", [violate, violate_in_flush, fail])
@pytest.mark.parametrize("frame", [nested, begin_nested])
async def test_what_a_savepoint_recovers_dooms_nothing(run, step, frame):
    """D1, D3: an error that its savepoint took back; what was written around it is committed, what was in it is not."""
    (await run(swallowing(step, frame))).committed("written")


async def test_a_joined_call_that_leaves_by_an_exception_dooms(run):
    """D1: also where the database has nothing to complain of; the message names fact and remedy."""
    outcome = await run(swallowing(fail, joined))
    assert repr(outcome.refused()) == "KeyError('mine')"
    assert str(outcome.error) == (
        "work() can only be rolled back: KeyError was raised in it; let the error leave the function, or guard the step "
        "that may fail with propagation='nested'"
    )


async def test_the_first_cause_stays(run):
    """D1: what fails afterwards is aftermath."""

    async def body():
        for step in (violate, fail):
            with contextlib.suppress(Exception):
                await joined(step)

    assert isinstance((await run(body)).refused(), IntegrityError)


@pytest.mark.parametrize("step", [violate, violate_in_flush])
@pytest.mark.parametrize("frame", [nested, begin_nested])
async def test_a_swallowed_error_inside_a_savepoint_does_not_end_with_it(run, frame, step):
    """D3: returning normally from the savepoint is no recovery: half its work would be released, or all of it lost."""
    outcome = await run(lambda: frame(swallowing(step)))
    assert isinstance(outcome.refused(), IntegrityError)


@pytest.mark.parametrize("step", [violate, violate_in_flush])
@pytest.mark.parametrize("frame", [nested, begin_nested])
async def test_that_refusal_is_recovered_by_the_savepoint_too(run, frame, step):
    """D3: it left the savepoint by an exception, which was rolled back for that; never half of it."""

    async def body():
        await write("around")
        with pytest.raises(errors.RollbackOnlyError):
            await frame(swallowing(step))
        await write("afterwards")

    (await run(body)).committed("around", "afterwards")


async def test_a_savepoint_that_is_released_by_hand_carries_its_mark_up(run):
    """D3: SQLAlchemy sends no ROLLBACK TO once a RELEASE was refused; nothing of it may become durable."""

    async def body():
        await write("around")
        savepoint = await current_session().begin_nested()
        await swallowing(violate)()
        with pytest.raises(errors.RollbackOnlyError):
            await savepoint.commit()
        with contextlib.suppress(SQLAlchemyError, errors.UnitOfWorkError):
            await savepoint.rollback()

    assert isinstance((await run(body)).refused(), IntegrityError)


async def test_a_core_savepoint_is_one_too(run):
    """D3: `connection.begin_nested()` recovers as well; released, it carries the mark up."""

    async def recover():
        connection = await current_session().connection()
        await write()
        with contextlib.suppress(IntegrityError):
            async with connection.begin_nested():
                await connection.execute(insert(Unique).values(name="taken"))

    async def release():
        connection = await current_session().connection()
        with contextlib.suppress(errors.RollbackOnlyError):
            async with connection.begin_nested():
                await swallowing(violate)()

    (await run(recover)).committed("written")
    assert isinstance((await run(release)).error, errors.RollbackOnlyError)


async def test_savepoints_deep(run):
    """D3: a rollback clears marks of its own depth and deeper, not those around it."""

    async def inside_out():
        await write("1")
        with contextlib.suppress(IntegrityError):
            await nested(lambda: begin_nested(lambda: nested(violate)))
        await write("2")
        with contextlib.suppress(KeyError):
            await begin_nested(lambda: nested(fail))

    (await run(inside_out)).committed("1", "2")


async def test_a_mark_around_a_savepoint_survives_its_rollback(run):
    """D3: rolling back an inner savepoint is no cure for what failed before it."""

    async def body():
        with contextlib.suppress(IntegrityError):
            await violate()
        with contextlib.suppress(errors.RollbackOnlyError, KeyError):
            await nested(fail)

    assert isinstance((await run(body)).refused(), IntegrityError)


async def test_an_error_before_anything_was_sent_dooms_nothing(run):
    """D3: a missing bind parameter never reached the server."""

    async def body():
        await write()
        with pytest.raises(StatementError, match="bind parameter"):
            await current_session().execute(text("SELECT :missing"), {"other": 1})
        await write("afterwards")

    (await run(body)).committed("written", "afterwards")


# -- D5: SQL after doom


async def test_sql_after_doom_raises_at_once(run):
    """D5: by session, by flush, by connection; nothing is sent, or the server would complain of the syntax."""
    seen = []

    async def body():
        connection = await current_session().connection()
        with contextlib.suppress(IntegrityError):
            await violate()
        assert current_unit().status is Status.DOOMED
        for attempt in (current_session().execute, connection.execute):
            with pytest.raises(errors.RollbackOnlyError) as caught:
                await attempt(text("this is no SQL"))
            seen.append(caught.value.__cause__)
        current_session().add(Note(text="too late"))
        with pytest.raises(errors.RollbackOnlyError):
            await current_session().flush()

    cause = (await run(body)).refused()
    assert seen == [cause, cause]


async def test_a_savepoint_cannot_be_entered_after_doom(run):
    """D5: nor a nested call."""

    async def body():
        with contextlib.suppress(IntegrityError):
            await violate()
        with pytest.raises(errors.RollbackOnlyError):
            await nested(write)
        with pytest.raises(errors.RollbackOnlyError):
            await begin_nested(write)

    assert isinstance((await run(body)).refused(), IntegrityError)


# -- the unit's own doom


async def test_the_owner_may_doom_its_own_unit(run):
    """`doom()` in the owner: it finishes, gets its result, and nothing is kept."""

    async def body():
        await write()
        current_unit().doom("only looking")
        return "result"

    outcome = await run(body)
    assert (outcome.error, outcome.result, outcome.rows, outcome.hooks) == (None, "result", [], ["rolled back"])
    assert outcome.unit.status is Status.ROLLED_BACK


@pytest.mark.parametrize("frame", [joined, nested])
async def test_doom_in_an_inner_frame_is_news_to_the_owner(run, frame):
    """`doom(reason)` in a joined call: the owner gets `RollbackOnlyError` with the reason; no savepoint takes it back."""

    async def step():
        current_unit().doom("over budget")

    outcome = await run(swallowing(step, frame))
    assert outcome.refused() is None
    assert str(outcome.error) == (
        "work() can only be rolled back: doom() was called: over budget; let the error leave the function, or guard the "
        "step that may fail with propagation='nested'"
    )


@pytest.mark.parametrize("frame", [nested, begin_nested])
async def test_doom_stands_whatever_a_savepoint_takes_back_afterwards(run, frame):
    """`doom()` is hard, also where an inner frame fails later and is recovered."""

    async def fail_unsent():
        raise KeyError

    async def body():
        await write()
        current_unit().doom()
        with contextlib.suppress(KeyError):
            await frame(lambda: joined(fail_unsent))

    outcome = await run(body)
    assert (outcome.error, outcome.rows, outcome.hooks) == (None, [], ["rolled back"])


async def test_doom_does_not_hide_an_exception(run):
    """D4: the body's own exception is what its caller gets."""

    async def body():
        current_unit().doom()
        await fail_quietly()

    async def fail_quietly():
        raise KeyError("mine")

    assert repr((await run(body)).error) == "KeyError('mine')"


# -- user code that ends the transaction itself


async def commit_session():
    """Commit the unit's session."""
    await current_session().commit()


async def commit_connection():
    """Commit the unit's connection."""
    await (await current_session().connection()).commit()


async def commit_by_block():
    """Leave a block of the session's own."""
    async with current_session():
        pass


async def roll_back_session():
    """Roll back the unit's session."""
    await current_session().rollback()


async def roll_back_connection():
    """Roll back the unit's connection."""
    await (await current_session().connection()).rollback()


async def close_session():
    """Close the unit's session."""
    await current_session().close()


@pytest.mark.parametrize(
    "step", [commit_session, commit_connection, commit_by_block, roll_back_session, roll_back_connection, close_session]
)
@pytest.mark.parametrize("doomed", [False, True])
async def test_user_code_cannot_end_the_transaction(run, step, doomed):
    """D3: whatever it calls and swallows, in whatever state: nothing is durable, and the next user gets a clean one."""

    async def body():
        await write()
        if doomed:
            with contextlib.suppress(IntegrityError):
                await violate()
        with contextlib.suppress(SQLAlchemyError, errors.UnitOfWorkError):
            await step()
        with contextlib.suppress(SQLAlchemyError, errors.UnitOfWorkError):
            await write("afterwards")

    outcome = await run(body)
    assert outcome.error is not None
    assert (outcome.rows, outcome.unit.status, outcome.hooks) == ([], Status.ROLLED_BACK, ["rolled back"])


async def test_a_commit_inside_says_what_to_do_instead(run):
    """The whole message: fact with values; remedy."""
    outcome = await run(commit_session)
    assert type(outcome.error) is errors.PropagationError
    assert str(outcome.error) == (
        "COMMIT was called inside work(), which commits at its own end; remove the commit() or use "
        "propagation='requires_new' for a part that must be durable earlier"
    )


# -- D4: trouble while ending


@pytest.mark.parametrize("raised", [SystemExit, KeyboardInterrupt, GeneratorExit])
async def test_every_base_exception_rolls_back(manager, db, raised):
    """D4: on `BaseException`, and gives it on."""
    with pytest.raises(raised):
        async with manager.begin() as unit:
            unit.session.add(Note(text="never"))
            await unit.session.flush()
            raise raised
    assert unit.status is Status.ROLLED_BACK
    assert await db.rows("SELECT * FROM note") == []
    assert manager.engine.pool.checkedout() == 0


@SERVERS
async def test_trouble_in_rollback_does_not_replace_the_users_exception(run, db, caplog):
    """D4: the server has ended the session; it is logged, the pool is sound, the exception is the body's."""
    caplog.set_level(logging.INFO, "sqla_uow")

    async def body():
        await write()
        await db.kill(current_session())
        raise KeyError("mine")

    outcome = await run(body, retries=3)
    assert repr(outcome.error) == "KeyError('mine')"
    assert (outcome.unit.status, outcome.hooks, outcome.rows) == (Status.ROLLED_BACK, ["rolled back"], [])
    messages = {record.getMessage() for record in caplog.records}
    assert messages <= {f"ROLLBACK of work() failed ({kind}); its connection is discarded" for kind in NAMES}


NAMES = ("InterfaceError", "OperationalError", "DBAPIError", *["InternalError"] * POOLED)  # PgBouncer: 08P01


@SERVERS
@pytest.mark.parametrize("in_savepoint", [False, True])
async def test_a_session_that_the_server_ended_is_never_a_success(run, db, in_savepoint):
    """D3, R2: swallowed, it ends in `ConflictError`; also where SQLAlchemy answers a RELEASE without naming the loss."""

    async def body():
        connection = await current_session().connection()
        await write()
        async with connection.begin_nested() if in_savepoint else contextlib.nullcontext():
            await db.kill(current_session())
            with contextlib.suppress(DBAPIError):
                await connection.execute(text("SELECT 1"))

    outcome = await run(body)
    assert isinstance(outcome.error, errors.ConflictError)
    assert (outcome.error.reason, outcome.rows) == ("lost connection", [])
