"""A clerk of one branch sees nothing of another, whatever is asked of any endpoint; on PostgreSQL, whose policies see to it.

200 generated requests; 10,000 with ``SQLA_UOW_LONG``, as tox -e long sets it.
"""

from __future__ import annotations

import asyncio
import json
import os
import random

import httpx
import pytest
from sqlalchemy import make_url

from examples.bank import branches, mail, services
from examples.bank.runner import schema
from examples.bank.web import create_app
from sqla_uow import UnitOfWorkManager
from sqla_uow.testing import assert_no_leaks

pytestmark = [pytest.mark.drivers("asyncpg", "psycopg"), pytest.mark.direct("the pooler knows one role")]

REQUESTS = 10_000 if os.environ.get("SQLA_UOW_LONG") else 200
CLERK = "uow_bank_clerk"
BRANCHES = ("main", "north", "south")
ACCOUNTS = 3  # of each branch
TABLES = ("sqla_uow_bank_account", "sqla_uow_bank_entry", "sqla_uow_bank_clerk")


class Service:
    """The bank as a role that the policies hold for."""

    def __init__(self, manager):
        self.manager = manager
        self.app = create_app(manager)
        self.client = httpx.AsyncClient(transport=httpx.ASGITransport(app=self.app), base_url="http://bank")

    async def ask(self, branch, method, path, **options):
        """Send a request from the counter of a branch."""
        headers = {"x-branch": branch, **options.pop("headers", {})}
        return await self.client.request(method, path, headers=headers, **options)

    async def hear(self, branch, *, until, after):
        """Return what the feed of a branch says first, and after something was done, until certain words come."""
        said, leave = [], asyncio.Event()
        messages = [{"type": "websocket.connect"}]

        async def receive():
            if messages:
                return messages.pop()
            await leave.wait()
            return {"type": "websocket.disconnect", "code": 1000}

        async def send(message):
            said.append(message.get("text", ""))
            if until in said[-1]:
                leave.set()

        scope = {
            "type": "websocket", "path": "/feed", "raw_path": b"/feed", "query_string": b"", "headers": [(b"x-branch", branch.encode())],
            "scheme": "ws", "subprotocols": [], "client": None, "server": None, "root_path": "", "asgi": {"version": "3.0"},
        }  # fmt: skip
        listening = asyncio.create_task(self.app(scope, receive, send))
        while len(said) < 2:  # noqa: ASYNC110  # accepted, and the first message
            await asyncio.sleep(0.01)
        await after()
        async with asyncio.timeout(10):
            await listening
        return " ".join(said)


@pytest.fixture
async def service(db):
    """The bank with accounts in three branches; each owner's name says of which."""
    owner = UnitOfWorkManager(db.engine())
    async with schema.opened(owner, 0, keep=False):
        await db.run(
            f"DO $$ BEGIN CREATE ROLE {CLERK} LOGIN PASSWORD 'secret'; EXCEPTION WHEN duplicate_object THEN NULL; END $$",
            f"GRANT USAGE ON SCHEMA public TO {CLERK}",
            f"GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO {CLERK}",
            f"GRANT USAGE ON ALL SEQUENCES IN SCHEMA public TO {CLERK}",
        )
        engine = db.engine(url=make_url(db.url).set(username=CLERK, password="secret"))  # noqa: S106  # of this test's server
        manager = UnitOfWorkManager(engine, **branches.settings_for(engine))
        service = Service(manager)
        mail.SENT.clear()
        for branch in BRANCHES:
            for number in range(ACCOUNTS):
                opened = await service.ask(
                    branch, "POST", "/accounts", json={"owner": f"{branch} {number}", "credit": 50_00}
                )
                assert opened.status_code == 201
        with assert_no_leaks(manager, settings=True):
            yield service
        await service.client.aclose()
        await engine.dispose()


def others(branch, said):
    """Return the branches, other than this one, that an answer tells something of."""
    return [one for one in BRANCHES if one != branch and f"{one} " in said]


def generated(dice, branch):
    """Return a request that a clerk may send: to any endpoint, about any account."""
    number = dice.randint(1, ACCOUNTS * len(BRANCHES) + 1)
    other = dice.randint(1, ACCOUNTS * len(BRANCHES) + 1)
    money = {"amount": dice.randint(1, 100), "reference": f"{branch} {dice.random()}"}
    match = dice.choice([{}, {"if-match": "*"}, {"if-match": '"x"'}])
    wish = {"owner": f"{branch} {dice.randint(0, 9)}", "credit": 90_00}
    return dice.choice([
        ("GET", "/accounts", {"params": {"after": dice.randint(0, 5), "limit": dice.randint(1, 100)}}),
        ("GET", f"/accounts/{number}", {}),
        ("HEAD", f"/accounts/{number}", {}),
        ("PUT", f"/accounts/{number}", {"json": wish, "headers": match}),
        ("POST", "/accounts", {"json": wish}) if dice.random() < 0.1 else ("GET", "/accounts", {}),
        ("GET", f"/accounts/{number}/statement", {}),
        ("POST", f"/accounts/{number}/deposits", {"json": money}),
        ("POST", "/transfers", {"json": {"source": number, "target": other, **money}}),
        ("GET", "/clerks", {}),
        ("PUT", f"/clerks/{dice.randint(1, 3)}", {"json": {"on_duty": dice.random() < 0.5}}),
        ("GET", "/letters", {}),
        ("GET", "/openapi.json", {}),
    ])  # fmt: skip


@pytest.mark.timeout(60 + REQUESTS // 10)
async def test_no_endpoint_tells_of_another_branch(db, service):
    """Generated requests of three branches at once; and in the database nothing was done across them."""
    dice = random.Random(7)  # the same requests each time
    told = []

    async def work():
        for _ in range(REQUESTS // 4):
            branch = dice.choice(BRANCHES)
            method, path, options = generated(dice, branch)
            answer = await service.ask(branch, method, path, **options)
            assert answer.status_code < 500, answer.text
            told.extend((branch, method, path, one) for one in others(branch, answer.text.replace("/openapi", "")))

    await asyncio.gather(*(work() for _ in range(4)))
    assert told == []
    assert await db.scalar("SELECT count(DISTINCT branch) FROM sqla_uow_bank_entry") == len(BRANCHES)
    across = (
        "SELECT count(*) FROM sqla_uow_bank_entry e JOIN sqla_uow_bank_account t ON t.id = e.target "
        "LEFT JOIN sqla_uow_bank_account s ON s.id = e.source WHERE e.branch <> t.branch OR e.branch <> s.branch"
    )
    assert await db.scalar(across) == 0
    assert await db.scalar("SELECT count(*) FROM sqla_uow_bank_account WHERE owner NOT LIKE branch || ' %'") == 0
    assert mail.SENT or REQUESTS < 1000


async def test_the_feed_tells_of_its_branch_only(service):
    """The numbers of all commits are passed on in the process; what they stand for is read at the branch."""

    async def elsewhere_and_here():
        for branch in ("south", "north"):
            with_money = {"amount": 5, "reference": f"{branch} news"}
            first = (await service.ask(branch, "GET", "/accounts")).json()[0]["id"]
            assert (
                await service.ask(branch, "POST", f"/accounts/{first}/deposits", json=with_money)
            ).status_code == 201

    said = await service.hear("north", until="north news", after=elsewhere_and_here)
    assert "north 0" in said
    assert others("north", said) == []


async def test_the_account_of_another_branch_is_not_there(service):
    """404, as one that does not exist; nothing can be sent to it either."""
    theirs = (await service.ask("south", "GET", "/accounts")).json()[0]["id"]
    mine = (await service.ask("north", "GET", "/accounts")).json()[0]["id"]
    for method, path, options in (
        ("GET", f"/accounts/{theirs}", {}),
        ("GET", f"/accounts/{theirs}/statement", {}),
        ("POST", f"/accounts/{theirs}/deposits", {"json": {"amount": 5, "reference": ""}}),
        ("POST", "/transfers", {"json": {"source": mine, "target": theirs, "amount": 5, "reference": ""}}),
    ):
        assert (await service.ask("north", method, path, **options)).status_code == 404
    token = branches.branch.set("north")
    try:
        with service.manager.activate(), pytest.raises(services.NoAccountError):
            async with service.manager.begin():
                await services.account(theirs)
    finally:
        branches.branch.reset(token)


async def test_a_statement_is_read_at_its_branch(service):
    """Also what is read after the response has started."""
    mine = (await service.ask("north", "GET", "/accounts")).json()[0]["id"]
    for _ in range(3):
        await service.ask("north", "POST", f"/accounts/{mine}/deposits", json={"amount": 5, "reference": "north"})
    lines = (await service.ask("north", "GET", f"/accounts/{mine}/statement")).text.splitlines()
    assert len([json.loads(line) for line in lines]) == 3
