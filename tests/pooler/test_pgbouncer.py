"""Units through PgBouncer in transaction mode: what works, what stays behind on the server, and what wrong settings look like."""

from __future__ import annotations

import asyncio

import pytest
from alembic.util import CommandError
from sqlalchemy import select, text, update
from sqlalchemy.exc import DBAPIError

from sqla_uow import RetryPolicy, Status, UnitOfWorkManager, current_session, transactional
from sqla_uow.alembic import migration_lock
from sqla_uow.errors import ConflictError, ReadOnlyError
from tests.kit.databases import UNPREPARED
from tests.kit.models import Account
from tests.kit.tenants import PARCELS, ROLE, SEND, make_parcels, tenant
from tests.servers.pgbouncer import PgBouncer

if (reason := PgBouncer.unavailable()) is not None:
    pytest.skip(reason, allow_module_level=True)
pytestmark = pytest.mark.drivers("asyncpg", "psycopg")

WRONG = {"asyncpg": {"statement_cache_size": 100}, "psycopg": {"prepare_threshold": 5}}  # the drivers' defaults
SERIALIZABLE_ACCOUNTS = 4
WORKERS = 8
TRANSFERS = 5
# What is of the looking transaction itself.
THEIRS = "'transaction_isolation', 'transaction_read_only', 'transaction_deferrable'"
LEFT_BEHIND = {
    "settings": f"SELECT name, setting FROM pg_settings WHERE name NOT IN ({THEIRS}) ORDER BY name",
    "prepared": "SELECT name FROM pg_prepared_statements",
    "cursors": "SELECT name FROM pg_cursors WHERE name <> ''",
    "listens": "SELECT pg_listening_channels()",
    "advisory locks": "SELECT objid FROM pg_locks WHERE pid = pg_backend_pid() AND locktype = 'advisory'",
    "temporary tables": "SELECT relname FROM pg_class WHERE relpersistence = 't'",
}


@pytest.fixture
def through(db):
    """Make an engine that goes through a pooler, set up as our guide tells unless it is told otherwise."""

    def through(pooler, **options):
        return db.engine(port=pooler.port, **({"connect_args": UNPREPARED[db.driver]} | options))

    return through


async def test_conflicts_are_retried(db, through):
    """R1, R2: SERIALIZABLE transfers by more clients than the pooler has connections; no money is lost."""
    await db.run(*(f"INSERT INTO account (id, balance) VALUES ({key}, 100)" for key in range(SERIALIZABLE_ACCOUNTS)))
    with PgBouncer(db.server) as between:
        manager = UnitOfWorkManager(through(between))
        runs = []

        @transactional(using=manager, retries=50, isolation="SERIALIZABLE", timeout=30, retry=RetryPolicy(cap=0.1))
        async def transfer(source, target):
            runs.append(1)
            session = current_session(manager)
            first, second = sorted((source, target))
            accounts = {key: await session.get_one(Account, key) for key in (first, second)}
            accounts[source].balance -= 1
            accounts[target].balance += 1

        async def work(worker):
            for turn in range(TRANSFERS):
                source = (worker + turn) % SERIALIZABLE_ACCOUNTS
                await transfer(source, (source + 1) % SERIALIZABLE_ACCOUNTS)

        await asyncio.gather(*(work(worker) for worker in range(WORKERS)))
        async with manager.begin(read_only=True) as unit:
            assert await unit.session.scalar(text("SELECT sum(balance) FROM account")) == 100 * SERIALIZABLE_ACCOUNTS
    assert len(runs) > WORKERS * TRANSFERS


# -- nothing of ours stays behind


async def committed(unit):
    """End with COMMIT."""


async def failed(unit):
    """End with an error of the body."""
    raise KeyError


async def refused(unit):
    """End with an error of the server: the unit only reads."""
    await unit.session.execute(update(Account).values(balance=5))


async def cancelled(unit):
    """End in the middle of a statement."""
    async with asyncio.timeout(0.2):
        await unit.session.execute(text("SELECT pg_sleep(30)"))


async def swallowed(unit):
    """End after a savepoint that was rolled back."""
    try:
        async with unit.session.begin_nested():
            await unit.session.execute(text("SELECT 1 / 0"))
    except DBAPIError:
        pass


@pytest.mark.parametrize("ending", [committed, failed, refused, cancelled, swallowed])
async def test_nothing_stays_behind_on_the_server(db, through, ending):
    """P4, R6: the server's one connection is as it was, whatever the unit has set in it and however it ended."""
    with PgBouncer(db.server, size=1) as between:
        manager = UnitOfWorkManager(through(between), ambiguous_commit="verify")
        stranger = through(between)

        async def look():
            async with stranger.connect() as connection:
                found = {name: (await connection.execute(text(sql))).all() for name, sql in LEFT_BEHIND.items()}
                return await connection.scalar(text("SELECT pg_backend_pid()")), found

        _process, before = await look()
        read_only = ending is refused
        try:
            async with manager.begin(isolation="SERIALIZABLE", read_only=read_only, timeout=60) as unit:
                unit._transaction.lock_wait = 0.5  # as contention control gives to a retry
                process = await unit.session.scalar(text("SELECT pg_backend_pid()"))
                assert await unit.session.scalar(text("SHOW lock_timeout")) == "500ms"
                assert await unit.session.scalar(text("SHOW statement_timeout")) != "0"
                if not read_only:
                    unit.session.add(Account(id=1))
                    await unit.session.flush()
                await ending(unit)
        except (KeyError, ReadOnlyError, TimeoutError):
            assert unit.status is Status.ROLLED_BACK
        else:
            assert unit.status is Status.COMMITTED
        after_process, after = await look()
    assert after == before
    if ending is not cancelled:  # then the pooler closes the server's connection, as it may
        assert after_process == process
    assert [after[name] for name in LEFT_BEHIND if name != "settings"] == [[]] * (len(LEFT_BEHIND) - 1)


# -- wrong settings


async def prepared_statements_fail(manager):
    """Send some statements again and again from several tasks, until one fails for its prepared statement."""
    columns = [Account.id, Account.balance, Account.id + 1, Account.balance + 1]
    failures = []

    async def work():
        while not failures:
            for column in columns:
                try:
                    async with manager.begin() as unit:
                        await unit.session.execute(select(column))
                except ConflictError as error:  # another attempt may find what it prepared; this unit has one only
                    failures.append(error)

    async with asyncio.timeout(30):
        await asyncio.gather(*(work() for _ in range(6)))
    return failures


async def test_wrong_settings_are_named(db, through):
    """An error about a prepared statement says which argument has to be passed, whether it came at connect or later."""
    with PgBouncer(db.server) as between:
        engine = through(between, connect_args=WRONG[db.driver])
        failures = await prepared_statements_fail(UnitOfWorkManager(engine))
    remedy = {"asyncpg": "{'statement_cache_size': 0}", "psycopg": "{'prepare_threshold': None}"}[db.driver]
    note = (
        "prepared statements do not outlive a transaction behind a pooler such as PgBouncer in transaction mode; pass "
        f"connect_args={remedy} to create_async_engine()"
    )
    for conflict in failures:
        error = conflict.__cause__
        assert conflict.reason in ("stale plan", "not started")
        assert error.orig.sqlstate in ("26000", "42P05")
        assert error.__notes__ == [note]


async def test_wrong_settings_are_survived_with_retries(db, through):
    """What one session of the server has forgotten is no error of the transaction: it is run again."""
    with PgBouncer(db.server) as between:
        manager = UnitOfWorkManager(through(between, connect_args=WRONG[db.driver]), retries=10)
        columns = [Account.id, Account.balance, Account.id + 1, Account.balance + 1]

        @transactional(using=manager)
        async def look(column):
            await current_session(manager).execute(select(column))

        async def work():
            for column in columns * 10:
                await look(column)

        async with asyncio.timeout(60):
            await asyncio.gather(*(work() for _ in range(6)))
        retries = manager.statistics().retries
    # 08P01: the statement of that name is somebody else's, and has not as many parameters.
    assert {code for _, code in retries} <= {"26000", "42P05", "08P01"}
    assert {code for _, code in retries} & {"26000", "42P05"}
    assert sum(retries.values()) > 0


async def test_other_errors_say_nothing_of_it(db, through):
    """Notes are about prepared statements only."""
    with PgBouncer(db.server) as between, pytest.raises(DBAPIError) as caught:
        async with UnitOfWorkManager(through(between)).begin() as unit:
            await unit.session.execute(text("SELECT * FROM nothing"))
    assert not hasattr(caught.value, "__notes__")


async def test_the_migration_lock_is_refused(db, through):
    """A4: a real one gives the session away, and is told from the server itself."""
    with PgBouncer(db.server) as between:

        def run(connection):
            with migration_lock(connection):
                pytest.fail("it has no session to be held in")

        async with through(between).connect() as connection:
            with pytest.raises(CommandError, match="pooler in transaction mode"):
                await connection.run_sync(run)


# -- settings


async def test_settings_of_many_clients_on_few_connections(db, through):
    """All of it is in the transaction: whoever gets the server's connection next, through whatever client, has his own."""
    await make_parcels(db)
    with PgBouncer(db.server) as between:
        manager = UnitOfWorkManager(
            through(between, pool_size=WORKERS),
            settings={"app.tenant": tenant.get},
            role=ROLE,
            isolation="READ COMMITTED",
        )

        async def work(worker):
            for turn in range(TRANSFERS):
                tenant.set("ab"[(worker + turn) % 2])
                async with manager.begin(timeout=10 if turn % 2 else None) as unit:
                    assert {row.tenant for row in await unit.session.execute(PARCELS)} == {tenant.get()}
                    await unit.session.execute(SEND, {"tenant": tenant.get(), "body": "new"})

        await asyncio.gather(*(work(worker) for worker in range(WORKERS)))
        async with through(between).connect() as connection:
            asked = text("SELECT current_setting('app.tenant', true), current_user")
            assert (await connection.execute(asked)).one() in [("", "postgres"), (None, "postgres")]
    assert await db.scalar("SELECT count(*) FROM parcel") == 2 + WORKERS * TRANSFERS
