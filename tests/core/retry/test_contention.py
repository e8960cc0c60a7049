"""R10, R14: how many calls of a group run at once, and which functions are one."""

from __future__ import annotations

import asyncio
import gc
import heapq
import itertools
import random
import weakref

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from sqla_uow import RetryPolicy, UnitOfWorkManager, current_session, current_unit, errors, transactional
from sqla_uow._retry import controller as _contention
from sqla_uow._retry.controller import Controller, _Rate
from sqla_uow._retry.gate import ANY, Entry, _too_late
from sqla_uow._unit.statistics import name_of
from sqla_uow.typing import Contention
from tests.kit.models import Account
from tests.kit.queueing import narrow
from tests.kit.waiting import until

OFF = RetryPolicy(contention="off")


class Simulation:
    """So many workers call one function without a pause; an attempt beside others is in a conflict now and then."""

    def __init__(self, workers, conflicts, *, stall=0.0, others=0, seed=1):
        self.now = 0.0
        self.controller = Controller(lambda: self.now)
        self.conflicts = conflicts  # probability for each other attempt that runs
        self.stall = stall  # seconds that a conflict takes
        self.others = others  # attempts that run in other processes
        self.outside = 0.0  # probability of a conflict with what is not this function's
        self.waiting = workers
        self.paused = False  # nobody calls any more
        self.commits = []
        self._random = random.Random(seed)
        self._ends = []
        self._numbers = itertools.count()

    def run(self, seconds):
        """Go on for so long; return the commits a second."""
        until, before = self.now + seconds, len(self.commits)
        self._start()
        while self._ends and self._ends[0][0] <= until:
            self.now, _number, began, conflict = heapq.heappop(self._ends)
            self.waiting += 1
            tell = self.controller.conflicted if conflict else self.controller.committed
            tell(began, self.now - began, len(self._ends), 0 if self.paused else self.waiting)
            if not conflict:
                self.commits.append(self.now)
            self._start()
        self.now = until
        return (len(self.commits) - before) / seconds

    def _start(self):
        while self.waiting and not self.paused and len(self._ends) < self.controller.width:
            self.waiting -= 1
            beside = (1 - self.conflicts) ** (len(self._ends) + self.others) * (1 - self.outside)
            conflict = self._random.random() > beside
            seconds = 0.002 + (self.stall if conflict else 0.0)
            heapq.heappush(self._ends, (self.now + seconds, next(self._numbers), self.now, conflict))


def test_without_conflicts_nothing_is_held_back():
    """R10, R14: from the first call on; and after a while the group is not needed any more."""
    simulation = Simulation(workers=32, conflicts=0.0)
    assert simulation.run(1.0) == pytest.approx(32 / 0.002, rel=0.01)
    assert (simulation.controller.width, simulation.controller.calm) == (float("inf"), False)
    simulation.run(2.0)
    assert simulation.controller.calm


@pytest.mark.parametrize("stall", [0.0, 0.05, 1.0])
def test_where_nothing_goes_side_by_side_calls_take_turns(stall):
    """R10: every second attempt beside another one is in a conflict; one at a time would do 500 a second."""
    simulation = Simulation(workers=32, conflicts=0.9, stall=stall)
    simulation.run(4.0)
    assert simulation.run(10.0) >= 0.8 * 500


@pytest.mark.parametrize("conflicts", [0.002, 0.02, 0.1])
def test_the_width_that_brings_most_is_found(conflicts):
    """R10: with some conflicts the best is in between, and is not missed by much."""
    best = max(fixed(width, conflicts).run(10.0) for width in (1, 2, 4, 8, 16, 32))
    simulation = Simulation(workers=32, conflicts=conflicts, stall=0.02)
    simulation.run(3.0)
    assert simulation.run(20.0) >= 0.8 * best


def fixed(width, conflicts, stall=0.02):
    """Return a simulation whose width does not change."""
    simulation = Simulation(workers=32, conflicts=conflicts, stall=stall)
    simulation.controller.committed = simulation.controller.conflicted = lambda *_args: None
    simulation.controller.width = width
    return simulation


def test_few_dear_conflicts_narrow_nothing():
    """R10: a deadlock now and then costs a second, and still most is done side by side."""
    wide = fixed(float("inf"), 0.0001, stall=1.0).run(20.0)
    simulation = Simulation(workers=32, conflicts=0.0001, stall=1.0)
    simulation.run(2.0)
    assert simulation.run(20.0) >= 0.93 * wide


@pytest.mark.parametrize("contended", [0.5, 5.0, 60.0])
def test_after_a_burst_the_full_width_is_back(contended):
    """R10: conflicts, then none: within 100 calls or one second nobody is held back any more."""
    simulation = Simulation(workers=32, conflicts=0.9, stall=0.02)
    simulation.run(contended)
    assert simulation.controller.width <= 4
    simulation.conflicts = 0.0
    simulation.run(1.0)
    assert simulation.controller.width >= 32


def test_with_other_processes_in_the_way_no_call_runs_beside_another():
    """R10: with conflicts in every tenth pair, more at once bring more here, but only by taking it from the others."""
    crowded = fixed(8, 0.1)
    crowded.others = 3
    assert crowded.run(10.0) > 1.5 * one_at_a_time(others=3)
    simulation = Simulation(workers=8, conflicts=0.1, stall=0.02, others=3)
    simulation.run(3.0)
    assert simulation.run(10.0) == pytest.approx(one_at_a_time(others=3), rel=0.35)
    assert (simulation.controller.crowded, simulation.controller.width) == (True, 1)


@pytest.mark.parametrize("seed", range(20))
def test_when_the_other_processes_are_gone_the_full_width_is_back(seed):
    """R10: also where the last try was dear because of them, and the next one is seconds away."""
    simulation = Simulation(workers=8, conflicts=0.1, stall=0.02, others=3, seed=seed)
    simulation.run(13.0)
    assert simulation.controller.crowded
    simulation.others, simulation.conflicts = 0, 0.0
    simulation.run(1.0)
    assert simulation.controller.width >= 8


def one_at_a_time(others):
    """Return what that brings beside so many attempts in other processes."""
    alone = fixed(1, 0.1)
    alone.others = others
    return alone.run(10.0)


def test_conflicts_that_turns_do_not_prevent_narrow_nothing():
    """R10: three in ten attempts meet somebody else's, however few run; one at a time brings a thirtieth."""
    wide = fixed(float("inf"), 0.0)
    simulation = Simulation(workers=32, conflicts=0.0, stall=0.02)
    wide.outside = simulation.outside = 0.3
    simulation.run(5.0)
    assert simulation.run(10.0) >= 0.4 * wide.run(10.0)


def test_who_is_alone_is_not_helped_by_turns():
    """R10: the conflicts of a single worker come from somewhere else."""
    simulation = Simulation(workers=1, conflicts=0.0)
    for _ in range(50):
        simulation.controller.conflicted(0.0, 0.002, 0, 0)
    assert simulation.controller.width == float("inf")


def test_idle_time_does_not_count():
    """R10: nobody called for a minute; that says nothing of the width in force."""
    simulation = Simulation(workers=32, conflicts=0.9, stall=0.02)
    simulation.run(5.0)
    before = simulation.controller._measured[0].goodput
    simulation.paused = True
    simulation.run(60.0)
    simulation.paused = False
    simulation.run(1.0)
    assert simulation.controller._measured[0].goodput == pytest.approx(before, rel=0.2)


def test_who_waits_to_be_run_again_is_not_gone():
    """R10: where all others back off, now and then nobody runs; that is no pause, and the conflicts count."""
    now = 0.0
    controller = Controller(lambda: now)
    controller.opening = False
    controller._go(_contention.FREE)
    widths = set()
    for number in range(400):
        now += 0.005
        controller.conflicted(now - 0.002, 0.002, number % 2, 0)
        widths.add(controller.width)
    assert 1 in widths
    assert controller.wasted_share == 1.0


def test_attempts_of_the_width_before_do_not_count():
    """R10: 31 of them end in conflicts while one call runs at a time; that says nothing of turns."""
    now = 0.0
    controller = Controller(lambda: now)
    controller.opening = False
    controller._go(_contention.FREE)
    began, now = now, 1.0
    controller._hold(0)
    for number in range(31):
        controller.conflicted(began, 1.0, 31 - number, 32)
    for _ in range(16):
        now += 0.002
        controller.committed(now - 0.002, 0.002, 0, 32)
    assert (controller.wasted_share, controller.crowded, controller._measured[0].goodput) == (
        0.0,
        False,
        pytest.approx(500),
    )


@pytest.mark.parametrize("opening", [True, False])
def test_attempts_beside_those_of_the_width_before_do_not_count(opening):
    """R10: who waits for locks of calls that a wider width had let in says nothing of turns, at the start either."""
    now = 0.0
    controller = Controller(lambda: now)
    controller.opening = opening
    if not opening:
        controller._go(_contention.FREE)
    now = 1.0
    controller.opening = False
    controller._hold(0)
    now = 1.1
    controller.conflicted(0.5, 0.6, 1, 32)  # of the width before
    controller.conflicted(1.02, 0.08, 0, 32)  # beside it
    for _ in range(16):
        now += 0.002
        controller.committed(now - 0.002, 0.002, 0, 32)
    assert (controller.crowded, controller._measured[0].goodput) == (False, pytest.approx(500))


def test_a_call_that_goes_on_for_long_does_not_keep_others_from_counting():
    """R10: one that began at a wider width and takes a minute is no reason to know nothing of the narrower one."""
    now = 0.0
    controller = Controller(lambda: now)
    controller.opening = False
    controller._go(_contention.FREE)
    now = 1.0
    controller._hold(0)
    now = 3.0
    for number in range(16):
        now += 0.002
        controller.conflicted(number / 100, 3.0, 1, 32)
        controller.committed(now - 0.001, 0.002, 1, 32)
        now += 0.001
        controller.conflicted(number / 100, 3.0, 1, 32)
    assert controller._measured[0].goodput > 0


@pytest.mark.drivers("sqlite")
def test_a_turn_that_comes_with_the_deadline(driver):
    """R10: who has it keeps it."""
    loop = asyncio.new_event_loop()
    turn = loop.create_future()
    turn.set_result(Entry.IN)
    _too_late(turn)
    assert turn.result() is Entry.IN
    loop.close()


@pytest.mark.drivers("sqlite")
def test_a_narrower_width_that_brings_more_leads_on(driver):
    """R10: while time is wasted, the next one down is tried at once."""
    controller = Controller(lambda: 1.0)
    controller._best, controller._rung = 3, 2
    controller._measured[3] = _Rate().then(10, 1.0, 0.0)
    controller._compare(1.0, 1.0, 100, 0.9, held_back=True)
    assert (controller._best, controller._rung) == (2, 1)


# -- the gate, in front of real units


class Busy:
    """A function whose calls wait for `let_go`, and tell the order in which they came in."""

    def __init__(self, manager, **options):
        self.order, self.let_go, self.came = [], asyncio.Event(), asyncio.Event()

        @transactional(using=manager, retries=1, **options)
        async def call(number):
            self.order.append(number)
            self.came.set()
            await self.let_go.wait()

        self.call = call


async def waiting(manager, function, count):
    """Wait until so many calls wait for their turn."""
    await until(lambda: manager.contention(function).waiting == count, seconds=5, pause=0)


@pytest.fixture
def manager(db):
    """Return one over a fresh database."""
    return UnitOfWorkManager(db.engine())


@pytest.fixture
def no_stall(monkeypatch):
    """Let nobody in for the time alone that others take."""
    monkeypatch.setattr("sqla_uow._retry.gate.STALL_SECONDS", 60.0)


one_driver = pytest.mark.drivers("sqlite")  # what is about no database


@one_driver
async def test_first_come_first_served(manager):
    """R10: in the order in which they were called; and `contention` tells how many run and wait."""
    busy = Busy(manager)
    assert manager.contention(busy.call) == Contention(width=None, running=0, waiting=0, wasted=0.0)
    narrow(manager, busy.call)
    calls = [asyncio.create_task(busy.call(number)) for number in range(5)]
    await waiting(manager, busy.call, 4)
    assert manager.contention(busy.call) == Contention(width=1, running=1, waiting=4, wasted=0.0)
    busy.let_go.set()
    await asyncio.gather(*calls)
    assert busy.order == [0, 1, 2, 3, 4]
    assert manager.contention(busy.call).running == manager.contention(busy.call).waiting == 0


@one_driver
@pytest.mark.parametrize("let_in", [False, True])
async def test_a_cancelled_call_leaves_its_place_to_the_next(manager, let_in):
    """R10: while it waits, and in the very turn of the loop in which it is let in."""
    busy = Busy(manager)
    busy.let_go.set()
    gate = narrow(manager, busy.call)
    assert gate.try_enter(ANY)
    calls = [asyncio.create_task(busy.call(number)) for number in range(2)]
    await waiting(manager, busy.call, 2)
    if let_in:
        gate.left(0.0, 0.0, ANY, committed=False)
    calls[0].cancel()
    if not let_in:
        gate.left(0.0, 0.0, ANY, committed=False)
    assert [type(one) for one in await asyncio.gather(*calls, return_exceptions=True)] == [
        asyncio.CancelledError,
        type(None),
    ]
    assert busy.order == [1]
    assert gate.state()[1:3] == (0, 0)


@one_driver
async def test_the_deadline_counts_while_a_call_waits(manager):
    """R10, R6: it holds no connection meanwhile."""
    busy = Busy(manager, timeout=0.1)
    gate = narrow(manager, busy.call)
    assert gate.try_enter(ANY)
    with pytest.raises(errors.TransactionTimeoutError) as caught:
        await busy.call(1)
    assert "its turn to run did not come in attempt 1" in str(caught.value)
    assert (busy.order, manager.engine.pool.checkedout(), gate.state()[1:3]) == ([], 0, (1, 0))
    gate.left(0.0, 0.0, ANY, committed=True)
    busy.let_go.set()
    await busy.call(2)
    assert busy.order == [2]


@one_driver
async def test_a_call_from_within_does_not_wait_for_itself(manager):
    """R10: recursion, requires_new and a hook that calls the same function."""
    runs = []

    @transactional(using=manager, retries=1, propagation="requires_new")
    async def call(depth):
        runs.append(depth)
        if depth == 2:
            current_unit(manager).after_commit(call, 0)
        if depth:
            await call(depth - 1)

    narrow(manager, call)
    async with asyncio.timeout(5):
        await call(2)
    assert runs == [2, 1, 0, 0]


@one_driver
async def test_calls_that_wait_for_each_other_come_through(manager):
    """R10: bodies that meet at a barrier; turns are no lock, and nobody knows what a body waits for."""
    barrier = asyncio.Barrier(16)

    @transactional(using=manager, retries=1)
    async def call():
        await barrier.wait()

    async with asyncio.timeout(5):
        await asyncio.gather(*(call() for _ in range(16)))


def test_attempts_may_be_made_where_no_loop_runs():
    """R10: as `UnitOfWorkMiddleware` does to have its options checked."""
    manager = UnitOfWorkManager(create_async_engine("sqlite+aiosqlite://"))
    manager.attempts(retries=5)
    assert manager._setup.groups.everywhere() == []


@one_driver
async def test_a_call_that_cannot_begin_leaves_its_turn_to_others(manager):
    """R10: outside any task there is nobody who could use a unit."""
    busy = Busy(manager)
    caught = []

    def call():
        with pytest.raises(errors.TaskBoundaryError, match="outside any task"):
            busy.call(1).send(None)
        caught.append(manager.contention(busy.call).running)

    asyncio.get_running_loop().call_soon(call)
    await until(lambda: caught, seconds=5, pause=0)
    assert caught == [0]


@one_driver
async def test_off_means_off(manager):
    """R10: no group is looked for."""
    busy = Busy(manager, retry=OFF)
    calls = [asyncio.create_task(busy.call(number)) for number in range(5)]
    await until(lambda: len(busy.order) == 5, seconds=5, pause=0)
    busy.let_go.set()
    await asyncio.gather(*calls)
    assert manager._setup.groups.everywhere() == []


@one_driver
async def test_a_gate_where_nobody_waits_comes_to_rest(manager, monkeypatch):
    """R10: who lets the next one in for the time alone looks once more, finds nobody, and wakes the loop no longer."""
    monkeypatch.setattr("sqla_uow._retry.gate.STALL_SECONDS", 0.01)
    gate = narrow(manager, Busy(manager).call)
    gate._watch()
    assert gate._timer is not None
    await until(lambda: gate._timer is None, seconds=5)


@pytest.mark.drivers("asyncpg", "psycopg")
async def test_how_long_a_lock_is_waited_for_is_left_to_chance(db):
    """R10: two with the same patience would both give way, and meet again."""
    asked, runs, let_go = [], asyncio.Event(), asyncio.Event()

    def rng(low, high):
        asked.append((low, high))
        return low

    manager = UnitOfWorkManager(db.engine(pool_size=2))

    @transactional(using=manager, retries=1, retry=RetryPolicy(rng=rng))
    async def call(*, waits):
        limit = await current_session(manager).scalar(text("SHOW lock_timeout"))
        if waits:
            runs.set()
            await let_go.wait()
        return limit

    groups = manager._setup.groups.here()
    groups.conflict(groups.member(call.__transactional__, name_of), None, manager.retry.clock)
    first = asyncio.create_task(call(waits=True))
    async with asyncio.timeout(5):
        await runs.wait()
        limit = await call(waits=False)
        let_go.set()
        assert await first == "0"
    assert asked == [(0.125, 0.25)]
    assert limit == "125ms"


@one_driver
async def test_what_is_known_of_a_function_goes_with_it(manager):
    """R10: decorated anew for each request, as closures are, they leave nothing behind."""
    for _ in range(50):
        busy = Busy(manager)
        busy.let_go.set()
        await busy.call(1)
    gone = weakref.ref(busy.call)
    del busy
    gc.collect()
    assert gone() is None
    assert manager._setup.groups.here()._of_functions.data == {}


@one_driver
@pytest.mark.usefixtures("no_stall")
async def test_with_other_processes_in_the_way_the_whole_process_backs_off(manager):
    """R10: nobody begins while a failed attempt waits to be run again; without them, the next one does."""
    for crowded, order in ((True, [1, 1, 2]), (False, [1, 2, 1])):
        backing_off, go_on, began = asyncio.Event(), asyncio.Event(), []

        async def sleep(_seconds, backing_off=backing_off, go_on=go_on):
            backing_off.set()
            await go_on.wait()

        @transactional(using=manager, retries=1, retry=RetryPolicy(sleep=sleep), retry_on=is_value_error)
        async def call(number, began=began):
            began.append(number)
            if began == [1]:
                raise ValueError(number)

        narrow(manager, call).controller.crowded = crowded
        calls = [asyncio.create_task(call(number)) for number in (1, 2)]
        async with asyncio.timeout(5):
            await backing_off.wait()
            if not crowded:
                await calls[1]
            go_on.set()
            await asyncio.gather(*calls)
        assert began == order


def is_value_error(error):
    """Say what is worth another try."""
    return isinstance(error, ValueError)


@one_driver
@pytest.mark.usefixtures("no_stall")
async def test_who_is_cancelled_while_the_process_backs_off_lets_the_next_one_in(manager):
    """R10: the turn is not lost."""
    backing_off = asyncio.Event()

    async def sleep(_seconds):
        backing_off.set()
        await asyncio.Event().wait()

    began = []

    @transactional(using=manager, retries=1, retry=RetryPolicy(sleep=sleep), retry_on=is_value_error)
    async def call(number):
        began.append(number)
        if number == 1:
            raise ValueError(number)

    narrow(manager, call).controller.crowded = True
    first, second = (asyncio.create_task(call(number)) for number in (1, 2))
    async with asyncio.timeout(5):
        await backing_off.wait()
        await waiting(manager, call, 1)
        assert began == [1]
        first.cancel()
        await second
    assert (first.cancelled(), began) == (True, [1, 2])


SERVERS = pytest.mark.drivers("asyncpg", "asyncmy")


@SERVERS
@pytest.mark.parametrize("contention", ["off", "auto"])
@pytest.mark.usefixtures("quick_deadlocks")
async def test_transfers_between_three_rows(db, contention):
    """R10: the control spends most of its attempts on conflicts; in turns hardly any, and no one gives up."""
    for key in range(3):
        await db.run("INSERT INTO account (id, balance) VALUES (:key, 0)", key=key)
    manager = UnitOfWorkManager(db.engine(pool_size=16))
    attempts, failed, widths = [], [], set()
    # Long enough for the start, in which the width is still looked for, to weigh little; the control has no such start.
    turns = 60 if contention == "auto" else 12

    @transactional(
        using=manager, retries=40, isolation="SERIALIZABLE", retry=RetryPolicy(cap=0.05, contention=contention)
    )
    async def transfer(payer, payee):
        attempts.append(payer)
        session = current_session(manager)
        for key, amount in ((payer, -1), (payee, 1)):
            account = await session.get_one(Account, key)
            account.balance += amount
            await session.flush()

    async def worker(number):
        for turn in range(turns):
            try:
                await transfer((number + turn) % 3, (number + turn + 1 + turn % 2) % 3)
            except errors.ConflictError as error:
                failed.append(error)
            widths.add(manager.contention(transfer).width)

    await asyncio.gather(*(worker(number) for number in range(16)))
    assert await db.scalar("SELECT sum(balance) FROM account") == 0
    commits = 16 * turns - len(failed)
    wasted = len(attempts) - commits
    if contention == "off":
        assert wasted > commits
    else:
        assert (failed, 1 in widths) == ([], True)
        assert wasted < commits / 2


@pytest.mark.drivers("asyncpg")
@pytest.mark.usefixtures("quick_deadlocks")
async def test_transfers_in_four_processes(db):
    """R10: four managers know as little of each other as processes do; each finds out, and waits as a whole."""
    for key in range(3):
        await db.run("INSERT INTO account (id, balance) VALUES (:key, 0)", key=key)
    managers = [UnitOfWorkManager(db.engine(pool_size=4)) for _ in range(4)]

    async def attempts_per_commit(contention, turns):
        attempts, attempts_so_far, crowded = [], [], set()
        policy = RetryPolicy(cap=0.05, contention=contention)

        @transactional(retries=1000, isolation="SERIALIZABLE", retry=policy)
        async def transfer(payer, payee):
            attempts.append(payer)
            for key, amount in ((payer, -1), (payee, 1)):
                account = await current_session().get_one(Account, key)
                account.balance += amount
                await current_session().flush()

        async def worker(number):
            manager = managers[number % 4]
            with manager.activate():
                for turn in range(turns):
                    await transfer((number + turn) % 3, (number + turn + 1 + turn % 2) % 3)
                    attempts_so_far.append(len(attempts))
                    if contention == "auto" and any(
                        group.gate.controller.crowded for group in manager._setup.groups.here().hot
                    ):
                        crowded.add(number % 4)

        await asyncio.gather(*(worker(number) for number in range(16)))
        half = len(attempts_so_far) // 2  # the first is the search for a width, which takes some two hundred commits
        return (attempts_so_far[-1] - attempts_so_far[-half - 1]) / half, crowded

    off, _ = await attempts_per_commit("off", 12)
    auto, crowded = await attempts_per_commit("auto", 40)
    assert crowded == {0, 1, 2, 3}
    assert off > 2
    assert auto < off  # 0.4 to 0.9 of it; 1.1 to 1.9 where the others are not noticed
    assert await db.scalar("SELECT sum(balance) FROM account") == 0


async def test_what_is_rolled_back_is_no_progress(db, monkeypatch):
    """R10: the width follows the commits alone."""
    manager, commits, committed = UnitOfWorkManager(db.engine()), [], Controller.committed

    def note(self, *arguments):
        commits.append(self)
        committed(self, *arguments)

    monkeypatch.setattr(Controller, "committed", note)  # what it makes of them, the simulations above show

    @transactional(using=manager, retries=1)
    async def work(*, fails):
        await current_session(manager).execute(text("SELECT 1"))
        if fails:
            raise KeyError

    narrow(manager, work)
    await work(fails=False)
    with pytest.raises(KeyError):
        await work(fails=True)
    assert len(commits) == 1
