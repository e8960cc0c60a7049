"""CockroachDB's dialect and its documented codes, on a PostgreSQL: see conftest."""

from __future__ import annotations

import asyncio
import contextlib
import json

import pytest
from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from alembic.util import CommandError
from sqlalchemy import insert, select, text, update
from sqlalchemy.exc import DBAPIError, IntegrityError

from sqla_uow import RetryPolicy, Status, UnitOfWorkManager, current_session, mixins, transactional
from sqla_uow.__main__ import main
from sqla_uow._alembic.patience import patiently
from sqla_uow._alembic.schema import Patience
from sqla_uow._databases import distributed as _servers
from sqla_uow.alembic import migration_lock
from sqla_uow.errors import AmbiguousCommitError, ConflictError, ReadOnlyError, RollbackOnlyError, StaleVersionError
from tests.kit.models import Account
from tests.kit.statements import statements
from tests.versioning import tables
from tests.versioning.others import overtake, version_of

pytest.importorskip(
    "sqlalchemy_cockroachdb", reason="sqlalchemy-cockroachdb is not installed; it takes SQLAlchemy 2.0 only"
)
pytestmark = pytest.mark.drivers("asyncpg", "psycopg")

APPLIED = pytest.mark.parametrize("applied", [False, True], ids=["before", "after"])
# https://www.cockroachlabs.com/docs/stable/transaction-retry-error-reference
RESTART = (
    "restart transaction: TransactionRetryWithProtoRefreshError: TransactionRetryError: retry txn "
    "(RETRY_SERIALIZABLE - failed preemptive refresh)"
)
# https://www.cockroachlabs.com/docs/stable/common-errors#result-is-ambiguous
UNKNOWN = "result is ambiguous: error=rpc error: code = Unavailable desc = error reading from server [exhausted]"
# https://www.cockroachlabs.com/docs/stable/node-shutdown
DRAINED = "server is shutting down"
# pkg/sql/pgwire/pgcode/codes.go of CockroachDB
HALF = "transaction committed but schema change aborted with error: (23505): duplicate key value"


SHOW = text("SHOW transaction_isolation")
AGAIN = insert(Account).values(id=1)
MARKERS = "SELECT count(*) FROM sqla_uow_commits"


async def refuse(db, *, code, message, at="COMMIT", times=1):
    """Have the server refuse the next writes to accounts, or their COMMITs, so many times."""
    when = {"COMMIT": "CONSTRAINT TRIGGER refuse AFTER", "write": "TRIGGER refuse BEFORE"}[at]
    deferred = "DEFERRABLE INITIALLY DEFERRED" if at == "COMMIT" else ""
    await db.run(
        "CREATE SEQUENCE refused",
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $body$ BEGIN "
        f"IF nextval('refused') <= {times} THEN RAISE EXCEPTION '{message}' USING ERRCODE = '{code}'; END IF; "
        "RETURN NEW; END $body$",
        f"CREATE {when} INSERT OR UPDATE ON account {deferred} FOR EACH ROW EXECUTE FUNCTION refuse()",
    )


def adding(manager, **options):
    """Return a transactional function that inserts account 1, and the list of its runs' units."""
    units = []

    @transactional(using=manager, retry=RetryPolicy(base=0), **options)
    async def add():
        async with manager.begin() as unit:
            units.append(unit)
            unit.session.add(Account(id=1))

    return add, units


@pytest.mark.parametrize("at", ["write", "COMMIT"])
async def test_restart_transaction_is_retried(cockroach, at):
    """40001 with CockroachDB's words, at a statement and at COMMIT: the whole function again, in a new transaction."""
    await refuse(cockroach, code="40001", message=RESTART, at=at, times=2)
    add, units = adding(UnitOfWorkManager(cockroach.engine()), retries=2)
    await add()
    assert [unit.status for unit in units] == [Status.ROLLED_BACK, Status.ROLLED_BACK, Status.COMMITTED]
    assert await cockroach.rows("SELECT id FROM account") == [(1,)]


async def test_restart_transaction_without_retries(cockroach):
    """It is a `ConflictError`, with the driver's exception behind it."""
    await refuse(cockroach, code="40001", message=RESTART)
    add, _units = adding(UnitOfWorkManager(cockroach.engine()))
    with pytest.raises(ConflictError) as caught:
        await add()
    assert (caught.value.reason, caught.value.attempts) == ("conflict", 1)
    assert isinstance(caught.value.__cause__, DBAPIError)
    assert "restart transaction" in str(caught.value.__cause__)


@pytest.mark.parametrize(("code", "message"), [("40003", UNKNOWN), ("57P01", DRAINED), ("XXA00", HALF)])
async def test_an_ambiguous_commit_is_never_retried(cockroach, code, message):
    """40003; a node that is drained while COMMIT runs; a COMMIT of which only the DDL failed."""
    await refuse(cockroach, code=code, message=message)
    add, units = adding(UnitOfWorkManager(cockroach.engine()), retries=5)
    with pytest.raises(AmbiguousCommitError) as caught:
        await add()
    assert [unit.status for unit in units] == [Status.AMBIGUOUS]
    assert message in str(caught.value.__cause__)


async def test_a_drained_node_before_commit_is_left(cockroach):
    """57P01 at a statement: the transaction is lost, and run again."""
    await refuse(cockroach, code="57P01", message=DRAINED, at="write")
    add, units = adding(UnitOfWorkManager(cockroach.engine()), retries=1)
    await add()
    assert [unit.status for unit in units] == [Status.ROLLED_BACK, Status.COMMITTED]


async def test_a_savepoint_brings_back_from_an_error(cockroach):
    """Its name is none that CockroachDB takes for its own protocol of retries (`cockroach_restart`)."""
    engine = cockroach.engine()
    manager = UnitOfWorkManager(engine)
    sent = statements(engine, lambda statement: "SAVEPOINT" in statement)
    async with manager.begin() as unit:
        unit.session.add(Account(id=1))
        await unit.session.flush()
        with pytest.raises(IntegrityError):
            async with manager.begin(propagation="nested"):
                await unit.session.execute(AGAIN)
    assert await cockroach.rows("SELECT id FROM account") == [(1,)]
    assert sent == ["SAVEPOINT sa_savepoint_1", "ROLLBACK TO SAVEPOINT sa_savepoint_1"]


async def test_an_aborted_transaction_is_not_committed(cockroach):
    """An error that was swallowed, and 25P02 after it: no conflict and no retry, but no COMMIT that does nothing either."""
    manager = UnitOfWorkManager(cockroach.engine())
    with pytest.raises(RollbackOnlyError):
        async with manager.begin() as unit:
            unit.session.add(Account(id=1))
            await unit.session.flush()
            with pytest.raises(IntegrityError):
                await unit.session.execute(AGAIN)
    assert await cockroach.rows("SELECT id FROM account") == []


# -- isolation, read only, time limits


async def test_the_levels_that_there_are(cockroach):
    """P4: what the dialect can ask for is in force from the first statement; the others are refused."""
    manager = UnitOfWorkManager(cockroach.engine())
    for level in ("READ COMMITTED", "SERIALIZABLE"):
        async with manager.begin(isolation=level, read_only=True) as unit:
            assert await unit.session.scalar(SHOW) == level.lower()
            with pytest.raises(ReadOnlyError):
                await unit.session.execute(AGAIN)
    for level in ("READ UNCOMMITTED", "REPEATABLE READ"):
        with pytest.raises(ValueError, match="isolation") as caught:
            manager.begin(isolation=level)
        assert str(caught.value) == (
            f"begin() asks for isolation {level!r}, which cockroachdb does not have; use 'READ COMMITTED' or 'SERIALIZABLE'"
        )


async def test_a_level_is_asked_for_once(cockroach):
    """P4: whether the cluster runs READ COMMITTED is asked in the first unit that wants it; SERIALIZABLE it always runs."""
    engine = cockroach.engine()
    manager = UnitOfWorkManager(engine)
    sent = statements(engine)
    for level in ("SERIALIZABLE", "READ COMMITTED", None, "READ COMMITTED"):
        async with manager.begin(isolation=level) as unit:
            await unit.session.execute(select(Account.id))
    assert [statement.split()[0] for statement in sent] == ["SELECT", "SHOW", "SELECT", "SELECT", "SELECT"]


async def test_a_level_that_the_cluster_replaces_is_refused(cockroach, monkeypatch):
    """P4: the whole message, whatever the body does with it; nothing was run at the other level.

    A cluster whose setting is off answers so; PostgreSQL has no such setting, and is asked for what it would say.
    """
    monkeypatch.setattr(_servers.CockroachDB, "level", "SELECT 'serializable'")
    manager = UnitOfWorkManager(cockroach.engine(), isolation="READ COMMITTED")
    for propagation in ("required", "nested"):
        with pytest.raises((ValueError, RollbackOnlyError)) as caught:
            async with manager.begin() as unit:
                with contextlib.suppress(ValueError):
                    async with manager.begin(propagation=propagation):
                        unit.session.add(Account(id=1))
        assert unit.status is Status.ROLLED_BACK
        error = caught.value if isinstance(caught.value, ValueError) else caught.value.__cause__
        assert str(error) == (
            "begin() asks for isolation 'READ COMMITTED', which this CockroachDB runs as SERIALIZABLE; SET CLUSTER SETTING "
            "sql.txn.read_committed_isolation.enabled = true, or ask for 'SERIALIZABLE'"
        )
    assert await cockroach.rows("SELECT id FROM account") == []


async def test_limits_are_of_the_transaction(cockroach):
    """R6: SET LOCAL, as documented; nothing is set that CockroachDB has not, and nothing for deadlocks that it finds at once."""
    engine = cockroach.engine(pool_size=1, max_overflow=0)
    manager = UnitOfWorkManager(engine)
    sent = statements(engine, lambda statement: "SET" in statement.upper())
    async with manager.begin(timeout=60) as unit:
        unit._transaction.lock_wait = 0.1  # as contention control gives to a retry
        assert (await unit.session.scalar(text("SHOW statement_timeout"))).endswith(("ms", "1min"))
    async with manager.begin() as unit:
        assert await unit.session.scalar(text("SHOW statement_timeout")) == "0"
    assert [statement.partition(" = ")[0] for statement in sent] == ["SET LOCAL statement_timeout"]


# -- an unknown COMMIT


@APPLIED
async def test_a_lost_answer_is_found_out_by_a_row(cockroach_wire, applied):
    """C2: there is no status of transactions to ask for; the row that was looked for is there in either case."""
    await cockroach_wire.add_one(ambiguous_commit="verify")  # makes the table
    before = await cockroach_wire.db.scalar(MARKERS)
    lost = cockroach_wire.on_commit("cut", applied=applied)
    await cockroach_wire.add_one(ambiguous_commit="verify")
    assert lost.fired
    assert await cockroach_wire.balance() == 2
    ended = [Status.COMMITTED] if applied else [Status.ROLLED_BACK, Status.COMMITTED]
    assert [unit.status for unit in cockroach_wire.units] == [Status.COMMITTED, *ended]
    # What was not there never comes: its row was written by who looked for it, and that was committed.
    assert await cockroach_wire.db.scalar(MARKERS) == before + (0 if applied else 1)


async def test_nothing_asks_for_what_there_is_not(cockroach_wire):
    """C2: no transaction id, no statistics of PostgreSQL; the table is made on a connection of its own."""
    sent = statements(cockroach_wire.engine)
    await cockroach_wire.add_one(ambiguous_commit="verify")
    assert [statement for statement in sent if "pg_" in statement or "CREATE" in statement] == []
    assert await cockroach_wire.db.scalar(MARKERS) == 1


# -- version columns


@pytest.fixture
async def versioned(cockroach):
    """A manager over a database with some tables of `tests.versioning.tables`: PostgreSQL reserves other words."""
    engine = cockroach.engine()
    models = [tables.Plain, tables.ByUUID, tables.ByTimestamp, tables.Joined, tables.JoinedChild]
    async with engine.begin() as connection:
        await connection.run_sync(tables.Base.metadata.create_all, [model.__table__ for model in models])
    engine.dialect.supports_sane_rowcount = True
    return UnitOfWorkManager(engine)


@pytest.mark.parametrize("model", [tables.Plain, tables.ByUUID, tables.ByTimestamp])
async def test_versions_count_and_are_compared(cockroach, versioned, model):
    """V1, V2: a row that somebody has changed meanwhile is not overwritten, and the function is run again."""
    async with versioned.begin() as unit:
        unit.session.add(model(id=1))
    runs = []

    @transactional(using=versioned, retries=1, isolation="READ COMMITTED")
    async def change():
        session = current_session(versioned)
        row = await session.get_one(model, 1)
        runs.append(row.version)
        if len(runs) == 1:
            await overtake(cockroach, session, model)
        row.value += 1

    await change()
    assert len(set(runs)) == 2
    assert await version_of(cockroach, model) not in runs
    with pytest.raises(StaleVersionError):
        async with versioned.begin() as unit:
            await mixins.get_versioned(unit.session, model, 1, version=runs[0])


async def test_a_bulk_update_counts(cockroach, versioned):
    """V3: also where the version stands in a parent's table, in one statement."""
    async with versioned.begin() as unit:
        unit.session.add_all([tables.Plain(id=1), tables.JoinedChild(id=1)])
    async with versioned.begin() as unit:
        await unit.session.execute(update(tables.Plain).values(value=5))
        await unit.session.execute(update(tables.JoinedChild).values(value=5))
    assert [await version_of(cockroach, model) for model in (tables.Plain, tables.JoinedChild)] == [2, 2]


@pytest.mark.drivers("psycopg")
async def test_a_dialect_that_does_not_count_rows_is_refused(versioned):
    """SQLAlchemy would only warn that a version cannot be verified; the whole message, with what helps."""
    async with versioned.begin() as unit:
        unit.session.add(tables.Plain(id=1))
    del versioned.engine.dialect.supports_sane_rowcount
    with pytest.raises(TypeError) as caught:
        async with versioned.begin() as unit:
            (await unit.session.get_one(tables.Plain, 1)).value = 1
    assert str(caught.value) == (
        "the version of Plain(1) cannot be checked, as the dialect cockroachdb+psycopg says that its driver does not count "
        "rows; set engine.dialect.supports_sane_rowcount = True if it does, as psycopg 3 does, or use another driver"
    )


async def test_there_is_no_xmin(cockroach):
    """V1: a table that is versioned by it is not made."""
    async with cockroach.engine().connect() as connection:
        with pytest.raises(
            TypeError, match="'by_xmin' is versioned by xmin, which CockroachDB does not have; use Versioned"
        ):
            await connection.run_sync(tables.XminBase.metadata.create_all)


# -- what is refused


async def test_replicas_are_refused(cockroach):
    """No position tells how far one is; the whole message."""
    with pytest.raises(ValueError, match="replicas") as caught:
        UnitOfWorkManager(cockroach.engine(), replicas=[cockroach.engine()])
    assert str(caught.value) == (
        "UnitOfWorkManager 'default' has replicas on CockroachDB, which has no replication position to "
        "wait for; drop replicas=, and use AS OF SYSTEM TIME for reads that may be stale"
    )


async def test_the_migration_lock_is_refused(cockroach):
    """A4: everybody would get it; the whole message."""

    def run(connection):
        with migration_lock(connection):
            pytest.fail("nobody excluded anybody")

    async with cockroach.engine().connect() as connection:
        with pytest.raises(CommandError) as caught:
            await connection.run_sync(run)
    assert str(caught.value) == (
        "CockroachDB gives an advisory lock to everybody who asks, so migration_lock() would exclude nobody; run the "
        "migrations from one process"
    )


async def test_a_schema_is_changed_without_a_savepoint(cockroach):
    """A2: CockroachDB rolls no DDL back to a savepoint, and nobody waits for a table's lock there."""
    engine = cockroach.engine()
    sent = statements(engine)

    def migrate(connection):
        op = Operations(MigrationContext.configure(connection))
        patiently(op, "note", Patience(), lambda: op.execute("ALTER TABLE note ADD COLUMN version INTEGER DEFAULT 1"))

    async with engine.begin() as connection:
        await connection.run_sync(migrate)
    assert sent == ["ALTER TABLE note ADD COLUMN version INTEGER DEFAULT 1"]


async def test_the_doctor(cockroach, capsys):
    """It says what little it can say, and tries the levels that there are."""
    url = cockroach.url.replace("postgresql+", "cockroachdb+")
    assert await asyncio.to_thread(main, ["doctor", url, "--json"]) == 0
    found = {one["name"]: one for one in json.loads(capsys.readouterr().out)}
    assert set(found) == {
        "driver", "server", "default_transaction_isolation", "clock", "ambiguous_commit='verify'",
        "READ COMMITTED", "SERIALIZABLE",
    }  # fmt: skip
    assert found["driver"]["value"].startswith(f"cockroachdb+{cockroach.driver} ")
    assert found["ambiguous_commit='verify'"]["value"].startswith("works: by a row")
