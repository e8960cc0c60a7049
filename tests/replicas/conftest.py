"""A primary and its replica, per kind of database; started once, as they are slower to start than a test to run."""

from __future__ import annotations

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from sqla_uow import UnitOfWorkManager, current_session, transactional
from tests.kit.databases import SERVERS
from tests.kit.waiting import until
from tests.servers import MariaDB, PostgreSQL, Replica, Standby

LOG = {"log_bin": "log", "server_id": "1"}
# A standby that was killed replays again from its last restart point, and finds changes of pages that it has not any more:
# "PANIC: WAL contains references to invalid pages", seen once.
WHOLE = {"full_page_writes": "on"}


class Pair:
    """A primary with the table `note`, a replica, and a manager over both."""

    def __init__(self, driver, primary, replica):
        self.driver = driver
        self.primary = primary
        self.replica = replica
        self.engines = []

    def engine(self, server, *, port=None, **options):
        engine = create_async_engine(server.url(self.driver, port=port), **options)
        self.engines.append(engine)
        return engine

    def manager(self, *, replica=None, port=None, **options):
        """Return a manager; `port` puts a proxy before the replica."""
        replica = replica or self.engine(self.replica, port=port)
        return UnitOfWorkManager(self.engine(self.primary), replicas=[replica], **options)

    async def caught_up(self):
        """Wait until the replica shows all that is written."""
        wanted = self.primary.execute("SELECT count(*), coalesce(max(id), 0) FROM note")
        await until(lambda: self.replica.execute("SELECT count(*), coalesce(max(id), 0) FROM note") == wanted)


@pytest.fixture(scope="session")
def pairs():
    """Provide a primary and a replica of each kind that is asked for."""
    made = {}
    yield made
    for primary, replica in made.values():
        replica.stop()
        primary.stop()


@pytest.fixture
async def pair(driver, pairs):
    """A primary and its replica with an empty table; they replay again at the end, whatever the test did."""
    kind = SERVERS[driver]
    if kind not in pairs:
        if (reason := kind.unavailable()) is not None:
            pytest.skip(reason)
        primary = PostgreSQL(WHOLE) if kind is PostgreSQL else MariaDB(LOG)
        primary.start()
        primary.execute("CREATE TABLE note (id INTEGER PRIMARY KEY)")
        replica = Standby(primary) if kind is PostgreSQL else Replica(primary)
        replica.start()
        pairs[kind] = primary, replica
    pair = Pair(driver, *pairs[kind])
    pair.primary.execute("DELETE FROM note")
    await pair.caught_up()
    yield pair
    for engine in pair.engines:
        await engine.dispose()
    if pair.replica.pid is None:
        pair.replica.restart()
    pair.replica.resume()


@transactional
async def write(number):
    """Write one row."""
    await current_session().execute(text("INSERT INTO note (id) VALUES (:id)"), {"id": number})


@transactional(read_only=True)
async def read():
    """Return the last row, and whether a replica said so."""
    last = await current_session().scalar(text("SELECT coalesce(max(id), 0) FROM note"))
    return last, await at_replica()


async def at_replica():
    """Say whether the session of this context is at a replica."""
    session = current_session()
    dialect = session.get_bind().dialect.name
    question = "SELECT pg_is_in_recovery()" if dialect == "postgresql" else "SELECT @@global.read_only"
    return bool(await session.scalar(text(question)))
