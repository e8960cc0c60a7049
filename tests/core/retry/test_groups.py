"""R14: which functions take turns with each other, and who waits for nobody."""

from __future__ import annotations

import asyncio
import logging

import pytest
from sqlalchemy import text

from sqla_uow import RetryPolicy, UnitOfWorkManager, current_session, errors, transactional
from sqla_uow._retry.gate import ANY
from sqla_uow._retry.groups import Groups
from sqla_uow._retry.tables import tables_of
from sqla_uow.typing import Contention
from tests.kit.queueing import narrow
from tests.kit.waiting import until

one_driver = pytest.mark.drivers("sqlite")  # what is about no database
ACCOUNT = "UPDATE account SET balance = 1 WHERE id = 1"
ORDERS = "UPDATE orders SET state = 'x' WHERE id = 1"


@one_driver
@pytest.mark.parametrize(
    ("statement", "changed", "inserted", "read"),
    [
        ("UPDATE account SET balance = balance - 1 WHERE id = $1", {"account"}, set(), set()),
        ('UPDATE ONLY shop."Account" SET x = 1 FROM other o WHERE o.id = 1', {"account"}, set(), {"other"}),
        ("DELETE FROM `a`.`line` WHERE note = 'UPDATE other SET'", {"line"}, set(), set()),
        ("INSERT INTO copy (x) SELECT x FROM original", set(), {"copy"}, {"original"}),
        ("INSERT INTO a (x) VALUES (1) ON CONFLICT (x) DO UPDATE SET x = 1", {"a"}, set(), set()),
        ("INSERT INTO a VALUES (1) ON DUPLICATE KEY UPDATE b = 1", {"a"}, set(), set()),
        ("SELECT a.x FROM account AS a, orders o JOIN line ON 1 = 1", set(), set(), {"account", "orders", "line"}),
        ("SELECT a.x FROM account AS a JOIN line ON 1 = 1 FOR UPDATE OF a", {"account", "line"}, set(), set()),
        ("SELECT 1 -- FROM account", set(), set(), set()),
        ("WITH gone AS (DELETE FROM line RETURNING id) SELECT id FROM gone", {"line"}, set(), {"gone"}),
    ],
)
def test_tables_are_found_in_the_text(statement, changed, inserted, read):
    """Those of text() and those that SQLAlchemy has compiled; what stands in quotes is no SQL."""
    assert tables_of(statement) == (changed, inserted, read)


@one_driver
def test_of_a_long_statement_only_the_beginning_is_kept():
    """An INSERT of many rows is megabytes, and there may be hundreds of them."""
    long = "INSERT INTO account VALUES (1)" + ", (1)" * 1_000_000
    assert tables_of(long) == (set(), {"account"}, set())
    assert tables_of("SELECT " + "'" * 4000 + ", " * 1000 + "x FROM account")[0] == set()  # at once, too


class Functions:
    """Functions that meet conflicts, told to the groups as their attempts would."""

    def __init__(self, *names):
        self.groups = Groups()
        self.keys = {name: type(name, (), {})() for name in names}
        self.members = {name: self.groups.member(key, lambda _, name=name: name) for name, key in self.keys.items()}

    def conflict(self, name, statement, times=1):
        for _ in range(times):
            self.members[name].begin()
            self.groups.conflict(self.members[name], statement, asyncio.get_running_loop().time)

    def grouped(self):
        return sorted(list(group.names()) for group in self.groups.hot)


@one_driver
async def test_those_that_meet_conflicts_on_one_table_are_one_group():
    """R14: and two hot groups do not share turns."""
    functions = Functions("pay", "deposit", "ship", "pack")
    for name, statement in (("pay", ACCOUNT), ("deposit", ACCOUNT), ("ship", ORDERS), ("pack", ORDERS)):
        functions.conflict(name, statement, times=3)
    assert functions.grouped() == [["deposit", "pay"], ["pack", "ship"]]


@one_driver
async def test_a_conflict_now_and_then_is_no_reason_to_wait_for_others():
    """R14: one in fifty attempts of `report` meets what `pay` does all the time; it stays outside."""
    functions = Functions("pay", "report")
    functions.conflict("pay", ACCOUNT, times=3)
    for _ in range(10):
        for _ in range(49):
            functions.members["report"].begin()
        functions.conflict("report", ACCOUNT)
    assert functions.grouped() == [["pay"]]


@one_driver
async def test_a_conflict_elsewhere_now_and_then_joins_no_groups():
    """R14: 95 of 100 conflicts of `pay` are on accounts; it does not wait for those that fight for orders."""
    functions = Functions("pay", "ship")
    functions.conflict("ship", ORDERS, times=5)
    for number in range(100):
        functions.conflict("pay", ORDERS if number % 20 == 19 else ACCOUNT)
    assert functions.grouped() == [["pay"], ["ship"]]


@one_driver
async def test_a_function_in_two_groups_makes_them_one():
    """R14: `settle` meets conflicts on both tables; who waits at the gate that is given up waits at the other one."""
    functions = Functions("pay", "ship", "settle")
    functions.conflict("pay", ACCOUNT, times=3)
    functions.conflict("ship", ORDERS, times=3)
    gates = [functions.members[name].group.gate for name in ("pay", "ship")]
    for gate in gates:
        gate.controller._go(0)
        assert gate.try_enter(ANY)
    waiting = [asyncio.create_task(gate.enter(ANY, None, again=False)) for gate in gates]
    await asyncio.sleep(0)
    for _ in range(3):
        functions.conflict("settle", ACCOUNT)
        functions.conflict("settle", ORDERS)
    assert functions.grouped() == [["pay", "settle", "ship"]]
    one = functions.groups.hot[0].gate
    done, _ = await asyncio.wait(waiting, timeout=0.1)
    assert [task.result().name for task in done] == ["MOVED"]
    assert one.state() == Contention(1, 2, 1, 0.0)
    for gate in gates:
        gate.left(0.0, 0.0, ANY, committed=False)
    assert one.state() == Contention(1, 1, 0, 0.0)
    await asyncio.gather(*waiting)


@one_driver
async def test_where_the_failed_statement_is_not_known_it_is_what_the_function_changes():
    """R14: a conflict at COMMIT, or on the driver's own connection."""
    functions = Functions("pay", "deposit", "other")
    functions.conflict("pay", ACCOUNT, times=3)
    for name in ("deposit", "other"):
        functions.members[name].note(f"INSERT INTO log_of_{name} VALUES (1)")
    functions.members["deposit"].note(ACCOUNT)
    functions.conflict("deposit", None, times=3)
    functions.conflict("other", None, times=3)
    assert functions.grouped() == [["deposit", "pay"], ["other"]]


@one_driver
async def test_what_one_reads_and_the_other_writes_is_one_group():
    """R14: write skew, found at COMMIT: each changes what the other has read."""
    functions = Functions("one", "two")
    for name, reads, writes in (("one", "orders", ACCOUNT), ("two", "account", ORDERS)):
        functions.members[name].note(f"SELECT * FROM {reads}")
        functions.members[name].note(writes)
    for _ in range(3):
        functions.conflict("one", None)
        functions.conflict("two", None)
    assert functions.grouped() == [["one", "two"]]


@one_driver
async def test_who_has_failed_often_runs_beside_few_and_at_last_alone():
    """R14: what would make it give up is not let in meanwhile; it waits for those that run, and comes before the others."""
    functions = Functions("pay")
    functions.conflict("pay", ACCOUNT)
    gate = functions.members["pay"].group.gate
    assert all(gate.try_enter(ANY) for _ in range(2))
    assert not gate.try_enter(0)
    order = []

    async def call(name, beside, *, again):
        await gate.enter(beside, None, again=again)
        order.append(name)

    tasks = [asyncio.create_task(call(*one, again=again)) for *one, again in [("a", ANY, False), ("last", 0, True)]]
    await asyncio.sleep(0)
    for left in range(2):
        assert (order, gate.state().running) == ([], 2 - left)
        gate.left(0.0, 0.0, ANY, committed=True)
        await asyncio.sleep(0)
    assert (order, gate.state().waiting) == (["last"], 1)
    gate.left(0.0, 0.0, 0, committed=True)
    await asyncio.gather(*tasks)
    assert order == ["last", "a"]


@one_driver
async def test_whom_nobody_waits_behind_any_more_holds_nobody_back():
    """R14: a last attempt that is cancelled while it waits to be alone lets in those behind it."""
    functions = Functions("pay")
    functions.conflict("pay", ACCOUNT)
    gate = functions.members["pay"].group.gate
    assert gate.try_enter(ANY)
    last = asyncio.create_task(gate.enter(0, None, again=True))
    await asyncio.sleep(0)
    behind = asyncio.create_task(gate.enter(ANY, None, again=False))
    await asyncio.sleep(0)
    assert gate.state() == Contention(None, 1, 2, 0.0)
    last.cancel()
    async with asyncio.timeout(1):
        await behind
    assert gate.state() == Contention(None, 2, 0, 0.0)


@one_driver
async def test_a_fresh_process_holds_nobody_back(db):
    """R14: nothing has ever conflicted; 24 calls meet, which takes all of them at once."""
    manager, barrier = UnitOfWorkManager(db.engine()), asyncio.Barrier(24)

    @transactional(using=manager, retries=5)
    async def call():
        await barrier.wait()

    async with asyncio.timeout(1.5):
        await asyncio.gather(*(call() for _ in range(24)))


@one_driver
async def test_who_meets_no_conflicts_waits_for_nobody(db):
    """R14: while calls of the hot function wait, one that only reads and one without conflicts run."""
    manager, go_on, ran = UnitOfWorkManager(db.engine()), asyncio.Event(), []

    @transactional(using=manager, retries=5)
    async def hot():
        await go_on.wait()
        ran.append("hot")

    @transactional(using=manager, retries=5)
    async def cold():
        ran.append("cold")

    reading = transactional(using=manager, retries=5, read_only=True)(hot.__wrapped__)
    narrow(manager, hot)
    narrow(manager, reading)
    calls = [asyncio.create_task(hot()) for _ in range(2)]
    await until(lambda: manager.contention(hot).waiting == 1, seconds=5, pause=0)
    reads = [asyncio.create_task(reading()) for _ in range(2)]
    async with asyncio.timeout(1.5):
        await cold()
        assert ran == ["cold"]
        go_on.set()
        await asyncio.gather(*reads, *calls)


@one_driver
async def test_when_conflicts_have_become_few_the_group_ends(db):
    """R14: its calls ask for nothing any more, and those that waited go on."""
    manager = UnitOfWorkManager(db.engine())

    @transactional(using=manager, retries=5)
    async def call():
        pass

    gate = narrow(manager, call)
    assert gate.try_enter(ANY)
    waiting = asyncio.create_task(call())
    await until(lambda: manager.contention(call).waiting == 1, seconds=5, pause=0)
    gate.controller.calm = True
    groups = manager._setup.groups.here()
    groups.end(groups.hot[0])
    async with asyncio.timeout(1):
        await waiting
    assert (manager.contention(), manager.contention(call)) == ((), Contention(None, 0, 0, 0.0))
    assert manager.statistics().contention == ()


@pytest.mark.drivers("asyncpg", "psycopg", "asyncmy", "aiomysql")
@pytest.mark.parametrize("contention", ["off", "auto"])
@pytest.mark.usefixtures("quick_deadlocks")
async def test_four_functions_on_the_same_rows(db, caplog, contention):
    """R14: they are one group, named with the table, and none gives up; without turns, most attempts are in vain."""
    caplog.set_level(logging.INFO, logger="sqla_uow")
    for key in range(3):
        await db.run("INSERT INTO account (id, balance) VALUES (:key, 0)", key=key)
    manager = UnitOfWorkManager(db.engine(pool_size=12))
    gave_up, groups = [], set()

    def function(name):
        async def transfer(payer, payee):
            session = current_session(manager)
            for key, amount in ((payer, -1), (payee, 1)):
                await session.execute(
                    text("UPDATE account SET balance = balance + :amount WHERE id = :key"),
                    {"key": key, "amount": amount},
                )

        transfer.__qualname__ = name
        return transactional(
            using=manager, retries=5, isolation="REPEATABLE READ", retry=RetryPolicy(contention=contention)
        )(transfer)

    functions = [function(name) for name in ("buy", "sell", "fee", "tax")]

    async def worker(number):
        for turn in range(25):
            try:
                await functions[(number + turn) % 4]((number + turn) % 3, (number + turn + 1 + turn % 2) % 3)
            except errors.ConflictError as error:
                gave_up.append(error)
            groups.update((group.functions, group.tables) for group in manager.contention())

    await asyncio.gather(*(worker(number) for number in range(12)))
    assert await db.scalar("SELECT sum(balance) FROM account") == 0
    in_vain = sum(manager.statistics().retries.values()) + len(gave_up)
    if contention == "off":
        assert in_vain > 50
        assert not groups
        return
    assert in_vain > 0  # else there was nothing to group
    assert gave_up == []
    assert (("buy()", "fee()", "sell()", "tax()"), ("account",)) in groups
    assert "buy(), fee(), sell(), tax() meet conflicts on account; their calls take turns together" in caplog.messages
