"""Torture takes minutes, so it has an environment of its own: tox -e torture."""

from __future__ import annotations

import os

import pytest

from tests.kit.databases import SERVERS
from tests.servers import MariaDB
from tests.torture.bank import Bank

collect_ignore_glob = [] if os.environ.get("SQLA_UOW_TORTURE") else ["test_*.py"]


@pytest.fixture
def settings(driver):
    """Set the server as the torture needs it."""
    kind = SERVERS[driver]
    if (reason := kind.unavailable()) is not None:
        pytest.skip(reason)
    return {"innodb_flush_log_at_trx_commit": "2"} if kind is MariaDB else {"max_connections": "60"}


@pytest.fixture
def server(driver, settings):
    """A server of this test's own, with the bank's tables."""
    with SERVERS[driver](settings) as server:
        server.execute(";".join(Bank.tables()))
        yield server
