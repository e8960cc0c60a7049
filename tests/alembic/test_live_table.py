"""A table that is in use while its version column is added; `tox -e live-table` runs it at full size."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time

import pytest
from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from alembic.util import CommandError
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from tests.alembic.catalog import columns, identity, triggers
from tests.kit.databases import DRIVERS, ONE_OF_EACH

ROWS = int(os.environ.get("SQLA_UOW_LIVE_ROWS", "1000"))
HELD = float(os.environ.get("SQLA_UOW_LIVE_SECONDS", "1.5"))
"""Seconds for which a reader holds a lock on the table."""
WRITERS = 8
AT_FULL_SIZE = HELD > 5
LOCK_TIMEOUT = 1.0 if AT_FULL_SIZE else 0.3  # MariaDB counts whole seconds, 1 at least

FILL = {
    "postgresql": "INSERT INTO account (id, balance) SELECT n, 0 FROM generate_series(1, {rows}) n",
    "mysql": "INSERT INTO account (id, balance) SELECT seq, 0 FROM seq_1_to_{rows}",
    "sqlite": "INSERT INTO account (id, balance) WITH RECURSIVE s(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM s "
    "WHERE n < {rows}) SELECT n, 0 FROM s",
}


class Traffic:
    """Writers that update one row after the other, and remember how long each UPDATE took."""

    def __init__(self, engine) -> None:
        self.engine = engine
        self.longest = 0.0
        self.written = 0
        self.stop = False

    async def write(self, number: int) -> None:
        async with self.engine.connect() as connection:
            while not self.stop:
                started = time.monotonic()
                await connection.execute(text(f"UPDATE account SET balance = balance + 1 WHERE id = {number}"))
                await connection.commit()
                self.longest = max(self.longest, time.monotonic() - started)
                self.written += 1
                await asyncio.sleep(0.005)

    @contextlib.asynccontextmanager
    async def running(self):
        async with asyncio.TaskGroup() as tasks:
            for number in range(1, WRITERS + 1):
                tasks.create_task(self.write(number))
            try:
                yield self
            finally:
                self.stop = True


@contextlib.asynccontextmanager
async def reader(engine):
    """Read, and hold the lock of it for HELD seconds in an open transaction."""
    async with engine.connect() as connection:
        await connection.execute(text("SELECT balance FROM account WHERE id = 1"))

        async def leave():
            await asyncio.sleep(HELD)
            await connection.rollback()
            return time.monotonic()

        task = asyncio.create_task(leave())
        try:
            yield task
        finally:
            await task


@pytest.mark.drivers(*(DRIVERS if AT_FULL_SIZE else ONE_OF_EACH))
@pytest.mark.timeout(300)
async def test_a_table_in_use(db, operate, caplog, capsys):
    """A2: with writers at work and a reader that holds a lock, no write stalls for longer than one try; the DDL is retried."""
    caplog.set_level("INFO", logger="sqla_uow")
    await db.run(FILL[db.family].format(rows=ROWS))
    before = await identity(db)
    engine = db.engine() if db.family == "sqlite" else db.engine(pool_size=WRITERS + 1, max_overflow=0)
    figures = {}

    def upgrade(op):
        op.add_version_column("account", lock_timeout=LOCK_TIMEOUT, retries=60)

    async with Traffic(engine).running() as traffic:
        for name, steps in (
            ("upgrade", upgrade),
            ("trigger", lambda op: op.create_version_trigger("account", lock_timeout=LOCK_TIMEOUT, retries=60)),
            ("downgrade", lambda op: op.drop_version_column("account", lock_timeout=LOCK_TIMEOUT, retries=60)),
            ("upgrade again", upgrade),
        ):
            caplog.clear()
            traffic.longest, traffic.written, started = 0.0, 0, time.monotonic()
            if name == "upgrade":
                async with reader(engine) as left:
                    await operate(steps)
                    ended = time.monotonic()
                    if db.family != "sqlite":  # whose readers lock no table
                        assert left.done(), "the reader did not hold up the DDL, which is to be shown"
                        assert ended >= left.result()
                        assert [r.levelname for r in caplog.records if "is in use; attempt" in r.getMessage()]
            else:
                await operate(steps)
            retried = sum("is in use; attempt" in r.getMessage() for r in caplog.records)
            figures[name] = (time.monotonic() - started, traffic.longest, traffic.written, retried)
            assert traffic.longest < max(LOCK_TIMEOUT, 1.0 if db.family == "mysql" else 0) + 1
            assert await triggers(db) == (["sqla_uow_version_account"] if name == "trigger" else [])
            if name == "upgrade":
                assert await identity(db) == before
    assert not (await columns(db))["version"]["nullable"]
    assert await db.scalar("SELECT count(*) FROM account WHERE version >= 1") == ROWS
    if AT_FULL_SIZE:  # the figures are what the long run is for
        with capsys.disabled():
            for name, (took, longest, written, retried) in figures.items():
                did = f"{took:.2f} s, {retried} retries, {written} writes meanwhile, the longest {longest:.2f} s"
                print(f"\n{db.driver}, {ROWS} rows, {name}: {did}", end="")  # noqa: T201  # figures, with -s


@pytest.mark.drivers("asyncpg", "psycopg", "asyncmy", "aiomysql")
async def test_a_table_that_is_never_free(db, operate):
    """A2: after the last try one clear error, nothing is left behind and the session's own limit is as before."""
    engine = db.engine()
    async with engine.connect() as connection:
        await connection.execute(text("SELECT count(*) FROM account"))
        with pytest.raises(CommandError) as caught:
            await operate(lambda op: op.add_version_column("account", lock_timeout=0.2, retries=1))
    assert str(caught.value) == (
        "table 'account' was in use for all of 2 tries of 0.2 s; look for a long transaction that uses it, or pass more retries"
    )
    assert "version" not in await columns(db)

    def add(op):
        op.add_version_column("account", lock_timeout=0.2)
        setting = {"postgresql": "SHOW lock_timeout", "mysql": "SELECT @@SESSION.lock_wait_timeout"}[db.family]
        return op.get_bind().scalar(text(setting))

    assert await operate(add) in ("0", 86400)


@pytest.mark.drivers("asyncpg", "psycopg")
async def test_one_try_behind_other_ddl(db, operate):
    """A2: no retries while this transaction holds the lock of another table, for whose sake others would wait all along."""
    engine = db.engine()

    def steps(op):
        op.execute("ALTER TABLE note ADD COLUMN more INTEGER")
        op.add_version_column("account", lock_timeout=0.2)

    async with engine.connect() as connection:
        await connection.execute(text("SELECT count(*) FROM account"))
        started = time.monotonic()
        with pytest.raises(CommandError) as caught:
            await operate(steps)
        assert time.monotonic() - started < 2
    assert str(caught.value) == (
        "table 'account' was in use for all of 1 tries of 0.2 s, one only because this transaction has locked other tables "
        "before; put the operation first, in a migration of its own, with transaction_per_migration=True"
    )
    assert "more" not in await columns(db, "note")


@pytest.mark.drivers("asyncpg", "psycopg")
async def test_an_autocommit_block_is_refused(db, operate):
    """A2: outside a transaction nothing would limit the wait."""
    engine = db.engine(isolation_level="AUTOCOMMIT")

    def steps(connection):
        Operations(MigrationContext.configure(connection)).add_version_column("account")

    async with engine.connect() as connection:
        with pytest.raises(CommandError) as caught:
            await connection.run_sync(steps)
    assert str(caught.value) == (
        "table 'account' is to be changed in an autocommit block, where nothing limits how long it waits for its lock; put "
        "the operation outside the block"
    )


async def test_another_failure_is_not_retried(db, operate):
    """A2: what is no lock that was not to be had goes straight through."""
    if db.family == "sqlite":
        return
    await db.run("CREATE TABLE child (id INTEGER PRIMARY KEY, version INTEGER NOT NULL)")
    await db.run(
        "CREATE VIEW needs AS SELECT version FROM child"
        if db.family == "postgresql"
        else "ALTER TABLE child ADD CONSTRAINT needs CHECK (version > id)"
    )
    with pytest.raises(DBAPIError, match="version"):
        await operate(lambda op: op.drop_version_column("child"))
