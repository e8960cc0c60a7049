import asyncio
import contextlib
import os
import signal
import sqlite3
import time
from pathlib import Path

import pytest
from alembic.util import CommandError
from sqlalchemy import create_engine, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.util import await_only

from sqla_uow._alembic.databases import schema_of
from sqla_uow._alembic.postgresql import PostgreSQLLock
from sqla_uow._alembic.schema import Patience
from sqla_uow._alembic.sqlite import SQLiteLock
from sqla_uow.alembic import migration_lock
from tests.alembic.locking import locked
from tests.alembic.project import Project
from tests.kit.databases import ONE_OF_EACH
from tests.kit.waiting import until


@pytest.fixture
def project(db, tmp_path):
    """A project on the test's database."""
    return Project(tmp_path / "project", db.url)


CREATE = (
    "op.execute('INSERT INTO account (id, balance) VALUES (1, 0)'); time.sleep(1); op.add_version_column('account')"
)


@pytest.mark.drivers(*ONE_OF_EACH)
async def test_five_at_once(db, project):
    """A4: of five processes that run `upgrade head` at once one works and none fails."""
    project.revision("one", None, CREATE)
    processes = [await project.start("upgrade", "head") for _ in range(5)]
    outputs = await asyncio.gather(*(process.communicate() for process in processes))
    assert [process.returncode for process in processes] == [0] * 5, outputs
    assert await db.rows("SELECT id, version FROM account") == [(1, 1)]
    assert await db.rows("SELECT version_num FROM alembic_version") == [("one",)]


ASKED = """
import pathlib
from sqla_uow._alembic import run

def sleep(connection, seconds, sleep=run.sleep):
    pathlib.Path("asked").touch()
    sleep(connection, seconds)

run.sleep = sleep
"""


@pytest.mark.drivers(*ONE_OF_EACH)
async def test_the_holder_is_killed(project, db):
    """A4: nobody comes in while a runner holds the lock; if it is killed -9 what it had begun is undone and another goes on.

    The runner is at first in an autocommit block, where nothing but the lock keeps others out: neither Alembic's table
    that is being made, nor a row, nor SQLite's one writer.
    """
    entered, asked, begun = (project.folder / name for name in ("entered", "asked", "begun"))
    enter = "pathlib.Path('entered').open('a').write(f'{os.getpid()}\\n'); "
    project.revision("one", None, "pass")
    await project.alembic("upgrade", "head")
    env = project.folder / "migrations/env.py"
    env.write_text(ASKED + env.read_text())  # after what runs in this process, which has other tests to run
    project.revision("two", "one", f"with op.get_context().autocommit_block(): {enter} until('go on')")
    stop = "pathlib.Path('begun').exists() or (pathlib.Path('begun').touch(), time.sleep(60))"
    insert = "op.execute('INSERT INTO account (id, balance) VALUES (1, 0)')"
    project.revision("three", "two", f"{insert}; {stop}; op.add_version_column('account')")
    first = await project.start("upgrade", "head")
    await until(entered.exists, seconds=20)
    second = await project.start("upgrade", "head")
    await until(lambda: asked.exists() or entered.read_text().count("\n") > 1, seconds=20)
    assert entered.read_text() == f"{first.pid}\n"
    (project.folder / "go on").touch()
    await until(begun.exists, seconds=20)
    os.kill(first.pid, signal.SIGKILL)
    output = (await second.communicate())[0]
    assert second.returncode == 0, output
    await first.communicate()
    assert first.returncode == -signal.SIGKILL
    assert await db.rows("SELECT id, version FROM account") == [(1, 1)]


@pytest.mark.drivers(*ONE_OF_EACH)
async def test_it_survives_an_autocommit_block(db, project):
    """A4: the lock is held through autocommit_block(), and three runners with CREATE INDEX CONCURRENTLY do not wait for ever."""
    how = "CONCURRENTLY " if db.family == "postgresql" else ""
    block = f"with op.get_context().autocommit_block(): op.execute('CREATE INDEX {how}ix ON account (balance)')"
    project.revision("one", None, block)
    project.revision("two", "one", CREATE)
    processes = [await project.start("upgrade", "head") for _ in range(3)]
    outputs = await asyncio.gather(*(process.communicate() for process in processes))
    assert [process.returncode for process in processes] == [0] * 3, outputs
    assert await db.rows("SELECT id, version FROM account") == [(1, 1)]


@pytest.mark.drivers(*ONE_OF_EACH)
async def test_half_a_migration_is_undone(db, project):
    """A4: run_migrations makes each migration one transaction, on SQLite too; MariaDB cannot undo DDL."""
    project.revision("one", None, "op.execute('CREATE TABLE half (id INTEGER PRIMARY KEY)'); op.execute('nonsense')")
    process = await project.start("upgrade", "head")
    output = (await process.communicate())[0]
    assert process.returncode != 0
    assert b"nonsense" in output
    if db.family != "mysql":
        with pytest.raises(Exception, match="half"):
            await db.rows("SELECT * FROM half")


POOL_OF_ONE = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 1}


async def test_it_waits_no_longer_than_told(db):
    """A4: a second runner gives up after its timeout with an error that says so; then the lock is free again."""

    async def second():
        started = time.monotonic()
        with pytest.raises(TimeoutError) as caught:
            await locked(db, lambda _: None, seconds=0.3)
        name = Path(db.url.partition("?")[0]).name
        assert str(caught.value) == (
            f"another runner has held the migration lock of {name!r} for all of 0.3 s; wait for it to end, or give "
            "migration_lock() a longer timeout"
        )
        assert 0.3 <= time.monotonic() - started < 3

    await locked(db, lambda _: await_only(second()), **POOL_OF_ONE)
    await locked(db, lambda _: None, seconds=0.0)


async def test_it_takes_nothing_of_the_pool(db):
    """A4: its connection is of no pool: a pool of one is enough, and when it ends no session of it is left."""
    before = len(await db.sessions())
    assert await locked(db, lambda connection: connection.scalar(text("SELECT 1")), **POOL_OF_ONE) == 1
    await until(lambda: no_more(db, before + 1))


async def no_more(db, number):
    """Say whether there are at most so many sessions."""
    return len(await db.sessions()) <= number


@pytest.mark.drivers("asyncpg", "psycopg", "asyncmy", "aiomysql")
async def test_a_lost_lock_is_said(db):
    """A4: a runner whose lock was lost on its way says so at the end."""

    def lose(connection):
        statement = {
            "postgresql": "SELECT pg_terminate_backend(pid, 5000) FROM pg_locks WHERE locktype = 'advisory'",
            "mysql": "SELECT concat('KILL ', IS_USED_LOCK(concat('sqla_uow.migration_lock.', database())))",
        }[db.family]
        kill = connection.scalar(text(statement))
        if db.family == "mysql":
            connection.execute(text(kill))
        return kill

    with pytest.raises(CommandError) as caught:
        await locked(db, lose)
    assert str(caught.value) == (
        "the migration lock was lost before the migrations ended, so another runner may have run beside this one; compare "
        "the schema with its revision"
    )


async def test_a_failing_body_frees_it(db):
    """A4: the body's own error goes on, and the lock is free."""

    def fail(_connection):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        await locked(db, fail)
    await locked(db, lambda _: None, seconds=0.0)


@pytest.mark.drivers("sqlite")
async def test_a_removed_lock_file_is_said(db):
    """A4: on SQLite, who removes the file lets another runner in; that is said at the end."""
    with pytest.raises(CommandError, match="the migration lock was lost"):
        await locked(db, lambda _: Path(f"{db.url.partition('///')[2]}.migration-lock").unlink())


@pytest.mark.drivers("sqlite")
async def test_a_database_in_memory_needs_none(driver):
    """A4: nobody else sees it; a sync engine will do as well."""
    engine = create_engine("sqlite://")
    with engine.connect() as connection, migration_lock(connection):
        assert connection.scalar(text("SELECT 1")) == 1
    engine.dispose()


@pytest.mark.drivers("sqlite")
async def test_a_sync_runner_waits_too(db):
    """A4: an env.py without asyncio."""
    engine = create_engine(f"sqlite:///{db.url.partition('///')[2]}")
    with (
        engine.connect() as one,
        engine.connect() as other,
        migration_lock(one),
        pytest.raises(TimeoutError),
        migration_lock(other, timeout=0.15),
    ):
        pass
    engine.dispose()


@pytest.mark.drivers("asyncpg", "psycopg")
@pytest.mark.parametrize("mode", ["session", "transaction"])
async def test_a_pooler(db, monkeypatch, mode):
    """A4: a pooler tells the client of another process than the server's; only one that changes it is refused."""
    monkeypatch.setattr(PostgreSQLLock, "_told", lambda _self: 0)
    if mode == "session":
        await locked(db, lambda _: None)
        return
    processes = iter(range(1, 9))
    monkeypatch.setattr(PostgreSQLLock, "_process", lambda _self: next(processes))
    with pytest.raises(CommandError) as caught:
        await locked(db, lambda _: None)
    assert str(caught.value) == (
        "the migration lock needs a session of its own, but PostgreSQL is reached through a pooler in transaction mode; "
        "give the migrations a URL that leads to PostgreSQL itself"
    )


async def test_without_the_lock(db, project):
    """A4: run_migrations(timeout=None) leaves the lock to others."""
    env = project.folder / "migrations/env.py"
    env.write_text(env.read_text().replace("timeout=30", "timeout=None"))
    project.revision("one", None, "op.add_version_column('account')")
    held = asyncio.Event()

    def run(_connection):
        await_only(project.alembic("upgrade", "head"))
        held.set()

    await locked(db, run)
    assert held.is_set()
    assert await db.rows("SELECT version_num FROM alembic_version") == [("one",)]


async def test_a_block_in_this_process(db, project):
    """A4: autocommit_block() within run_migrations is really outside a transaction."""
    how = "CONCURRENTLY " if db.family == "postgresql" else ""
    block = f"with op.get_context().autocommit_block(): op.execute('CREATE INDEX {how}ix ON account (balance)')"
    project.revision("one", None, block)
    await project.alembic("upgrade", "head")
    assert await db.rows("SELECT version_num FROM alembic_version") == [("one",)]


async def test_not_inside_a_transaction(db):
    """A4: the lock would be free before the COMMIT, and on MariaDB the transaction would see the revision of before."""
    async with db.engine().begin() as connection:
        await connection.execute(text("SELECT 1"))

        def run(sync):
            with migration_lock(sync):
                raise AssertionError("it runs")

        with pytest.raises(CommandError) as caught:
            await connection.run_sync(run)
    assert str(caught.value) == (
        "migration_lock() was begun inside a transaction of the connection, which would commit after the lock is free; begin "
        "it first, around context.begin_transaction()"
    )


@pytest.mark.drivers("sqlite")
def test_a_lock_file_that_cannot_be_used(driver, tmp_path):
    """A4: somebody has put it into write-ahead mode, and something stands where that keeps its index: said, not waited for."""
    path = tmp_path / "bank.db.migration-lock"
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
    Path(f"{path}-shm").mkdir()
    lock = SQLiteLock(str(tmp_path / "bank.db"))
    with pytest.raises(sqlite3.OperationalError) as caught:
        lock.try_acquire()
    assert caught.value.sqlite_errorcode != sqlite3.SQLITE_BUSY
    lock.close()


@pytest.mark.drivers("asyncmy", "aiomysql")
async def test_a_connection_lost_while_it_waits_for_a_table(db):
    """A2: there is nothing to set back on it, and the loss is what is raised."""

    def lose(connection):
        with schema_of(connection).limit(connection, Patience()):
            number = connection.scalar(text("SELECT connection_id()"))
            db.server.execute(f"KILL {number}")
            connection.execute(text("SELECT 1"))

    async with db.engine().connect() as connection:
        with pytest.raises(DBAPIError) as caught:
            await connection.run_sync(lose)
        assert caught.value.connection_invalidated
