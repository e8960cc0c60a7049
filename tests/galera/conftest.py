"""Three Galera nodes, started once."""

from __future__ import annotations

import os

import pytest
from sqlalchemy.ext.asyncio import create_async_engine

from tests.servers import Cluster
from tests.servers.galera import Node
from tests.waiting import until

collect_ignore = [] if os.environ.get("SQLA_UOW_GALERA") else ["test_cluster.py"]  # half a minute: tox -e galera


class Nodes:
    """The cluster, and the engines that were made on it."""

    def __init__(self, driver, cluster):
        self.driver = driver
        self.nodes = cluster.nodes
        self._engines = []

    def engine(self, number, *, port=None, **options):
        """Make an engine on one node; `port` puts a proxy before it."""
        engine = create_async_engine(self.nodes[number].url(self.driver, port=port), **options)
        self._engines.append(engine)
        return engine

    def own(self, engine):
        """Dispose of an engine at the end."""
        self._engines.append(engine)
        return engine

    def rows(self, number, statement):
        """Return what a node shows, with all that is certified applied."""
        return self.nodes[number].execute(f"SET SESSION wsrep_sync_wait = 15; {statement}")

    async def dispose(self):
        for engine in self._engines:
            await engine.dispose()

    async def whole(self):
        """Restart who is missing, and wait until all are well."""
        for node in self.nodes:
            if node.pid is None:
                node.restart()
        await until(lambda: all(node.state() == "Synced" for node in self.nodes), seconds=30)


@pytest.fixture(scope="session")
def cluster():
    """Provide three nodes."""
    if (reason := Node.unavailable()) is not None:
        pytest.skip(reason)
    with Cluster() as cluster:
        cluster.nodes[0].execute(
            "CREATE TABLE account (id INTEGER PRIMARY KEY, balance INTEGER NOT NULL);"
            "CREATE TABLE ledger (id CHAR(36) PRIMARY KEY)"
        )
        yield cluster


@pytest.fixture
async def nodes(driver, cluster):
    """The nodes with four accounts and an empty ledger, and whole again at the end."""
    nodes = Nodes(driver, cluster)
    cluster.nodes[0].execute(
        "DELETE FROM ledger; DELETE FROM account; INSERT INTO account VALUES (0, 0), (1, 0), (2, 0), (3, 0)"
    )
    nodes.rows(1, "SELECT 1")
    nodes.rows(2, "SELECT 1")
    yield nodes
    await nodes.dispose()
    await nodes.whole()
