"""Each fault of the kit against the failure that the real server, or the real network, causes."""

from __future__ import annotations

import pytest

from sqla_uow import UnitOfWorkManager, errors
from sqla_uow.testing import FaultPlan
from tests.kit.failures import Failed
from tests.kit.losses import Wire
from tests.kit.models import Account
from tests.kit.troubles import (
    Busy,
    BusyAtCommit,
    ChangedSinceRead,
    CommitBlocked,
    DeadlockAtCommit,
    LockNotAvailable,
    LockTimeoutAtCommit,
    LockWaitTimeout,
    MariaDBDeadlock,
    PostgreSQLDeadlock,
    SnapshotChanged,
    WriteSkewAtCommit,
)
from tests.servers import Proxy

REAL = {
    "conflict": {"postgresql": ChangedSinceRead, "mysql": SnapshotChanged, "sqlite": Busy},
    "conflict at COMMIT": {"postgresql": WriteSkewAtCommit, "sqlite": BusyAtCommit},
    "deadlock": {"postgresql": PostgreSQLDeadlock, "mysql": MariaDBDeadlock},
    "deadlock at COMMIT": {"postgresql": DeadlockAtCommit},
    "lock timeout": {"postgresql": LockNotAvailable, "mysql": LockWaitTimeout, "sqlite": Busy},
    "lock timeout at COMMIT": {"postgresql": LockTimeoutAtCommit, "mysql": CommitBlocked, "sqlite": BusyAtCommit},
}
NETWORK = ("asyncpg", "psycopg", "asyncmy", "aiomysql")


@pytest.fixture
async def account(db):
    """Provide the rows that troubles strike."""
    await db.run("INSERT INTO account (id, balance) VALUES (1, 0), (2, 0)")


async def equals_the_real_one(db, real, fault, at):
    """Compare what the trouble of this name causes with what the fault does; nothing is written either way."""
    trouble = REAL[real][db.family](db)
    manager = UnitOfWorkManager(trouble.engine())
    try:
        expected = await Failed.of(manager, trouble.strike, isolation=trouble.isolation)
    finally:
        await trouble.settle()
    with FaultPlan(manager, fault, at=at):
        kit = await Failed.of(manager, trouble.write, isolation=trouble.isolation)
    assert expected.seen["raised"] is errors.ConflictError
    assert expected.seen["in"] == ("COMMIT" if at == "commit" else "body")
    assert kit == expected
    assert await db.scalar("SELECT count(*) FROM note") == 0


@pytest.mark.parametrize("at", ["statement", "flush"])
@pytest.mark.parametrize("fault", ["conflict", "lock timeout"])
async def test_a_conflict_and_a_lock_timeout_are_those_of_the_server(db, account, fault, at):
    """R2, R3: class, code and phase equal the real one's."""
    await equals_the_real_one(db, fault, fault, at)


@pytest.mark.drivers(*NETWORK)
@pytest.mark.parametrize("at", ["statement", "flush"])
async def test_a_deadlock_is_that_of_the_server(db, account, at):
    """R2: the victim's error of two transactions that lock two rows crosswise."""
    await equals_the_real_one(db, "deadlock", "deadlock", at)


@pytest.mark.drivers("asyncpg", "psycopg", "sqlite")
async def test_a_conflict_at_commit_is_that_of_the_server(db, account):
    """R2, R3: told at COMMIT, of write skew on PostgreSQL and of a reader on SQLite; MariaDB's is in tests/galera."""
    await equals_the_real_one(db, "conflict at COMMIT", "conflict", "commit")


async def test_a_lock_timeout_at_commit_is_that_of_the_server(db, account):
    """R2, R3: a deferred constraint waits for a row on PostgreSQL, COMMIT for a backup on MariaDB, for a reader on SQLite."""
    await equals_the_real_one(db, "lock timeout at COMMIT", "lock timeout", "commit")


@pytest.mark.drivers("asyncpg", "psycopg")
async def test_a_deadlock_at_commit_is_that_of_the_server(db, account):
    """R2, R3: deferred constraints wait for each other's rows; MariaDB's, which is its conflict, is in tests/galera."""
    await equals_the_real_one(db, "deadlock at COMMIT", "deadlock", "commit")


async def add_one(session):
    """Read, then write at the end of the unit."""
    (await session.get_one(Account, 1)).balance += 1


@pytest.mark.drivers(*NETWORK)
@pytest.mark.parametrize("at", ["statement", "flush", "commit", "after commit"])
async def test_a_lost_connection_is_that_of_the_network(db, account, at):
    """R3, C1: class, code and phase equal those of a link that is cut, before or after COMMIT was applied."""
    with Proxy("127.0.0.1", db.port) as proxy:
        wire = Wire(db, proxy)
        if at in ("statement", "flush"):
            cut = proxy.on_client_bytes(b"FROM account" if at == "statement" else b"UPDATE account", "cut")
        else:
            cut = wire.on_commit("cut", applied=at == "after commit")
        real = await Failed.of(UnitOfWorkManager(wire.engine), add_one)
        assert cut.fired
        await wire.engine.dispose()
    await wire.until_left()
    before = await db.scalar("SELECT sum(balance) FROM account")
    engine = db.engine()
    with FaultPlan(engine, "lost", at=at):
        kit = await Failed.of(UnitOfWorkManager(engine), add_one)
    assert kit == real
    await wire.until_left()
    assert (before, await db.scalar("SELECT sum(balance) FROM account")) == ((1, 2) if at == "after commit" else (0, 0))


@pytest.mark.drivers(*NETWORK)
async def test_refused_is_that_of_a_port_where_nobody_listens(db, account):
    """R2: class, code and phase equal those of a server that is down."""
    real = await Failed.of(UnitOfWorkManager(db.engine(port=1)), add_one)
    engine = db.engine()
    with FaultPlan(engine, "refused", at="connect"):
        kit = await Failed.of(UnitOfWorkManager(engine), add_one)
    assert real.seen["reason"] == "not started"
    assert kit == real
