"""Units on Galera: certification failures, nodes that are cut off, and COMMITs whose node dies."""

from __future__ import annotations

import asyncio
import time

import pytest
from sqlalchemy import event, text
from sqlalchemy.ext.asyncio import create_async_engine

from sqla_uow import RetryPolicy, Status, UnitOfWorkManager, current_session, transactional
from sqla_uow._unit.verify import Verification
from sqla_uow.errors import ConflictError
from sqla_uow.testing import FaultPlan
from tests.kit.failures import Failed
from tests.kit.waiting import until
from tests.servers import Proxy

pytestmark = [pytest.mark.drivers("asyncmy", "aiomysql"), pytest.mark.timeout(120)]


async def move(source, target, amount, receipt):
    """Move money and note it, in one transaction."""
    change = text("UPDATE account SET balance = balance + :amount WHERE id = :id")
    await current_session().execute(change, {"id": source, "amount": -amount})
    await current_session().execute(change, {"id": target, "amount": amount})
    await current_session().execute(text("INSERT INTO ledger (id) VALUES (:id)"), {"id": receipt})


def transfers(attempts, **options):
    """Return a transactional transfer that counts its attempts."""

    @transactional(**options)
    async def transfer(source, target, amount, receipt):
        attempts.append(receipt)
        await move(source, target, amount, receipt)

    return transfer


async def test_the_certification_fails_at_commit(nodes):
    """Two change one row on two nodes; the one that commits later is told 1213, and run again."""
    first, second = (UnitOfWorkManager(nodes.engine(number)) for number in (0, 1))
    seen = []

    @transactional(using=first, retries=3)
    async def add(amount):
        row = text("UPDATE account SET balance = balance + :amount WHERE id = 0")
        await current_session(first).execute(row, {"amount": amount})
        if not seen:
            async with second.begin() as unit:
                await unit.session.execute(row, {"amount": 10})
            await until(lambda: nodes.nodes[0].execute("SHOW STATUS LIKE 'wsrep_local_bf_aborts'") != before)
        seen.append(amount)

    before = nodes.nodes[0].execute("SHOW STATUS LIKE 'wsrep_local_bf_aborts'")
    await add(1)
    assert (seen, nodes.rows(2, "SELECT balance FROM account WHERE id = 0")) == ([1, 1], "11")


async def test_the_kits_conflict_at_commit_is_that_of_a_cluster(nodes):
    """R2, R3: class, code and phase of `FaultPlan(..., "conflict", at="commit")` equal those of a failed certification."""
    first, second = (UnitOfWorkManager(nodes.engine(number)) for number in (0, 1))
    row = text("UPDATE account SET balance = balance + 1 WHERE id = 0")
    before = nodes.nodes[0].execute("SHOW STATUS LIKE 'wsrep_local_bf_aborts'")

    async def loses(session):
        await session.execute(row)
        async with second.begin() as unit:
            await unit.session.execute(row)
        await until(lambda: nodes.nodes[0].execute("SHOW STATUS LIKE 'wsrep_local_bf_aborts'") != before)

    real = await Failed.of(first, loses)
    assert (real.seen["in"], real.seen["code"]) == ("COMMIT", "1213")
    for fault in ("conflict", "deadlock"):
        with FaultPlan(first, fault, at="commit"):
            assert await Failed.of(first, lambda session: session.execute(row)) == real
    assert nodes.rows(2, "SELECT balance FROM account WHERE id = 0") == "1"


async def test_a_node_is_cut_off_from_the_others(nodes):
    """1047 at any statement is "not started"; the pool is whole, and the unit is run again until the node is let in."""
    engine = nodes.engine(0, pool_size=1, max_overflow=0, pool_timeout=5)
    manager = UnitOfWorkManager(engine)
    attempts = []
    with manager.activate():
        await transfers(attempts)(0, 1, 1, "before")
        nodes.nodes[1].kill()
        nodes.nodes[2].kill()
        await until(lambda: nodes.nodes[0].state() != "Synced", seconds=20)
        with pytest.raises(ConflictError) as caught:
            await transfers(attempts)(0, 1, 1, "refused")
        assert (caught.value.reason, caught.value.code) == ("not started", "1047")
        assert engine.pool.checkedout() == 0
        going_on = asyncio.create_task(transfers(attempts, retries=1000, retry=RetryPolicy(cap=0.1))(0, 1, 1, "after"))
        await until(lambda: attempts.count("after") > 1)
        nodes.nodes[0].bootstrap()
        await going_on
    assert engine.pool.checkedout() == 0
    assert sorted(nodes.nodes[0].execute("SELECT id FROM ledger").split()) == ["after", "before"]


@pytest.mark.parametrize("applied", [True, False])
async def test_an_unknown_commit_is_settled_on_another_node(nodes, applied):
    """The marker is looked for where everything that was certified before is applied: slow appliers deceive nobody."""
    driver = nodes.driver
    with Proxy("127.0.0.1", nodes.nodes[0].port) as proxy:
        url = nodes.nodes[0].url(driver, port=proxy.port)
        engine = nodes.own(create_async_engine(url))
        other = nodes.nodes[1].port
        moved = []

        def elsewhere(_dialect, _record, _arguments, parameters):
            if moved:
                parameters["port"] = other

        event.listen(engine.sync_engine, "do_connect", elsewhere)
        manager = UnitOfWorkManager(engine, ambiguous_commit="verify")
        attempts = []
        transfer = transfers(attempts, retries=2)
        with manager.activate():
            await transfer(0, 1, 1, "first")
            nodes.nodes[0].execute(
                "CREATE OR REPLACE TABLE bulk (id INTEGER PRIMARY KEY, filling CHAR(200));"
                "INSERT INTO bulk SELECT seq, repeat('x', 200) FROM seq_1_to_60000"
            )
            moved.append(True)
            proxy.on_client_bytes(b"\x03commit", "cut", after_server=applied)  # the command, not the table of markers
            began = time.monotonic()
            await transfer(0, 1, 1, "second")
            took = time.monotonic() - began
        await engine.dispose()
    print(f"settled after {took:.2f} s")  # noqa: T201
    assert nodes.rows(2, "SELECT count(*) FROM ledger WHERE id = 'second'") == "1"
    assert attempts == (["first", "second"] if applied else ["first", "second", "second"])
    assert nodes.rows(2, "SELECT balance FROM account WHERE id = 1") == "2"


async def test_what_is_said_to_be_undone_stays_so(nodes):
    """A COMMIT that arrives at its node after another node was asked for it fails."""
    asked = UnitOfWorkManager(nodes.engine(1), ambiguous_commit="verify")
    manager = UnitOfWorkManager(nodes.engine(0), ambiguous_commit="verify")
    with manager.activate():
        await transfers([], timeout=10)(0, 1, 1, "first")  # makes the table of markers
        with pytest.raises(ConflictError) as caught:
            async with manager.begin() as unit:
                await move(0, 1, 1, "late")
                verification = manager._setup.verifier.verification()
                await unit.session.run_sync(lambda session: verification.mark(session.connection()))
                elsewhere = Verification(asked._setup.verifier.markers, asked._setup.database)
                elsewhere._token = verification._token
                assert await elsewhere.ask(unit._transaction) is False
    assert caught.value.code == "1213"
    elsewhere.conclude(Status.ROLLED_BACK)
    assert asked._setup.verifier.markers.free == [verification._token]
    assert nodes.rows(2, "SELECT id FROM ledger") == "first"
