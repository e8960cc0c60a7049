"""Each fault of the kit against the failure that the real server, or the real network, causes."""

from __future__ import annotations

import pytest

from sqla_uow import UnitOfWorkManager, errors
from sqla_uow._classify import classify
from sqla_uow.testing import FaultPlan
from tests.losses import Wire
from tests.models import Account
from tests.servers import Proxy
from tests.troubles import (
    Busy,
    BusyAtCommit,
    ChangedSinceRead,
    LockNotAvailable,
    LockWaitTimeout,
    MariaDBDeadlock,
    PostgreSQLDeadlock,
    SnapshotChanged,
    WriteSkewAtCommit,
)

REAL = {
    "conflict": {"postgresql": ChangedSinceRead, "mysql": SnapshotChanged, "sqlite": Busy},
    "conflict at COMMIT": {"postgresql": WriteSkewAtCommit, "sqlite": BusyAtCommit},
    "deadlock": {"postgresql": PostgreSQLDeadlock, "mysql": MariaDBDeadlock},
    "lock timeout": {"postgresql": LockNotAvailable, "mysql": LockWaitTimeout, "sqlite": Busy},
}
NETWORK = ("asyncpg", "psycopg", "asyncmy", "aiomysql")


class Failed:
    """What a unit's failure is made of: everything that code can tell one from another by."""

    def __init__(self):
        self.seen = {}

    def __eq__(self, other):
        return self.seen == other.seen

    def __repr__(self):
        return f"{self.seen}"

    __hash__ = None

    @classmethod
    async def of(cls, manager, body, **options):
        """Run a body in a unit, and describe what comes out of it."""
        self, unit = cls(), None
        try:
            async with manager.begin(**options) as unit:
                try:
                    await body(unit.session)
                except BaseException:
                    self.seen["in"] = "body"
                    raise
                self.seen["in"] = "COMMIT"
        except errors.UnitOfWorkError as error:
            cause = error.__cause__
            driver = getattr(cause, "orig", cause)
            failure = classify(cause, connecting=unit._transaction.connect_failure is not None)
            self.seen |= {
                "raised": type(error),
                "reason": getattr(error, "reason", None),
                "code": getattr(error, "code", None),
                "class": type(cause),
                "driver's class": type(driver),
                "kind": failure.kind,
                "driver's code": failure.code,
                "invalidated": getattr(cause, "connection_invalidated", None),
                "status": unit.status,
            }
        return self


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
async def test_a_deadlock_is_that_of_the_server(db, account):
    """R2: the victim's error of two transactions that lock two rows crosswise."""
    await equals_the_real_one(db, "deadlock", "deadlock", "statement")


@pytest.mark.drivers("asyncpg", "psycopg", "sqlite")
async def test_a_conflict_at_commit_is_that_of_the_server(db, account):
    """R2, R3: told at COMMIT, of write skew on PostgreSQL and of a reader on SQLite; on MariaDB only Galera does that."""
    await equals_the_real_one(db, "conflict at COMMIT", "conflict", "commit")


async def add_one(session):
    """Read, then write at the end of the unit."""
    (await session.get_one(Account, 1)).balance += 1


@pytest.mark.drivers(*NETWORK)
@pytest.mark.parametrize("at", ["statement", "flush", "commit", "after commit"])
async def test_a_lost_connection_is_that_of_the_network(db, account, at):
    """R3, C1: class, code and phase equal those of a link that is cut, before or after COMMIT was applied."""
    with Proxy("127.0.0.1", db.server.port) as proxy:
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
