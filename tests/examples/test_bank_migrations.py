"""The bank's migrations: what makes its tables, and what a person types."""

from __future__ import annotations

import asyncio
import sys
import threading
from io import StringIO
from pathlib import Path

import pytest
from alembic.config import Config
from sqlalchemy import inspect
from sqlalchemy.util import await_only

from alembic import command
from examples.bank.models import VERSION_TABLE
from examples.bank.runner import schema
from sqla_uow import UnitOfWorkManager
from tests.alembic.catalog import columns, triggers
from tests.alembic.locking import locked
from tests.kit.databases import ONE_OF_EACH
from tests.kit.waiting import until

pytestmark = pytest.mark.drivers(*ONE_OF_EACH)  # test_bank.py starts the bank, and so migrates, by each driver
CHECKOUT = Path(__file__).parents[2]
INI = "examples/bank/migrations/alembic.ini"
ACCOUNT = "sqla_uow_bank_account"
TRIGGER = "sqla_uow_version_sqla_uow_bank_account"


@pytest.fixture
def alembic(db):
    """Run a command of Alembic's on the bank's migrations, and return what it wrote."""

    async def run(name, *arguments, **options):
        output = StringIO()
        config = Config(CHECKOUT / INI, stdout=output, output_buffer=output)
        config.attributes["url"] = db.url
        await asyncio.to_thread(getattr(command, name), config, *arguments, **options)
        return output.getvalue()

    return run


async def tables(db):
    """Return the names of the bank's tables that are there."""
    async with db.outside() as connection:
        names = await connection.run_sync(lambda sync: inspect(sync).get_table_names())
    return sorted(name for name in names if name.startswith("sqla_uow_bank_"))


async def test_there_and_back_and_there_again(db, alembic):
    """A2: each step can be undone and done again, and what the migrations make is what the models say."""
    for target in ("head", "0001", "head", "base", "head"):
        await alembic("downgrade" if target in ("0001", "base") else "upgrade", target)
        assert ("version" in await columns(db, ACCOUNT) if target != "base" else False) is (target == "head")
        assert await triggers(db) == ([TRIGGER] if target == "head" else [])
    assert await alembic("check") == "No new upgrade operations detected.\n"


async def test_accounts_of_before_get_a_version(db, alembic):
    """A2, A3: rows that were there have version 1, and a write past the ORM counts."""
    await alembic("upgrade", "0001")
    await db.run(f"INSERT INTO {ACCOUNT} (id, owner, credit, balance) VALUES (1, 'Ada', 0, 0)")
    await alembic("upgrade", "head")
    assert await db.rows(f"SELECT version FROM {ACCOUNT}") == [(1,)]
    await db.run(f"UPDATE {ACCOUNT} SET credit = 5")
    assert await db.rows(f"SELECT version FROM {ACCOUNT}") == [(2,)]


async def test_the_bank_leaves_nothing(db):
    """The example's tables, triggers and notes of revisions are gone when it is closed; another's tables stay."""
    manager = UnitOfWorkManager(db.engine())
    async with schema.opened(manager, 2, keep=False):
        assert len(await tables(db)) == 5
        assert await triggers(db) == [TRIGGER]
    assert await tables(db) == []
    assert await triggers(db) == []
    assert await db.rows("SELECT * FROM account") == []
    if db.family == "postgresql":
        assert await db.rows("SELECT proname FROM pg_proc WHERE proname LIKE 'sqla_uow%'") == []


CREATE = """
import asyncio, sys
from sqlalchemy.ext.asyncio import create_async_engine
from examples.bank.runner import schema
from examples.bank.models import VERSION_TABLE

async def main():
    engine = create_async_engine(sys.argv[1])
    print("ready", flush=True)
    sys.stdin.readline()
    try:
        await schema.create(engine)
    except schema.TablesExistError:
        print("refused")
    else:
        print("made")
    await engine.dispose()

asyncio.run(main())
"""


async def test_of_two_that_start_at_once_one_is_refused(db):
    """A4: both find no tables, one migrates, the other is told so and touches nothing."""
    processes = [await python("-c", CREATE, db.url, stdin=asyncio.subprocess.PIPE) for _ in range(2)]
    for process in processes:
        assert await process.stdout.readline() == b"ready\n"
    answers = [output.decode() for output, _ in await asyncio.gather(*(p.communicate(b"go\n") for p in processes))]
    assert sorted(answer.splitlines()[-1] for answer in answers) == ["made", "refused"]  # asyncmy has a word on names
    assert len(await tables(db)) == 5


async def python(*arguments, **streams):
    """Start Python in the checkout."""
    return await asyncio.create_subprocess_exec(
        sys.executable, *arguments, cwd=CHECKOUT,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT, **streams,
    )  # fmt: skip


@pytest.mark.parametrize("another", [False, True])
async def test_ctrl_c_while_it_migrates(db, monkeypatch, another):
    """Who is cancelled leaves no table that his migrations made, and takes none away that another one's made meanwhile."""
    engine, started, ended, upgrade = db.engine(), threading.Event(), threading.Event(), command.upgrade

    def begin(*arguments):
        started.set()
        upgrade(*arguments)
        ended.set()

    monkeypatch.setattr(command, "upgrade", begin)

    async def cancel():
        creating = asyncio.create_task(schema.create(engine))
        await until(started.is_set)
        creating.cancel()
        if another:
            await db.run(f"CREATE TABLE {VERSION_TABLE} (version_num VARCHAR(32) PRIMARY KEY)")
            await db.run(f"INSERT INTO {VERSION_TABLE} VALUES ('0004')")
        return creating

    creating = await locked(db, lambda _: await_only(cancel()))  # so that the migrations wait
    with pytest.raises(asyncio.CancelledError):
        await creating
    assert ended.is_set()
    assert await tables(db) == ([VERSION_TABLE] if another else [])


@pytest.mark.drivers("sqlite")
async def test_the_command_by_hand(db):
    """From a checkout, with the database after -x; without it, one line says what to pass."""

    async def typed(*arguments):
        process = await python("-m", "alembic", "-c", INI, *arguments)
        return (await process.communicate())[0].decode(), process.returncode

    assert await typed("-x", f"url={db.url}", "upgrade", "head") == ("", 0)
    assert await db.rows(f"SELECT version_num FROM {VERSION_TABLE}") == [("0004",)]
    output, status = await typed("current")
    assert status != 0
    assert "the bank's database is not known; pass -x url=postgresql+asyncpg://user@host/database" in output


async def test_a_script(alembic):
    """A2: --sql writes what somebody else is to run, without looking at the database."""
    script = await alembic("upgrade", "0001:head", sql=True)
    assert f"ALTER TABLE {ACCOUNT} ADD COLUMN version INTEGER" in script
    assert f"TRIGGER {TRIGGER} " in script
    assert f"UPDATE {VERSION_TABLE} SET version_num='0002'" in script
