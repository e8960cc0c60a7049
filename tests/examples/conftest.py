"""The bank, open on a test's database behind a real server."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, NamedTuple

import pytest

from examples.bank.runner import audit, load, schema
from examples.bank.runner.serving import served
from examples.bank.runner.tally import Tally
from examples.bank.web import create_app
from sqla_uow import UnitOfWorkManager
from tests.kit.waiting import until_free

if TYPE_CHECKING:
    import httpx

ACCOUNTS = 4


class Bank(NamedTuple):
    """The service, and a client of it."""

    manager: UnitOfWorkManager
    address: str
    client: httpx.AsyncClient

    async def account(self, number):
        """Return an account and its etag."""
        answer = await self.client.get(f"/accounts/{number}")
        assert answer.status_code == 200
        return answer.json(), answer.headers["etag"]

    async def broken_rules(self):
        """Return the rules of the bank that do not hold, and how many connections stay in use.

        A letter to a payee is written after the answer, and takes a connection for a moment.
        """
        with self.manager.activate():
            found = await audit.inspect_books(Tally())
        rules = [finding for finding in found[:4] if not finding.holds]  # the last is about what the load has edited
        pool = self.manager.engine.sync_engine.pool
        with contextlib.suppress(TimeoutError):
            await until_free(self.manager.engine)
        return rules, pool.checkedout()


@pytest.fixture
async def bank(db):
    """The bank, with accounts of 200.00 each."""
    manager = UnitOfWorkManager(db.engine())
    async with (
        schema.opened(manager, ACCOUNTS, keep=False),
        served(create_app(manager)) as address,
        load.client_of(address, workers=30) as client,
    ):
        yield Bank(manager, address, client)
