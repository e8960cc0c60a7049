"""`manager.attempts()`: a loop that somebody else wrote, and may leave."""

from __future__ import annotations

import contextlib
import dis
import logging
import sys

import pytest

from sqla_uow import RetryPolicy, Status, UnitOfWorkManager, current_unit, errors
from sqla_uow._attempts import loop as _loops
from tests.kit.troubles import QUICK, BusyAtCommit, WriteSkewAtCommit

AT_COMMIT = {"sqlite": BusyAtCommit, "asyncpg": WriteSkewAtCommit, "psycopg": WriteSkewAtCommit}
pytestmark = pytest.mark.drivers("sqlite", "asyncpg")


class Loop:
    """Attempts whose first COMMITs meet a real conflict."""

    def __init__(self, db, conflicts):
        self.db = db
        self.trouble = AT_COMMIT[db.driver](db)
        self.manager = UnitOfWorkManager(
            self.trouble.engine(), retry=RetryPolicy(base=0, cap=0), isolation=self.trouble.isolation
        )
        self.conflicts = conflicts
        self.units = []

    def attempts(self, retries=3):
        return self.manager.attempts(retries=retries)

    async def work(self, unit):
        """Write a row; where it is the unit's turn, in a transaction that cannot commit."""
        self.units.append(unit)
        await self.trouble.settle()
        if len(self.units) <= self.conflicts:
            await self.trouble.strike(unit.session)
        else:
            await self.trouble.write(unit.session)

    async def rows(self):
        await self.trouble.settle()
        return await self.db.scalar("SELECT count(*) FROM note")


@pytest.fixture
async def loop(db):
    """Make loops with this many conflicts."""
    await db.run("INSERT INTO account (id, balance) VALUES (1, 0), (2, 0)")
    made = []

    def make(conflicts=1):
        made.append(Loop(db, conflicts))
        return made[-1]

    yield make
    for one in made:
        await one.trouble.settle()


# -- ways to end the block


async def to_its_end(loop):
    """Let the block end."""
    async for attempt in loop.attempts():
        async with attempt as unit:
            await loop.work(unit)
    return "done"


async def by_continue(loop):
    """Leave the block by `continue`."""
    async for attempt in loop.attempts():
        async with attempt as unit:
            await loop.work(unit)
            if unit:
                continue
            raise AssertionError
    return "done"


async def in_try_finally(loop):
    """Let the block end in a `finally` that awaits."""
    async for attempt in loop.attempts():
        try:
            async with attempt as unit:
                await loop.work(unit)
        finally:
            await loop.rows()
    return "done"


async def beside_an_except(loop):
    """Let the block end in a `try` whose handlers return."""
    try:
        async for attempt in loop.attempts():
            try:
                async with attempt as unit:
                    await loop.work(unit)
            except KeyError:
                return "a handler's"
    except ValueError:
        return "another handler's"
    else:
        return "done"


async def with_code_behind(loop):
    """Let the block end, with code behind it."""
    async for attempt in loop.attempts():
        async with attempt as unit:
            await loop.work(unit)
        for _ in range(2):
            await loop.rows()
    return "done"


async def around_another_loop(loop):
    """Break from a loop inside the block, and from one around it."""
    async for attempt in loop.attempts():
        for _ in range(2):
            async with attempt as unit:
                for _ in range(3):
                    await loop.work(unit)
                    break
                break
    return "done"


async def inside_another_loop(loop):
    """Let the block end, beside attempts of other units, inside and around."""
    async for outer in UnitOfWorkManager(loop.manager.engine).attempts(retries=1):
        async with outer:
            async for attempt in loop.attempts():
                async with attempt as unit:
                    await loop.work(unit)
                async for inner in loop.attempts():
                    async with inner:
                        break
            return "done"
    raise AssertionError


async def as_a_generator(loop):
    """Let the block end in an async generator that yields inside it."""

    async def units():
        async for attempt in loop.attempts():
            async with attempt as unit:
                yield unit

    async for unit in units():
        await loop.work(unit)
    return "done"


GOES_ON = [
    to_its_end, by_continue, in_try_finally, beside_an_except, with_code_behind, around_another_loop, inside_another_loop,
    as_a_generator,
]  # fmt: skip


async def by_break(loop):
    """Leave block and loop by `break`."""
    async for attempt in loop.attempts():
        async with attempt as unit:
            await loop.work(unit)
            break
    return "done"


async def by_return(loop):
    """Leave block and loop by `return`."""
    async for attempt in loop.attempts():
        async with attempt as unit:
            await loop.work(unit)
            return "done"
    raise AssertionError


async def by_return_through_finally(loop):
    """Leave block and loop by `return`, with a `finally` on the way."""
    async for attempt in loop.attempts():
        try:
            async with attempt as unit:
                await loop.work(unit)
                return "done"
        finally:
            await loop.rows()
    raise AssertionError


async def by_return_behind(loop):  # noqa: RET503  # it does end with one
    """Leave the loop behind the block."""
    async for attempt in loop.attempts():
        async with attempt as unit:
            await loop.work(unit)
        return "done"


async def perhaps_behind(loop):
    """Leave the loop behind the block on a condition."""
    async for attempt in loop.attempts():
        async with attempt as unit:
            await loop.work(unit)
        if unit.attempt == 1:
            break
    return "done"


async def by_a_handler_behind(loop):
    """Leave the loop because code behind the block failed."""
    async for attempt in loop.attempts():
        try:
            async with attempt as unit:
                await loop.work(unit)
            {}.pop(unit)
        except KeyError:
            break
    return "done"


async def in_another_function(loop):
    """Stand in another function than the loop, which knows nothing of it."""

    async def block(attempt):
        async with attempt as unit:
            await loop.work(unit)

    async for attempt in loop.attempts():
        await block(attempt)
    return "done"


async def in_an_exit_stack(loop):
    """Be left by an exit stack."""
    async for attempt in loop.attempts():
        async with contextlib.AsyncExitStack() as stack:
            await loop.work(await stack.enter_async_context(attempt))
    return "done"


async def without_a_loop(loop):
    """Take the first attempt only."""
    async with await anext(loop.attempts()) as unit:
        await loop.work(unit)
    return "done"


async def by_yield_behind(loop):
    """Hand something on behind the block."""

    async def results():
        async for attempt in loop.attempts():
            async with attempt as unit:
                await loop.work(unit)
            yield "done"

    async for result in results():
        return result
    raise AssertionError


LEAVES = [
    by_break, by_return, by_return_through_finally, by_return_behind, perhaps_behind, by_a_handler_behind,
    in_another_function, in_an_exit_stack, without_a_loop,
]  # fmt: skip


@pytest.mark.parametrize("way", GOES_ON)
async def test_a_conflict_at_commit_is_swallowed_where_the_loop_goes_on(loop, way):
    """The block keeps it to itself until the last attempt; the work is there once."""
    mine = loop(conflicts=2)
    assert await way(mine) == "done"
    assert [unit.status for unit in mine.units] == [Status.ROLLED_BACK, Status.ROLLED_BACK, Status.COMMITTED]
    assert [unit.attempt for unit in mine.units] == [1, 2, 3]
    assert await mine.rows() == 1


@pytest.mark.parametrize("way", LEAVES)
async def test_nothing_is_acknowledged_that_was_not_committed(loop, way):
    """Where the loop is left, or that cannot be told, the conflict is raised: nobody would run the block again."""
    mine = loop(conflicts=1)
    with pytest.raises(errors.ConflictError) as caught:
        await way(mine)
    assert (caught.value.attempts, len(mine.units), mine.units[0].status) == (1, 1, Status.ROLLED_BACK)
    assert await mine.rows() == 0


@pytest.mark.parametrize("way", [*GOES_ON, *LEAVES])
async def test_every_way_commits_where_nothing_is_wrong(loop, way):
    """`break` and `return` in the block commit, as its end does."""
    mine = loop(conflicts=0)
    assert await way(mine) == "done"
    assert [unit.status for unit in mine.units] == [Status.COMMITTED]
    assert await mine.rows() == 1


async def test_a_yield_behind_the_block_hands_nothing_on(loop):
    """An async generator's `yield` is an acknowledgement as well."""
    mine = loop(conflicts=1)
    with pytest.raises(errors.ConflictError):
        await by_yield_behind(mine)
    assert await mine.rows() == 0


async def test_the_last_attempt_raises_and_the_message_of_one_that_leaves(loop, caplog):
    """Both say how often, what, and what to do; WARNING once."""
    caplog.set_level(logging.WARNING, "sqla_uow")
    mine = loop(conflicts=9)
    with pytest.raises(errors.ConflictError) as last:
        await to_its_end(mine)
    assert (last.value.attempts, len(mine.units)) == (4, 4)
    with pytest.raises(errors.ConflictError) as left:
        await by_break(mine)
    message = str(left.value).replace(f"{left.value.elapsed:.3f}", "0.000")
    assert message == (
        "attempts() failed in attempt 1 of 4, which leaves its loop, within 0.000 s, last by conflict "
        f"{mine.trouble.code}; let the block come to its end, return or break behind the loop, or use @transactional"
    )
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]


async def test_the_message_of_the_last_but_one_that_leaves(loop):
    """There was one more attempt, so that is not what is missing."""
    mine = loop(conflicts=9)
    with pytest.raises(
        errors.ConflictError, match=r"failed in attempt 1 of 2, which leaves its loop, .*; let the block"
    ):
        async for attempt in mine.attempts(retries=1):
            async with attempt as unit:
                await mine.work(unit)
                break


async def test_a_conflict_in_the_body_is_swallowed_though_the_block_would_have_returned(loop, db):
    """The body never came to its `return`, so the loop does go on."""
    trouble = QUICK[db.family](db)
    manager = UnitOfWorkManager(trouble.engine(), retry=RetryPolicy(base=0, cap=0), isolation=trouble.isolation)
    attempts = []
    loop(conflicts=0)  # for its accounts

    async def work():
        async for attempt in manager.attempts(retries=2):
            async with attempt as unit:
                attempts.append(unit.attempt)
                if not unit.is_last_attempt:
                    await trouble.strike(unit.session)
                await trouble.write(unit.session)
                return "done"
        raise AssertionError

    assert await work() == "done"
    assert attempts == [1, 2, 3]
    assert await db.scalar("SELECT count(*) FROM note") == 1


async def test_an_exception_ends_the_loop(loop):
    """What is not retryable is the caller's, after one run."""
    mine = loop(conflicts=0)
    with pytest.raises(KeyError, match="mine"):
        async for attempt in mine.attempts():
            async with attempt as unit:
                await mine.work(unit)
                raise KeyError("mine")
    assert (len(mine.units), await mine.rows()) == (1, 0)


async def test_it_always_begins_a_unit_of_its_own(db):
    """Also inside another unit, and it is the current one in the block."""
    manager = UnitOfWorkManager(db.engine())
    async with manager.begin(read_only=True) as outer:
        async for attempt in manager.attempts(retries=1):
            async with attempt as unit:
                assert unit is current_unit(manager)
                assert unit is not outer
    assert unit.status is Status.COMMITTED


async def test_a_unit_is_entered_and_left_once(db):
    """Misuse is named: entered twice, left before it was entered, left twice."""
    manager = UnitOfWorkManager(db.engine())
    block = manager.begin()
    with pytest.raises(errors.PropagationError, match=r"^a unit of begin\(\) was left before it was entered$"):
        await block.__aexit__(None, None, None)
    async with block:
        with pytest.raises(
            errors.PropagationError, match=r"^a unit of begin\(\) was entered twice; a unit is used once"
        ):
            await block.__aenter__()
    with pytest.raises(errors.PropagationError, match=r"^a unit of begin\(\) was left twice; use each unit in one"):
        await block.__aexit__(None, None, None)


async def test_a_body_can_make_its_attempt_the_last(db):
    """R1: a body that has done what cannot be done again is not run again; the message says so."""
    await db.run("INSERT INTO account (id, balance) VALUES (1, 0), (2, 0)")
    runs, trouble = [], QUICK[db.family](db)
    manager = UnitOfWorkManager(trouble.engine())
    with pytest.raises(errors.ConflictError) as caught:
        async for attempt in manager.attempts(retries=5, isolation=trouble.isolation):
            async with attempt as unit:
                runs.append(unit.attempt)
                unit.is_last_attempt = True
                await trouble.strike(unit.session)
    await trouble.settle()
    assert runs == [1]
    assert str(caught.value) == (
        f"attempts() failed in attempt 1 of 6, which was made the last, within {caught.value.elapsed:.3f} s, last by "
        f"{trouble.reason} {trouble.code}; call it again later, or shorten the transaction"
    )


@pytest.mark.drivers("sqlite")
def test_code_that_leads_nowhere(driver):
    """A frame whose next step cannot be told, or is told by another Python, is not taken for a loop."""
    code = test_code_that_leads_nowhere.__code__
    assert not _loops._leads_back(code, 0, 0)
    graph = _loops._graph(code)
    call = next(one for one in dis.get_instructions(code) if one.opname == "CALL")
    assert graph.at(call.offset + 2).offset == call.offset  # its cache
    assert graph.at(-2) is None


@pytest.mark.drivers("sqlite")
def test_another_python(driver, monkeypatch):
    """Whose code is not CPython's; none runs here."""
    monkeypatch.setattr(sys.implementation, "name", "pypy")
    assert not _loops._leads_back.__wrapped__(test_another_python.__code__, 0, 0)
