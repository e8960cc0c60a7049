"""The simulation behind docs/explanation/many-processes.md: its clock, its machine, its database, and that the library is in it."""

from __future__ import annotations

import asyncio
import functools
import inspect
import random
import statistics
from dataclasses import replace

import pytest

from benchmarks.contention_sides import Cell
from benchmarks.simulation import virtual
from benchmarks.simulation.client import Pool, PoolTimeoutError
from benchmarks.simulation.costs import ClientCosts, Costs, ServerCosts
from benchmarks.simulation.machine import Cores, Thread
from benchmarks.simulation.run import Situation, play, simulate
from benchmarks.simulation.server import DatabaseError, Server, Settings, Transaction
from benchmarks.simulation.sides import SIDES, Ours
from sqla_uow._retry.budget import LARGEST, PER_CALL, PER_SECOND

pytestmark = pytest.mark.drivers("sqlite")  # what is about no database
COSTS = Costs(
    client=ClientCosts(start=1e-4, begin=2e-4, statement=2e-4, end=3e-4, failure=5e-4),
    server=ServerCosts(begin=5e-5, statement=1e-4, commit=1e-4, roll_back=5e-5),
    delay=5e-5,
)
SNAPSHOTS = ["SERIALIZABLE", "REPEATABLE READ"]
FOUR = Situation(
    cell=Cell(10, 0, 8), processes=4, costs=COSTS, settings=Settings(scans=True), warm_up=3.0, slices=2, pause=0.0
)


def in_virtual_time(test):
    """Run a test in the loop that jumps."""

    @functools.wraps(test)
    def run(**kwargs):
        virtual.run(lambda loop: test(loop, **kwargs))

    asked = list(inspect.signature(test).parameters.values())[1:]  # pytest would ask for `loop` as a fixture
    run.__signature__ = inspect.Signature(asked)
    return run


# -- time


@in_virtual_time
async def test_an_hour_takes_no_time_and_everything_comes_in_its_order(loop):
    """Sleeps, timers and timeouts are asyncio's own; only the clock is not."""
    order = []

    async def after(seconds):
        await asyncio.sleep(seconds)
        order.append(loop.time())

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(3000):
            await asyncio.gather(after(3600), after(5), after(0.5))
    assert order == [0.5, 5]
    assert loop.time() == 3000


def test_a_simulation_in_which_all_wait_for_each_other_is_an_error():
    """A lock that nobody gives back must not look like an end."""

    async def never(loop):
        await loop.create_future()

    with pytest.raises(RuntimeError, match="no timer is left"):
        virtual.run(never)


def test_what_a_callback_raises_ends_the_simulation():
    """A loop would log it, and go on with wrong figures."""

    async def broken(loop):
        loop.call_later(1, lambda: 1 / 0)
        await asyncio.sleep(2)

    with pytest.raises(ZeroDivisionError):
        virtual.run(broken)


# -- the machine


async def ends(loop, pieces):
    """Return when each piece of work has ended."""

    async def end(piece):
        await piece
        return loop.time()

    return await asyncio.gather(*(end(piece) for piece in pieces))


@in_virtual_time
async def test_cores_are_shared_evenly(loop):
    """Three pieces on two cores; when the short one has gone, the others have a core each."""
    cores = Cores(loop, 2)
    assert await ends(loop, [cores.work(2), cores.work(1), cores.work(2)]) == pytest.approx([2.5, 1.5, 2.5])


@in_virtual_time
async def test_threads_of_others_take_their_share(loop):
    """Two of them beside one of ours, on two cores."""
    cores = Cores(loop, 2, others=2)
    assert await ends(loop, [cores.work(1)]) == pytest.approx([1.5])


@in_virtual_time
async def test_a_process_does_one_thing_at_a_time(loop):
    """However many cores there are."""
    thread = Thread(loop, Cores(loop, 8))
    assert await ends(loop, [thread.work(1), thread.work(1, 0.5), thread.work(1)]) == pytest.approx([1, 2.5, 3])


@in_virtual_time
async def test_what_waits_for_its_turn_is_less_to_compute(loop):
    """A turn of a real loop looks for messages once for all that it does."""
    thread = Thread(loop, Cores(loop, 8), batched=0.5)
    assert await ends(loop, [thread.work(1), thread.work(1)]) == pytest.approx([1, 1.5])


def test_costs_in_the_middle():
    """What was measured before and after: a machine's pace drifts."""
    twice = replace(COSTS, client=replace(COSTS.client, end=9e-4), spread=0.4)
    middle = Costs.mean([COSTS, twice])
    assert middle.client.end == pytest.approx(6e-4)
    assert (middle.client.start, middle.spread) == pytest.approx((1e-4, 0.2))


def test_the_same_work_takes_more_or_less_time():
    """And on average what was measured."""
    chance, costs = random.Random(1), replace(COSTS, spread=0.4)
    drawn = [costs.drawn(1.0, chance) for _ in range(10_000)]
    assert statistics.mean(drawn) == pytest.approx(1.0, rel=0.02)
    assert statistics.stdev(drawn) == pytest.approx(0.4, rel=0.05)
    assert COSTS.drawn(1.0, chance) == 1.0


# -- the database


def server(loop, **settings):
    """Return one that takes no time to compute."""
    return Server(loop, Cores(loop, 1), Settings(**settings), random.Random(1))


def begin(server, level="SERIALIZABLE", lock_wait=None):
    """Begin a transaction with a snapshot of now."""
    transaction = Transaction(level)
    transaction.lock_wait = lock_wait
    server.see(transaction)
    return transaction


async def outcome_of(updating):
    """Return None, or the code it was refused with."""
    try:
        await updating
    except DatabaseError as error:
        return error.sqlstate
    return None


@in_virtual_time
async def test_a_row_goes_to_who_has_waited_longest(loop):
    """READ COMMITTED, where each goes on with what the one before has written."""
    database, order = server(loop), []

    async def add(number):
        await asyncio.sleep(number / 1000)
        transaction = begin(database, "READ COMMITTED")
        await database.update(transaction, 1, 1)
        order.append(number)
        await asyncio.sleep(0.1)
        database.commit(transaction)

    await asyncio.gather(*(add(number) for number in (2, 0, 3, 1)))
    assert (order, database.rows[1].value, database.commits) == ([0, 1, 2, 3], 4, 4)


@pytest.mark.parametrize("level", SNAPSHOTS)
@in_virtual_time
async def test_the_first_committer_wins(loop, level):
    """With a snapshot all who wait are refused at once when it commits; after a rollback the next one has the row."""
    for commits, codes, value in ((True, ["40001", "40001"], 1), (False, [None, "40001"], 1)):
        database = server(loop)
        first, *others = (begin(database, level) for _ in range(3))
        await database.update(first, 1, 1)
        waiting = [asyncio.ensure_future(outcome_of(database.update(one, 1, 1))) for one in others]
        await asyncio.sleep(0.2)
        (database.commit if commits else database.roll_back)(first)
        if not commits:
            assert await waiting[0] is None
            database.commit(others[0])
        began = loop.time()
        assert await asyncio.gather(*waiting) == codes
        assert (loop.time(), database.rows[1].value) == (began, value)


@pytest.mark.parametrize("level", SNAPSHOTS)
@in_virtual_time
async def test_what_was_committed_since_the_snapshot_cannot_be_changed(loop, level):
    """It is refused without any wait."""
    database = server(loop)
    late, quick = begin(database, level), begin(database, level)
    await database.update(quick, 1, 1)
    database.commit(quick)
    assert await outcome_of(database.update(late, 1, 1)) == "40001"
    assert database.rows[1].holder is None


async def cross(database, lock_wait=None):
    """Let two transactions want each other's row; return what became of them."""
    one, two = begin(database, lock_wait=lock_wait), begin(database, lock_wait=lock_wait)
    await database.update(one, 1, 1)
    await database.update(two, 2, 1)
    return await asyncio.gather(outcome_of(database.update(one, 2, 1)), outcome_of(database.update(two, 1, 1)))


@in_virtual_time
async def test_a_deadlock_costs_deadlock_timeout(loop):
    """The first who looks is refused, and the other one goes on."""
    assert await cross(server(loop, deadlock_timeout=0.7)) == ["40P01", None]
    assert loop.time() == pytest.approx(0.7)


@in_virtual_time
async def test_a_lock_timeout_ends_the_wait_before(loop):
    """What the gate asks for."""
    assert "55P03" in await cross(server(loop), lock_wait=0.05)
    assert loop.time() == pytest.approx(0.05)


@in_virtual_time
async def test_the_first_in_the_queue_counts_anew(loop):
    """As on PostgreSQL, where who waits behind others waits for the row first, and for its holder's end then."""
    database = server(loop)
    holder, first, second = begin(database), begin(database, lock_wait=0.5), begin(database, lock_wait=0.6)
    await database.update(holder, 1, 1)
    waiting = [asyncio.ensure_future(outcome_of(database.update(one, 1, 1))) for one in (first, second)]
    assert await asyncio.gather(*waiting) == ["55P03", "55P03"]
    assert loop.time() == pytest.approx(0.5 + 0.6)


@pytest.mark.parametrize("level", SNAPSHOTS)
def test_who_reads_what_the_other_one_writes_cannot_both_commit(level):
    """A small table is read wholly by each statement; snapshots alone let that pass."""

    async def main(loop):
        database = server(loop, scans=True)
        one, two = begin(database, level), begin(database, level)
        await database.update(one, 1, 1)
        second = await outcome_of(database.update(two, 2, 1))
        codes = [second]
        for transaction in (one, two):
            if not transaction.over:
                try:
                    database.commit(transaction)
                except DatabaseError as error:
                    codes.append(error.sqlstate)
        return codes

    assert ("40001" in virtual.run(main)) == (level == "SERIALIZABLE")


@in_virtual_time
async def test_rows_of_a_large_table_are_read_alone(loop):
    """Through the index, rows have nothing to do with each other, unless updates write a page of it that both have read."""
    for index_writes, refused in ((0.0, False), (1.0, True)):
        database = server(loop, index_writes=index_writes)
        transactions = [begin(database), begin(database)]
        codes = [
            await outcome_of(database.update(one, key + more, 1))
            for more in (0, 2)
            for key, one in enumerate(transactions, start=1)
            if not one.over
        ]
        for one in transactions:
            if not one.over:
                try:
                    database.commit(one)
                except DatabaseError as error:
                    codes.append(error.sqlstate)
        assert ("40001" in codes) == refused


@in_virtual_time
async def test_a_pool_has_so_many_connections_and_a_server_too(loop):
    """Who finds none free waits for its time; who finds the server full is told."""
    database = server(loop, max_connections=3)
    one, other = Pool(database, 2, timeout=5), Pool(database, 2, timeout=5)
    for _ in range(2):
        await one.take(0.01)
    with pytest.raises(PoolTimeoutError):
        await one.take(0.01)
    assert loop.time() == pytest.approx(5.02)
    await other.take(0.01)
    with pytest.raises(DatabaseError, match="53300"):
        await other.take(0.01)
    one.give_back()
    await one.take(0.01)  # made before: the server is not asked
    assert database.connections == 3


# -- all of it


@pytest.mark.parametrize("side", SIDES)
def test_what_callers_saw_committed_is_what_the_server_has(side):
    """No call is lost or counted twice, and money is kept."""
    played = play(Situation(**{**vars(FOUR), "build": SIDES[side], "warm_up": 0.0, "slices": 1}))
    assert sum(row.value for row in played.server.rows.values()) == 0
    assert all(row.holder is None and not row.queue for row in played.server.rows.values())
    assert sum(len(meter.latencies) for meter in played.meters) == played.server.commits > 0
    assert sum(side.runs for side in played.sides) == played.server.commits + sum(played.server.errors.values())


def test_the_same_seed_gives_the_same(caplog):
    """To the last digit; another one does not."""
    caplog.set_level("CRITICAL", logger="sqla_uow")
    small = {**vars(FOUR), "processes": 2, "warm_up": 0.0, "slices": 1}
    again = [simulate(Situation(**{**small, "seed": seed})) for seed in (7, 7, 8)]
    assert again[0] == again[1] != again[2]


def test_the_gate_of_the_library_is_in_it(caplog):
    """Ten rows, four processes: without turns the same decorator collapses, as it does in reality."""
    caplog.set_level("CRITICAL", logger="sqla_uow")
    turns = play(FOUR)
    collapsed = play(Situation(**{**vars(FOUR), "build": functools.partial(Ours, contention="off")}))
    assert turns.outcome.commits > 5 * collapsed.outcome.commits
    assert turns.outcome.attempts < collapsed.outcome.attempts
    states = [side.manager.contention(side.transfer) for side in turns.sides]
    assert all(state.width is not None and state.width <= 8 for state in states)


@pytest.mark.parametrize("rows", [10, 40])
def test_four_functions_commit_as_much_as_one(caplog, rows):
    """R14: one process of 24 workers, all on the same rows: the four are one group, and nobody gives up."""
    caplog.set_level("CRITICAL", logger="sqla_uow")
    alone = Situation(
        cell=Cell(rows, 0, 24), processes=1, costs=COSTS, settings=Settings(scans=True), slices=1, pause=0.0
    )
    one, four = (simulate(Situation(**{**vars(alone), "cell": Cell(rows, 0, 24, four=four)})) for four in (False, True))
    assert four.commits >= 0.9 * one.commits
    assert (one.gave_up, four.gave_up) == (0.0, 0.0)


def test_the_budget_of_the_library_is_in_it(caplog):
    """A server that is full refuses: at ten retries a second and engine, and never more than six runs a call."""
    caplog.set_level("CRITICAL", logger="sqla_uow")
    seconds = 10.0
    full = Situation(
        cell=Cell(1000, 1, 4), processes=2, costs=COSTS, settings=Settings(max_connections=4),
        warm_up=0.0, slices=1, length=seconds,
    )  # fmt: skip
    played = play(full)
    # Who was first may have all the connections.
    refused = [seen for side in played.sides if (seen := side.manager.statistics()).retries]
    assert played.server.connections == 4
    assert refused
    for one in refused:
        earned = PER_SECOND * seconds + PER_CALL * one.begun
        # What was saved up at first may be left; a second's may be owed, and one more is earned to the end of the last call.
        assert earned <= one.retries["not started", "53300"] + LARGEST <= earned + 2 * LARGEST + 2 * PER_SECOND
