"""PostgreSQL in the place of CockroachDB and of YugabyteDB.

Neither of them can be had by pip or by Debian's apt, so none runs here.  What their drivers, dialects and wire have in common
with PostgreSQL's is real: `cockroachdb+asyncpg` and `cockroachdb+psycopg` of sqlalchemy-cockroachdb speak to a PostgreSQL, and
`postgresql+...` to one that announces itself as YugabyteDB does.  Errors are raised by the server, with the codes and words of
their documentation.
"""

from __future__ import annotations

import pytest
from sqlalchemy import make_url

from tests.distributed.relay import announced_as
from tests.kit.databases import Database
from tests.kit.losses import Wire
from tests.servers import Proxy


class Cockroach(Database):
    """A database behind the dialect cockroachdb; what is looked up in it goes past that."""

    def engine(self, **options):
        """Make an engine, as `Database` does."""
        url = make_url(self.server.url(self.driver, port=options.pop("port", None), database=self.name))
        return super().engine(url=url.set(drivername=f"cockroachdb+{self.driver}"), **options)


@pytest.fixture
async def cockroach(driver, databases, tmp_path):
    """A fresh database, with the tables of `tests.kit.models`."""
    plain = databases.make(driver, tmp_path)
    database = Cockroach(driver, plain.url, plain.server)
    await database.create_tables()
    yield database
    await database.dispose()
    await plain.dispose()


@pytest.fixture
async def cockroach_wire(cockroach):
    """An account behind a proxy."""
    await cockroach.run("DROP TABLE IF EXISTS sqla_uow_commits", "INSERT INTO account (id, balance) VALUES (1, 0)")
    with Proxy("127.0.0.1", cockroach.server.port) as proxy:
        wire = Wire(cockroach, proxy)
        yield wire
        proxy.forward_all()
        await wire.engine.dispose()


@pytest.fixture
async def yugabyte(db):
    """A database that announces itself as YugabyteDB 2025.1 does, and runs READ COMMITTED as its table `effective` says."""
    await db.run(
        "CREATE TABLE effective (level text)",
        "INSERT INTO effective VALUES ('repeatable read')",
        "CREATE FUNCTION yb_get_effective_transaction_isolation_level() RETURNS text LANGUAGE sql AS "
        "'SELECT level FROM effective'",
    )
    async with announced_as("15.2-YB-2025.1.0.0-b168", db.server.port) as port:
        db.relay_port = port
        db.relayed = lambda **options: db.engine(port=port, **options)
        yield db
