"""YugabyteDB through PostgreSQL's dialect, on a PostgreSQL that announces itself so: see conftest."""

from __future__ import annotations

import asyncio
import json

import pytest
from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from alembic.util import CommandError
from sqlalchemy import make_url, select

from sqla_uow import Status, UnitOfWorkManager
from sqla_uow.__main__ import main
from sqla_uow.alembic import install
from sqla_uow.errors import RollbackOnlyError
from tests.kit.models import Account
from tests.kit.statements import statements
from tests.versioning import tables

pytestmark = pytest.mark.drivers("asyncpg", "psycopg")


async def test_it_is_known_by_what_it_announces(yugabyte):
    """From the first connection on, also one that was in a warm pool; PostgreSQL itself is taken for nothing else."""
    engine = yugabyte.relayed(pool_size=1, max_overflow=0)
    async with engine.connect():
        pass
    for warm, name in ((engine, "YugabyteDB"), (yugabyte.engine(), "PostgreSQL")):
        manager = UnitOfWorkManager(warm)
        sent = statements(warm)
        async with manager.begin() as unit:
            await unit.session.execute(select(Account.id))
        assert manager._setup.database.system.title == name
        assert len(sent) == 1


async def test_a_level_that_is_replaced_is_refused(yugabyte):
    """P4: READ COMMITTED is mapped to a stronger level where its flag is off; the whole message."""
    manager = UnitOfWorkManager(yugabyte.relayed())
    with pytest.raises(ValueError, match="isolation") as caught:
        async with manager.begin(isolation="READ COMMITTED") as unit:
            await unit.session.execute(select(Account.id))
    assert str(caught.value) == (
        "begin() asks for isolation 'READ COMMITTED', which this YugabyteDB runs as REPEATABLE READ; start its tservers with "
        "yb_enable_read_committed_isolation, or ask for 'REPEATABLE READ'"
    )
    async with manager.begin(isolation="REPEATABLE READ") as unit:
        await unit.session.execute(select(Account.id))
    assert unit.status is Status.COMMITTED


async def test_a_level_that_is_honoured_is_asked_for_once(yugabyte):
    """P4: one round trip more, in the first unit of that level."""
    await yugabyte.run("UPDATE effective SET level = 'read committed'")
    engine = yugabyte.relayed()
    manager = UnitOfWorkManager(engine)
    sent = statements(engine, lambda statement: "effective" in statement)
    for _ in range(2):
        async with manager.begin(isolation="READ COMMITTED") as unit:
            await unit.session.execute(select(Account.id))
    assert sent == ["SELECT yb_get_effective_transaction_isolation_level()"]


async def test_a_refused_level_is_not_gone_on_with(yugabyte):
    """D3: also where the body catches the refusal inside a savepoint."""
    manager = UnitOfWorkManager(yugabyte.relayed(), isolation="READ COMMITTED")
    with pytest.raises(RollbackOnlyError):
        async with manager.begin() as unit:
            with pytest.raises(ValueError, match="YugabyteDB"):
                async with manager.begin(propagation="nested"):
                    unit.session.add(Account(id=1))
                    await unit.session.flush()
            unit.session.add(Account(id=2))
    assert await yugabyte.rows("SELECT id FROM account") == []


async def test_an_unknown_commit_is_found_out_by_a_row(yugabyte):
    """C2: there is no status of transactions to ask for."""
    engine = yugabyte.relayed()
    manager = UnitOfWorkManager(engine, ambiguous_commit="verify")
    sent = statements(engine)
    async with manager.begin() as unit:
        unit.session.add(Account(id=1))
    assert [statement for statement in sent if "pg_" in statement] == []
    assert await yugabyte.scalar("SELECT count(*) FROM sqla_uow_commits") == 1


async def test_limits_are_of_the_transaction(yugabyte):
    """R6: with SET LOCAL."""
    engine = yugabyte.relayed(pool_size=1, max_overflow=0)
    manager = UnitOfWorkManager(engine)
    sent = statements(engine, lambda statement: "SET" in statement)
    for timeout in (60, None):
        async with manager.begin(timeout=timeout) as unit:
            await unit.session.execute(select(Account.id))
    assert [statement.partition(" = ")[0] for statement in sent] == ["SET LOCAL statement_timeout"]


async def test_there_is_no_xmin(yugabyte):
    """V1: a table that is versioned by it is not made."""
    async with yugabyte.relayed().connect() as connection:
        with pytest.raises(
            TypeError, match="'by_xmin' is versioned by xmin, which YugabyteDB does not have; use Versioned"
        ):
            await connection.run_sync(tables.XminBase.metadata.create_all)


async def test_a_childs_trigger_is_refused(yugabyte):
    """A3: it would ask which transaction has written a row; the whole message."""
    await yugabyte.run("ALTER TABLE note ADD COLUMN version integer NOT NULL DEFAULT 1")

    def migrate(connection):
        Operations(MigrationContext.configure(connection)).create_version_trigger("note", parent="account")

    install()
    async with yugabyte.relayed().connect() as connection:
        with pytest.raises(CommandError) as caught:
            await connection.run_sync(migrate)
    assert str(caught.value) == (
        "a trigger of table 'note' cannot count for its parent 'account' on YugabyteDB, where it cannot tell whether the ORM "
        "has; leave it out, and where others write 'note' have them set version = version in 'account' too, which that "
        "table's own trigger counts"
    )


async def test_replicas_are_passed_over(yugabyte, caplog):
    """No node is a standby of PostgreSQL's, so every read is the primary's; it is said."""
    manager = UnitOfWorkManager(yugabyte.relayed(), replicas=[yugabyte.relayed()])
    async with manager.begin(read_only=True) as unit:
        await unit.session.execute(select(Account.id))
    assert unit._transaction.replica is None
    assert "replica 1 is passed over for 1 s (it takes part in no replication)" in caplog.messages


async def test_the_doctor(yugabyte, capsys):
    """It says what little it can say, and of READ COMMITTED nothing where it is not there."""
    with_relay = make_url(yugabyte.url).set(port=yugabyte.relay_port).render_as_string(hide_password=False)
    assert await asyncio.to_thread(main, ["doctor", with_relay, "--json"]) == 0
    found = {one["name"]: one for one in json.loads(capsys.readouterr().out)}
    assert set(found) == {
        "driver", "server", "default_transaction_isolation", "clock", "ambiguous_commit='verify'",
        "REPEATABLE READ", "SERIALIZABLE",
    }  # fmt: skip
    assert found["ambiguous_commit='verify'"]["value"].startswith("works: by a row")
