"""What a client should not send: each gets a clear 4xx, at once, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import json
from urllib.parse import urlsplit

import pytest

ORDER = b'{"source": 1, "target": 2, "amount": 5}'

pytestmark = pytest.mark.drivers("sqlite")


async def sent(bank, *pieces, hang_up=False):
    """Send bytes, and return the status and the body of what comes back; None where nothing does."""
    at = urlsplit(bank.address)
    reader, writer = await asyncio.open_connection(at.hostname, at.port)
    try:
        async with asyncio.timeout(10):
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
            if hang_up:
                writer.write_eof()
            head = await reader.readuntil(b"\r\n\r\n")
            return int(head.split()[1]), head
    except (asyncio.IncompleteReadError, ConnectionResetError):
        return None
    finally:
        writer.close()


def post(*headers, path="/transfers", body=b""):
    """Return the bytes of a request."""
    lines = [f"POST {path} HTTP/1.1", "host: x", "content-type: application/json", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


async def untouched(bank, db):
    """Check that the service is as it was, and still answers."""
    assert await db.scalar("SELECT sum(balance) FROM sqla_uow_bank_account") == 800_00
    assert await bank.broken_rules() == ([], 0)
    answer = await bank.client.post("/transfers", json=json.loads(ORDER))
    assert answer.status_code == 201


def transfer(**order):
    """Return a body."""
    return json.dumps({"source": 1, "target": 2, "amount": 5} | order)


NOT_JSON = "the body is not JSON"
FIELDS = "the body must have source and target and amount and reference, and nothing else"
A_NUMBER = "must be a whole number from 1 to 2147483647"
AN_AMOUNT = "amount must be a whole number from 1 to 1000000000"
BODIES = {
    "": (400, NOT_JSON),
    "{": (400, NOT_JSON),
    b"\xff\xfe": (400, NOT_JSON),
    "[" * 16000: (400, NOT_JSON),
    '{"source": NaN}': (400, NOT_JSON),
    '{"source": %s}' % ("9" * 5000): (400, NOT_JSON),
    "x" * 16385: (413, "the body has more than 16384 bytes"),
    "[]": (422, "the body must be a JSON object"),
    "null": (422, "the body must be a JSON object"),
    "{}": (422, FIELDS),
    transfer(more=1): (422, FIELDS),
    transfer(source="1"): (422, f"source {A_NUMBER}"),
    transfer(source=True): (422, f"source {A_NUMBER}"),
    transfer(target=2**63): (422, f"target {A_NUMBER}"),
    transfer(target=1e308): (422, f"target {A_NUMBER}"),
    transfer(amount=0): (422, AN_AMOUNT),
    transfer(amount=-5): (422, AN_AMOUNT),
    transfer(amount=0.5): (422, AN_AMOUNT),
    transfer(amount=10**400): (422, AN_AMOUNT),
    transfer(amount=None): (422, AN_AMOUNT),
    transfer(reference="a\x00"): (422, "reference must be a text of 0 to 80 printable characters"),
    transfer(target=1): (422, "source and target are the same account"),
    transfer(target=99): (404, "there is no account 99"),
}


async def said(answer):
    """Return what a problem says, after checking that it is one."""
    assert answer.headers["content-type"] == "application/problem+json"
    return answer.status_code, answer.json()["detail"]


async def test_a_body_that_cannot_be(bank, db):
    """Whatever a body holds, the problem says what is wrong with it."""
    headers = {"content-type": "application/json"}
    answers = {body: await said(await bank.client.post("/transfers", content=body, headers=headers)) for body in BODIES}
    assert answers == BODIES
    await untouched(bank, db)


async def test_a_name_that_cannot_be(bank, db):
    """A name that a database could not store, or a person not read, is 422."""
    for owner in ("", "x" * 81, "a\x00b", "a\nb", "a\n", "\ud800", 5, None, ["x"]):
        body, headers = json.dumps({"owner": owner}), {"content-type": "application/json"}
        answer = await bank.client.post("/accounts", content=body, headers=headers)
        assert await said(answer) == (422, "owner must be a text of 1 to 80 printable characters")
    await untouched(bank, db)


PATHS = [
    "/accounts/0", "/accounts/-1", "/accounts/1.0", "/accounts/x", "/accounts/%00", "/accounts/\u0661",
    "/accounts/2147483648", "/accounts/" + "9" * 5000, "/accounts/99", "/accounts/99/statement", "/nothing",
    "/page/%00", "/page/..%2fweb.py", "/page/" + "x" * 300, "/page/" + "a/" * 5000,
]  # fmt: skip


async def test_a_path_that_cannot_be(bank, db):
    """Whatever stands in the path, it is 404 as a problem."""
    statuses = {path: (await said(await bank.client.get(path)))[0] for path in PATHS}
    assert statuses == dict.fromkeys(PATHS, 404)
    await untouched(bank, db)


async def test_a_query_that_cannot_be(bank, db):
    """A number that is none, or out of its range, is 422."""
    for query in ("after=-1", "after=x", "after=", "after=1_0", "limit=0", "limit=501", "limit=" + "9" * 5000):
        status, detail = await said(await bank.client.get(f"/accounts?{query}"))
        assert (status, detail.partition(" ")[0]) == (422, query.partition("=")[0])
    await untouched(bank, db)


async def test_a_body_says_that_it_is_json(bank, db):
    """A form of somebody else's page cannot move money: it cannot say application/json."""
    for kind in ("text/plain", "", "multipart/form-data", "application/jsonp"):
        answer = await bank.client.post("/transfers", content=ORDER, headers={"content-type": kind})
        assert (await said(answer))[0] == 415
    await untouched(bank, db)
    answer = await bank.client.post(
        "/transfers", content=ORDER, headers={"content-type": "Application/JSON; charset=utf-8"}
    )
    assert answer.status_code == 201


async def test_a_method_that_is_not_there(bank):
    """405 is a problem too, and names the methods."""
    answer = await bank.client.delete("/transfers")
    assert (await said(answer))[0] == 405
    assert answer.headers["allow"] == "POST"


TAGS = [
    "1", "x", '"', '"1', 'W/"1"', "W/", ",", '"a" "b"', '"\x7f"', "*, *", "\xff",
    '"' + "x" * 60_000 + '"', ", ".join(['"a"'] * 9000),
]  # fmt: skip


async def test_an_if_match_that_cannot_be(bank, db):
    """Malformed, weak or huge: 4xx, and never an edit."""
    body = b'{"owner": "Me"}'
    for tag in TAGS:
        head = f"PUT /accounts/1 HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nif-match: {tag}\r\n"
        answer = await sent(bank, head.encode("latin-1") + f"content-length: {len(body)}\r\n\r\n".encode(), body)
        assert answer is not None, tag[:20]
        assert 400 <= answer[0] < 500, tag[:20]
    assert await db.scalar("SELECT owner FROM sqla_uow_bank_account WHERE id = 1") == "Ada"
    await untouched(bank, db)


async def test_a_length_that_cannot_be(bank, db):
    """A length that is no number ends the connection with a 4xx, or without a word."""
    for length in ("-1", "x", "1e3", "9" * 23, "5, 6"):
        answer = await sent(bank, post(f"content-length: {length}", body=ORDER), hang_up=True)
        assert answer is None or 400 <= answer[0] < 500
    await untouched(bank, db)


async def test_a_body_shorter_than_it_says(bank, db):
    """A client that leaves in the middle of its body moves no money, and no request hangs."""
    answer = await sent(bank, post(f"content-length: {len(ORDER) + 1}", body=ORDER), hang_up=True)
    assert answer is None or answer[0] == 400
    await untouched(bank, db)


async def test_a_body_longer_than_it_says(bank, db):
    """What comes after the length is no part of the order, and no second order either."""
    status, _ = await sent(bank, post(f"content-length: {len(ORDER)}", body=ORDER + ORDER))
    assert status == 201
    assert await db.scalar("SELECT count(*) FROM sqla_uow_bank_entry WHERE amount = 5") == 1


async def test_a_body_without_an_end(bank, db):
    """A chunked body is read up to the limit, and answered before its sender is done."""
    chunk = b"1000\r\n" + b" " * 4096 + b"\r\n"
    status, _ = await sent(bank, post("transfer-encoding: chunked"), *[chunk] * 5)
    assert status == 413
    await untouched(bank, db)
