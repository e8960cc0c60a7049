"""What databases have to do with each other: who may be the replica of whom, and how far it is."""

from __future__ import annotations

import pytest
from sqlalchemy import text

from sqla_uow import UnitOfWorkManager
from sqla_uow._databases.distributed import CockroachDB, YugabyteDB
from sqla_uow._databases.driver import Driver
from sqla_uow._databases.mariadb import MariaDB, MySQL
from sqla_uow._databases.postgresql import PostgreSQL
from sqla_uow._databases.system import System


def test_who_may_replicate_whom():
    """MySQL's dialect leads to MariaDB as well; databases that nothing is known of are no kin of each other."""
    assert MySQL().is_kin_to(MariaDB())
    assert not MySQL().is_kin_to(PostgreSQL())
    assert System("oracle").is_kin_to(System("oracle"))
    assert not System("oracle").is_kin_to(System("mssql"))


def test_how_far_a_replica_is():
    """PostgreSQL's position is one number in two parts; MariaDB's has one for each domain."""
    assert PostgreSQL().read_position("16/B374D848") == {0: 0x16_B374_D848}
    assert MariaDB().read_position("0-1-123,7-12-5") == {0: 123, 7: 5}


def test_what_they_are_called():
    """As OpenTelemetry knows them; YugabyteDB is reached as PostgreSQL, and goes by that name."""
    names = [system.name for system in (PostgreSQL(), YugabyteDB(), CockroachDB(), MySQL(), MariaDB())]
    assert names == ["postgresql", "postgresql", "cockroachdb", "mysql", "mariadb"]


def test_a_driver_that_nothing_is_known_of():
    """It has told no version of its server."""
    assert Driver().version(object()) == ""


@pytest.mark.drivers("asyncpg", "psycopg")
@pytest.mark.parametrize(
    ("own", "kept"), [("1min", True), ("1h", False), ("1d", False), ("90s", False), ("500ms", True)]
)
async def test_a_limit_of_the_servers_in_each_unit(db, own, kept):
    """A4: a stricter one stays, whatever it is written in."""
    engine = db.engine()
    async with engine.begin() as connection:
        await connection.execute(text(f"ALTER DATABASE {db.name} SET statement_timeout = '{own}'"))
    await engine.dispose()
    try:
        async with UnitOfWorkManager(engine).begin(timeout=75) as unit:
            shown = await unit.session.scalar(text("SHOW statement_timeout"))
    finally:  # the database is the next test's
        await db.run(f"ALTER DATABASE {db.name} RESET statement_timeout")
    assert (shown == own) is kept
