import asyncio
import os
import signal
import time
from pathlib import Path

import pytest
from alembic.util import CommandError
from sqlalchemy import text
from sqlalchemy.util import await_only

from sqla_uow.alembic import migration_lock
from tests.alembic.project import Project
from tests.slow import eventually


@pytest.fixture
def project(db, tmp_path):
    """A project on the test's database."""
    return Project(tmp_path / "project", db.url)


CREATE = (
    "op.execute('INSERT INTO account (id, balance) VALUES (1, 0)'); time.sleep(1); op.add_version_column('account')"
)


async def test_five_at_once(db, project):
    """A4: of five processes that run `upgrade head` at once one works and none fails."""
    project.revision("one", None, CREATE)
    processes = [await project.start("upgrade", "head") for _ in range(5)]
    outputs = await asyncio.gather(*(process.communicate() for process in processes))
    assert [process.returncode for process in processes] == [0] * 5, outputs
    assert await db.rows("SELECT id, version FROM account") == [(1, 1)]
    assert await db.rows("SELECT version_num FROM alembic_version") == [("one",)]


async def test_the_holder_is_killed(db, project, tmp_path):
    """A4: the lock of a runner that is killed -9 is free, what it had begun is undone, and another one goes on."""
    reached = tmp_path / "reached"
    wait = f"pathlib.Path({str(reached)!r}).exists() or (pathlib.Path({str(reached)!r}).touch(), time.sleep(60))"
    project.revision("one", None, f"{wait}; {CREATE}")
    first = await project.start("upgrade", "head")
    await eventually(reached.exists, 20)
    second = await project.start("upgrade", "head")
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(asyncio.shield(second.wait()), 2)  # it waits
    os.kill(first.pid, signal.SIGKILL)
    output = (await second.communicate())[0]
    assert second.returncode == 0, output
    assert await first.wait() == -signal.SIGKILL
    await first.communicate()
    assert await db.rows("SELECT id, version FROM account") == [(1, 1)]


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


async def locked(db, body, *, seconds=1.0, **options):
    """Hold the lock on one connection while `body(connection)` runs."""
    engine = db.engine(**options)

    def run(connection):
        with migration_lock(connection, timeout=seconds):
            return body(connection)

    async with engine.connect() as connection:
        return await connection.run_sync(run)


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
    await eventually(lambda: no_more(db, before + 1))


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
