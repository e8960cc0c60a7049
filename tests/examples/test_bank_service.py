"""The bank's endpoints, through a real server and a real client; what they say is looked up in the database."""

from __future__ import annotations

import asyncio
import contextlib
import json

import pytest
from sqlalchemy import select, text
from sqlalchemy.ext.asyncio import create_async_engine
from starlette.routing import Route
from websockets.asyncio.client import connect

from examples.bank import mail, services
from examples.bank.feed import FEED
from examples.bank.models import Entry
from examples.bank.openapi import DOCUMENT
from examples.bank.plain import create_plain_app
from examples.bank.runner import load
from examples.bank.runner.serving import served
from examples.bank.web import routes
from sqla_uow import UnitOfWorkManager
from tests.kit.waiting import until

BALANCES = "SELECT balance FROM sqla_uow_bank_account ORDER BY id"
LEDGER = "SELECT source, target, amount, reference FROM sqla_uow_bank_entry WHERE reference <> 'opening' ORDER BY id"

DUTY = "SELECT on_duty FROM sqla_uow_bank_clerk ORDER BY number"
WAITING = (
    "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database() "
    "AND query LIKE 'UPDATE sqla_uow_bank_clerk%'"
)


def problem(answer):
    """Return what a problem says."""
    assert answer.headers["content-type"] == "application/problem+json"
    said = answer.json()
    assert said["status"] == answer.status_code
    return answer.status_code, said["detail"]


@contextlib.asynccontextmanager
async def listening(bank):
    """Connect to the feed, and take its first message."""
    async with connect(bank.address.replace("http", "ws") + "/feed", proxy=None) as feed:
        first = json.loads(await feed.recv())
        assert [account["id"] for account in first["accounts"]] == [1, 2, 3, 4]
        yield feed


async def heard(feed, number):
    """Return the messages up to the one with an entry, and fail if none comes."""
    messages = []
    async with asyncio.timeout(10):
        while not messages or number not in [entry["id"] for entry in messages[-1]["entries"]]:
            messages.append(json.loads(await feed.recv()))
    return messages


async def test_a_transfer_is_committed_when_it_is_answered(bank, db):
    """W2: another connection sees both balances and the ledger's entry as soon as the answer is there."""
    for amount in range(1, 6):
        order = {"source": 1, "target": 2, "amount": amount, "reference": f"no {amount}"}
        answer = await bank.client.post("/transfers", json=order)
        assert (await db.rows(LEDGER))[-1] == (1, 2, amount, f"no {amount}")
        assert answer.status_code == 201
        assert {name: answer.json()[name] for name in order} == order
    assert await db.rows(BALANCES) == [(199_85,), (200_15,), (200_00,), (200_00,)]


async def test_a_refusal_changes_nothing(bank, db):
    """Too little money is a 409 in words, and neither balance nor ledger knows of it."""
    answer = await bank.client.post("/transfers", json={"source": 1, "target": 2, "amount": 200_01})
    assert problem(answer) == (409, "account 1 has too little for that")
    assert (await db.rows(BALANCES), await db.rows(LEDGER)) == ([(200_00,)] * 4, [])


async def test_a_transfer_that_is_sent_again(bank, db):
    """With the same key it gets the same answer, and the money moves once; so does a refusal, and no letter is sent again."""
    order = {"source": 1, "target": 2, "amount": 5, "reference": "once"}
    answers = [await bank.client.post("/transfers", json=order, headers={"Idempotency-Key": "tea"}) for _ in range(3)]
    assert {(answer.status_code, answer.content) for answer in answers} == {(201, answers[0].content)}
    assert await db.rows(LEDGER) == [(1, 2, 5, "once")]
    letters = [letter["text"] for letter in (await bank.client.get("/letters")).json()]
    assert letters.count("Ada has sent you 0.05: once") == 1
    too_much = {"source": 1, "target": 2, "amount": 300_00}
    refused = await bank.client.post("/transfers", json=too_much, headers={"Idempotency-Key": "car"})
    await bank.client.post("/accounts/1/deposits", json={"amount": 300_00})
    again = await bank.client.post("/transfers", json=too_much, headers={"Idempotency-Key": "car"})
    assert (refused.status_code, refused.content) == (again.status_code, again.content) == (409, refused.content)
    assert again.headers["idempotent-replayed"] == "true"
    other = await bank.client.post("/transfers", json=too_much, headers={"Idempotency-Key": "tea"})
    assert (other.status_code, other.json()["code"]) == (422, "idempotency-key-reused")


async def test_transfers_at_once_lose_nothing(bank, db):
    """Thirty transfers around a circle at once: each is answered 201, and the money is what it was."""
    orders = [{"source": n % 4 + 1, "target": (n + 1) % 4 + 1, "amount": n + 1} for n in range(30)]
    answers = await asyncio.gather(*(bank.client.post("/transfers", json=order) for order in orders))
    assert [answer.status_code for answer in answers] == [201] * 30
    assert len(await db.rows(LEDGER)) == 30
    assert await bank.broken_rules() == ([], 0)


async def test_one_of_many_edits_at_one_version_is_saved(bank, db):
    """W7: twenty PUTs with one ETag: exactly one is saved, nineteen are told 412, the version rises by one."""
    _, tag = await bank.account(1)
    wishes = [{"owner": f"Ada {n}", "credit": n} for n in range(20)]
    puts = [bank.client.put("/accounts/1", json=wish, headers={"if-match": tag}) for wish in wishes]
    answers = await asyncio.gather(*puts)
    assert sorted(answer.status_code for answer in answers) == [200, *[412] * 19]
    (saved,) = [answer.json() for answer in answers if answer.status_code == 200]
    assert await db.rows("SELECT owner, credit, version FROM sqla_uow_bank_account WHERE id = 1") == [
        (saved["owner"], saved["credit"], 2)
    ]
    assert {answer.headers["content-type"] for answer in answers if answer.status_code == 412} == {
        "application/problem+json"
    }


async def test_the_etag_of_an_edit_is_that_of_the_next_read(bank):
    """W7: PUT answers with the new version's ETag, so that a second edit needs no GET between."""
    _, tag = await bank.account(1)
    first = await bank.client.put("/accounts/1", json={"owner": "Ada L."}, headers={"if-match": tag})
    second = await bank.client.put("/accounts/1", json={"owner": "Ada"}, headers={"if-match": first.headers["etag"]})
    assert (first.status_code, second.status_code) == (200, 200)
    account, tag_now = await bank.account(1)
    assert (account["owner"], account["version"], tag_now) == ("Ada", 3, second.headers["etag"])


@pytest.mark.drivers("sqlite")
async def test_a_read_of_what_the_client_has_is_304(bank):
    """W7: GET with If-None-Match answers 304 until somebody has changed the account."""
    _, tag = await bank.account(1)
    unchanged = await bank.client.get("/accounts/1", headers={"if-none-match": tag})
    await bank.client.post("/accounts/1/deposits", json={"amount": 1})
    changed = await bank.client.get("/accounts/1", headers={"if-none-match": tag})
    assert (unchanged.status_code, unchanged.content, changed.status_code) == (304, b"", 200)


@pytest.mark.drivers("sqlite")
async def test_a_transfer_makes_an_edit_stale(bank, db):
    """Moving money changes the account too: who edits what they saw before is told."""
    _, tag = await bank.account(2)
    await bank.client.post("/transfers", json={"source": 1, "target": 2, "amount": 5})
    answer = await bank.client.put("/accounts/2", json={"owner": "Me"}, headers={"if-match": tag})
    assert answer.status_code == 412
    assert await db.rows("SELECT owner, balance FROM sqla_uow_bank_account WHERE id = 2") == [("Alan", 200_05)]


@pytest.mark.drivers("sqlite")
async def test_an_edit_must_say_what_it_has_seen(bank, db):
    """W7: PUT without If-Match is 428, and nothing is written."""
    answer = await bank.client.put("/accounts/1", json={"owner": "Me"})
    assert problem(answer)[0] == 428
    assert await db.scalar("SELECT version FROM sqla_uow_bank_account WHERE id = 1") == 1


@pytest.mark.drivers("sqlite")
async def test_a_credit_below_the_debt_is_refused(bank):
    """An edit may not leave the account overdrawn."""
    _, tag = await bank.account(1)
    allowed = await bank.client.put("/accounts/1", json={"owner": "Ada", "credit": 50_00}, headers={"if-match": tag})
    moved = await bank.client.post("/transfers", json={"source": 1, "target": 2, "amount": 250_00})
    assert (allowed.status_code, moved.status_code) == (200, 201)
    _, tag = await bank.account(1)
    answer = await bank.client.put("/accounts/1", json={"owner": "Ada", "credit": 49_99}, headers={"if-match": tag})
    assert problem(answer) == (409, "the account is overdrawn by more than this credit")


async def test_an_account_is_opened_and_listed(bank):
    """POST answers 201 with the place and the ETag of the new account; the list has it, in its turn."""
    opened = await bank.client.post("/accounts", json={"owner": "Zuse \U0001f9ee", "credit": 7})
    shown = await bank.client.get(opened.headers["location"])
    assert (opened.status_code, shown.json()) == (201, opened.json())
    assert shown.headers["etag"] == opened.headers["etag"]
    listed = await bank.client.get("/accounts", params={"after": 3, "limit": 2})
    assert [account["id"] for account in listed.json()] == [4, 5]


async def test_a_clerk_leaves_while_another_one_stays(bank, db):
    """The first may leave, the last may not: 409 in words, nothing written; the list tells who is there."""
    left = await bank.client.put("/clerks/1", json={"on_duty": False})
    refused = await bank.client.put("/clerks/2", json={"on_duty": False})
    assert (left.status_code, left.json()) == (200, {"number": 1, "on_duty": False})
    assert problem(refused) == (409, "nobody would be left on duty")
    assert (await bank.client.get("/clerks")).json() == [
        {"number": 1, "on_duty": False},
        {"number": 2, "on_duty": True},
    ]
    assert [bool(on_duty) for (on_duty,) in await db.rows(DUTY)] == [False, True]
    assert (await bank.client.put("/clerks/1", json={"on_duty": True})).status_code == 200
    assert (await bank.client.put("/clerks/2", json={"on_duty": False})).status_code == 200


@pytest.mark.drivers("sqlite")
async def test_a_clerk_that_cannot_be(bank):
    """No such clerk is 404, no such wish 422."""
    nobody = await bank.client.put("/clerks/3", json={"on_duty": True})
    unclear = await bank.client.put("/clerks/1", json={"on_duty": 1})
    assert problem(nobody) == (404, "there is no clerk 3")
    assert problem(unclear) == (422, "on_duty must be true or false")


async def test_of_clerks_who_leave_at_once_one_stays(bank, db):
    """V2: ten times both leave and come at once: each is answered 200 or 409, and nobody ever finds nobody."""
    for _ in range(10):
        wishes = [(number, on_duty) for on_duty in (False, True) for number in (1, 2)]
        puts = [bank.client.put(f"/clerks/{number}", json={"on_duty": on_duty}) for number, on_duty in wishes]
        assert {answer.status_code for answer in await asyncio.gather(*puts)} <= {200, 409}
    assert await bank.broken_rules() == ([], 0)


async def both_leave(bank, db, client):
    """Have both clerks leave so that each has counted before either can write; return the statuses, in order."""
    await asyncio.gather(*(client.put(f"/clerks/{n}", json={"on_duty": True}) for n in (1, 2)))  # both are connected
    async with bank.manager.engine.connect() as connection:
        await connection.execute(text("SELECT * FROM sqla_uow_bank_clerk FOR UPDATE"))  # holds writers, not readers
        leaving = asyncio.gather(*(client.put(f"/clerks/{n}", json={"on_duty": False}) for n in (1, 2)))

        async def both_wait():
            return await db.scalar(WAITING) >= 2

        await until(both_wait)
    return sorted(answer.status_code for answer in await leaving)


@pytest.mark.drivers("asyncpg", "psycopg")
async def test_write_skew_is_refused(bank, db, caplog):
    """V2: two who leave, each having counted the other: one is run again, sees that it is the last, and is refused."""
    caplog.set_level("INFO", logger="sqla_uow")
    assert await both_leave(bank, db, bank.client) == [200, 409]
    assert "failed (conflict 40001); again in" in caplog.text  # the conflict happened
    assert sorted(await db.rows(DUTY)) == [(False,), (True,)]
    assert await bank.broken_rules() == ([], 0)


@pytest.mark.drivers("asyncpg", "psycopg")
async def test_write_skew_happens_without_the_library(bank, db):
    """The positive control: the same interleaving of plain transactions leaves nobody on duty, and tells nobody."""
    async with (
        served(create_plain_app(bank.manager.engine)) as address,
        load.client_of(address, workers=2) as client,
    ):
        assert await both_leave(bank, db, client) == [200, 200]
    assert await db.rows(DUTY) == [(False,), (False,)]
    (broken,), _ = await bank.broken_rules()
    assert broken == ("somebody is on duty", False, "0 of 2 clerks are; 0 times one who came found nobody")


async def test_a_statement_is_streamed_in_units_of_its_own(bank, monkeypatch):
    """W5: the generator runs after the request's scope has ended, and reads bit by bit through the service."""
    units = []
    read = services.entries

    async def counted(*arguments):
        units.append(arguments)
        return await read(*arguments)

    monkeypatch.setattr(services, "entries", counted)
    monkeypatch.setattr("examples.bank.web._AT_ONCE", 3)
    for amount in range(1, 5):
        await bank.client.post("/transfers", json={"source": 1, "target": 2, "amount": amount})
    answer = await bank.client.get("/accounts/1/statement")
    lines = [json.loads(line) for line in answer.text.splitlines()]
    assert answer.headers["content-type"] == "application/x-ndjson"
    assert [line["amount"] for line in lines] == [200_00, -1, -2, -3, -4]
    assert len(units) == 3
    assert (await bank.broken_rules())[1] == 0


async def test_a_letter_is_written_after_the_commit(bank):
    """W5: the background task runs after the response, in a unit of its own, once for each transfer that was made."""
    mail.SENT.clear()
    done = await bank.client.post("/transfers", json={"source": 1, "target": 2, "amount": 5, "reference": "tea"})
    await bank.client.post("/transfers", json={"source": 1, "target": 2, "amount": 999_00})  # refused

    async def letters():
        return (await bank.client.get("/letters")).json()

    await until(letters)
    assert await letters() == [{"entry": done.json()["id"], "to": "Alan", "text": "Ada has sent you 0.05: tea"}]


async def test_a_letter_that_fails_changes_nothing(bank, db, monkeypatch, caplog):
    """W5: an error in the background task is logged, and the transfer stays."""
    failed = asyncio.Event()

    class Broken:
        def append(self, _letter):
            failed.set()
            raise OSError("no mail today")

    monkeypatch.setattr(mail, "SENT", Broken())
    answer = await bank.client.post("/transfers", json={"source": 1, "target": 2, "amount": 5})
    await asyncio.wait_for(failed.wait(), 10)
    assert answer.status_code == 201
    assert await db.rows(LEDGER) == [(1, 2, 5, "")]
    assert await bank.broken_rules() == ([], 0)


async def test_the_feed_tells_of_every_commit(bank):
    """W5: the WebSocket hears of an entry with the balances of its commit; between messages nothing is held."""
    async with listening(bank) as feed:
        assert (await bank.broken_rules())[1] == 0
        booked = (await bank.client.post("/transfers", json={"source": 1, "target": 2, "amount": 5})).json()
        told = (await heard(feed, booked["id"]))[-1]
        assert told["entries"] == [booked]
        assert {account["id"]: account["balance"] for account in told["accounts"]} == {1: 199_95, 2: 200_05}
        assert (await bank.broken_rules())[1] == 0


async def test_the_feed_tells_nothing_that_was_not_committed(bank):
    """A refused transfer and a stale edit are not told; what comes next is the next commit."""
    async with listening(bank) as feed:
        await bank.client.post("/transfers", json={"source": 1, "target": 2, "amount": 999_00})
        await bank.client.put("/accounts/1", json={"owner": "Me"}, headers={"if-match": '"stale"'})
        booked = (await bank.client.post("/accounts/3/deposits", json={"amount": 5})).json()
        (told,) = await heard(feed, booked["id"])
        assert [account["id"] for account in told["accounts"]] == [3]


@pytest.mark.drivers("sqlite")
async def test_a_listener_that_leaves_is_forgotten(bank):
    """A client that goes without a word leaves neither a task nor a connection behind."""
    async with listening(bank) as feed:
        assert len(FEED._listeners) == 1
        feed.transport.abort()
    await until(lambda: not FEED._listeners)
    assert await bank.broken_rules() == ([], 0)


@pytest.mark.drivers("sqlite")
async def test_what_a_listener_says_is_ignored(bank):
    """Text, bytes and thousands of messages from the client change nothing, and it still hears."""
    async with listening(bank) as feed:
        for n in range(2000):
            await feed.send("{" if n % 2 else b"\x00\xff")
        booked = (await bank.client.post("/accounts/1/deposits", json={"amount": 5})).json()
        assert (await heard(feed, booked["id"]))[-1]["entries"] == [booked]


@pytest.mark.drivers("sqlite")
async def test_a_read_session_sees_no_half_of_a_transfer(bank):
    """S7: an endpoint's read is in the request's read session, and the ledger's rows are what the ORM has."""
    await bank.client.post("/transfers", json={"source": 1, "target": 2, "amount": 5})
    async with bank.manager.begin(read_only=True) as unit:
        (entry,) = (await unit.session.scalars(select(Entry).where(Entry.amount == 5))).all()
    assert (entry.source, entry.target) == (1, 2)


def methods(route):
    """Return the methods of a route, but for HEAD, which comes with GET."""
    if route.methods is None:
        return [name for name in ("get", "put", "post", "patch", "delete") if hasattr(route.endpoint, name)]
    return [method.lower() for method in route.methods - {"HEAD"}]


@pytest.mark.drivers("sqlite")
def test_the_document_names_every_endpoint(driver):
    """The OpenAPI document has each path and method that the service has, and no other."""
    manager = UnitOfWorkManager(create_async_engine("sqlite+aiosqlite://"))
    ours = [one for one in routes(manager) if isinstance(one, Route) and one.path not in ("/", "/openapi.json")]
    served = {(route.path, method) for route in ours for method in methods(route)}
    told = {(path, method) for path, item in DOCUMENT["paths"].items() for method in item if method != "parameters"}
    assert told == served
