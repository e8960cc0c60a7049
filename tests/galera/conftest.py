"""Three Galera nodes, started once."""

from __future__ import annotations

import os
import random

import pytest
from sqlalchemy import event
from sqlalchemy.ext.asyncio import create_async_engine

from tests.kit.waiting import until
from tests.servers import Cluster
from tests.servers.galera import Node
from tests.torture.bank import SECONDS, WORKERS, Bank

collect_ignore = (
    [] if os.environ.get("SQLA_UOW_GALERA") else ["test_bank.py", "test_cluster.py"]
)  # minutes: tox -e galera

HOT = 4
"""Accounts of the bank."""


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

    def bank(self, mode):
        """Open the bank of the tortures, with workers on each node, or on the next one while it is dead."""
        pool = {"pool_size": WORKERS, "pool_timeout": SECONDS}
        engines = [self.engine(number, **pool) for number in range(len(self.nodes))]
        for number, engine in enumerate(engines):
            in_order = self.nodes[number:] + self.nodes[:number]

            @event.listens_for(engine.sync_engine, "do_connect")
            def _connect(_dialect, _record, _arguments, parameters, in_order=in_order):
                parameters["port"] = next(node.port for node in in_order if node.pid is not None)

        return Bank(*engines, ambiguous_commit=mode, seed=random.randrange(1_000_000), accounts=HOT)

    async def close(self, bank, work):
        """Let the bank come to an end, and see that what it knows is what each node shows."""
        bank.stop()
        await work
        await self.dispose()
        print(f"\n{bank}")  # noqa: T201  # the figures in the docs
        for number in range(len(self.nodes)):
            ledger = self.rows(number, "SELECT id FROM bank_ledger").split()
            bank.check(ledger, int(self.rows(number, "SELECT sum(balance) FROM bank_account")))

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
            "CREATE TABLE ledger (id CHAR(36) PRIMARY KEY);" + ";".join(Bank.tables(HOT))
        )
        yield cluster


@pytest.fixture
async def nodes(driver, cluster):
    """The nodes with four accounts and an empty ledger, and whole again at the end."""
    nodes = Nodes(driver, cluster)
    cluster.nodes[0].execute(
        "DELETE FROM ledger; DELETE FROM account; INSERT INTO account VALUES (0, 0), (1, 0), (2, 0), (3, 0);"
        "DELETE FROM bank_ledger; UPDATE bank_account SET balance = 0"
    )
    nodes.rows(1, "SELECT 1")
    nodes.rows(2, "SELECT 1")
    yield nodes
    await nodes.dispose()
    await nodes.whole()
