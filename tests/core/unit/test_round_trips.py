"""What a unit costs on the wire, counted by a proxy between the driver and the server."""

from __future__ import annotations

import itertools

import pytest
from sqlalchemy import select, text

from sqla_uow import RetryPolicy, UnitOfWorkManager
from tests.kit.models import Account
from tests.servers import Proxy

pytestmark = pytest.mark.drivers("asyncpg", "psycopg", "asyncmy", "aiomysql")


@pytest.fixture
async def wire(db):
    """A proxy before the server, and an engine behind it that keeps one connection."""
    with Proxy("127.0.0.1", db.port) as proxy:
        proxy.engine = db.engine(port=proxy.port, pool_size=1, max_overflow=1)
        yield proxy
        await proxy.engine.dispose()


async def cost(wire, unit_of_work, runs=7):
    """Return the round trips of one more run, and what was sent, when connection and caches are warm."""
    for _ in range(runs):  # psycopg prepares a statement when it comes for the sixth time
        await unit_of_work()
    wire.reset_counts()
    await unit_of_work()
    return wire.round_trips, wire.flights


def of_family(db, postgresql, mysql):
    """Return the figure of this database."""
    return postgresql if db.family == "postgresql" else mysql


def reading(manager, **options):
    """Return a unit of work that sends one SELECT."""

    async def unit_of_work():
        async with manager.begin(**options) as unit:
            await unit.session.scalar(select(Account.balance))

    return unit_of_work


async def test_a_unit_without_sql_costs_nothing(wire, db):
    """S2: with isolation, read_only, timeout and verification too, nothing is sent before the first SQL."""
    manager = UnitOfWorkManager(wire.engine, ambiguous_commit="verify")

    async def unit_of_work():
        async with manager.begin(isolation="SERIALIZABLE", read_only=True, timeout=5) as unit:
            assert unit.session is not None

    await reading(manager)()  # a warm connection waits in the pool
    assert await cost(wire, unit_of_work) == (0, [])


async def test_serializable_costs_no_more_than_the_drivers_minimum(wire, db):
    """P4: BEGIN, SELECT, COMMIT on PostgreSQL; SET TRANSACTION, SELECT, COMMIT and the pool's ROLLBACK on MariaDB."""
    trips, flights = await cost(wire, reading(UnitOfWorkManager(wire.engine), isolation="SERIALIZABLE"))
    assert trips == of_family(db, 3, 4), flights
    assert b"SERIALIZABLE" in flights[0]


async def test_the_default_isolation_costs_the_drivers_minimum(wire, db):
    """Section 12: the round trips of a hand-written `session.begin()`."""
    trips, flights = await cost(wire, reading(UnitOfWorkManager(wire.engine)))
    assert trips == 3, flights


async def test_read_only_costs_as_much_as_a_level(wire, db):
    """P6: READ ONLY rides on BEGIN, or on the SET TRANSACTION that tells the level."""
    options = {"isolation": "SERIALIZABLE", "read_only": True}
    trips, flights = await cost(wire, reading(UnitOfWorkManager(wire.engine), **options))
    assert trips == of_family(db, 3, 4), flights
    assert b"READ ONLY" in flights[0]


async def test_a_timeout_adds_at_most_one(wire, db):
    """R6: one statement tells PostgreSQL, whatever is left this time; MariaDB is told with the statement itself."""
    ticks = (0.001 * turn * turn for turn in itertools.count())
    manager = UnitOfWorkManager(wire.engine, retry=RetryPolicy(clock=lambda: next(ticks)))
    trips, flights = await cost(wire, reading(manager, timeout=30))
    assert trips == of_family(db, 4, 3), flights
    if db.family == "mysql":  # PostgreSQL's statement has been prepared, and has no text any more
        assert b"max_statement_time" in flights[0]


async def test_a_timeout_adds_at_most_one_where_a_snapshot_is_kept(wire, db):
    """R6, A4: PostgreSQL is told without a query, in a text that is another each time."""
    ticks = (0.001 * turn * turn for turn in itertools.count())
    manager = UnitOfWorkManager(wire.engine, retry=RetryPolicy(clock=lambda: next(ticks)))
    trips, flights = await cost(wire, reading(manager, timeout=30, isolation="REPEATABLE READ"))
    assert trips == 4, flights  # on MariaDB the one more is for the level


async def test_an_update_costs_its_two_statements(wire, db):
    """Section 12: BEGIN, SELECT, UPDATE, COMMIT; one less on MariaDB, one more for the pool's ROLLBACK."""
    await db.run("INSERT INTO account (id, balance) VALUES (1, 0)")
    manager = UnitOfWorkManager(wire.engine)

    async def unit_of_work():
        async with manager.begin() as unit:
            (await unit.session.get_one(Account, 1)).balance += 1

    trips, flights = await cost(wire, unit_of_work)
    assert trips == 4, flights
    assert await db.scalar("SELECT balance FROM account") == 8


async def test_verification_adds_one_to_a_unit_that_writes(wire, db):
    """C2: the transaction id, or the marker row; and nothing to a unit that wrote nothing."""
    await db.run("INSERT INTO account (id, balance) VALUES (1, 0)")

    def writing(manager):
        async def unit_of_work():
            async with manager.begin() as unit:
                await unit.session.execute(text("UPDATE account SET balance = balance + 1"))

        return unit_of_work

    plain = UnitOfWorkManager(wire.engine)
    verifying = UnitOfWorkManager(wire.engine, ambiguous_commit="verify")
    without, _flights = await cost(wire, writing(plain))
    trips, flights = await cost(wire, writing(verifying))
    assert trips == without + 1, flights
    assert await cost(wire, reading(verifying)) == await cost(wire, reading(plain))


async def test_joined_calls_cost_nothing(wire, db):
    """P1: a joined call sends nothing of its own; a nested one its SAVEPOINT and RELEASE."""
    manager = UnitOfWorkManager(wire.engine)

    def around(propagation):
        async def unit_of_work():
            async with manager.begin(), manager.begin(propagation=propagation) as unit:
                await unit.session.scalar(select(Account.balance))

        return unit_of_work

    alone, _flights = await cost(wire, reading(manager))
    assert (await cost(wire, around("required")))[0] == alone
    assert (await cost(wire, around("nested")))[0] == alone + 2
