"""Input that no client should send: nothing of it is a 500 of ours, hangs, or leaves anything open.

A few hundred cases; with ``SQLA_UOW_LONG``, as tox -e long sets it, 10,000.
"""

from __future__ import annotations

import asyncio
import os
import time

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy.orm import make_transient_to_detached
from sqlalchemy.orm.attributes import set_committed_value
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.routing import Route

from sqla_uow import current_session, transactional
from sqla_uow_starlette import (
    PreconditionError,
    UnitOfWorkMiddleware,
    check_preconditions,
    etag,
    exception_handlers,
)
from tests.starlette.pages import Page, answer, pages
from tests.starlette.serving import served

CASES = 10_000 if os.environ.get("SQLA_UOW_LONG") else 300
pytestmark = [pytest.mark.drivers("sqlite"), pytest.mark.timeout(1200 if CASES > 300 else 60)]
cases = settings(
    max_examples=CASES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
MEGABYTE = 1_000_000
MODES = ["scope", "atomic", "replayed"]


def page_at(version):
    """Return a page as it is after its unit: readable, of no session."""
    page = Page(id=1)
    make_transient_to_detached(page)
    set_committed_value(page, "version", version)
    return page


PAGE = page_at(3)
TAG = etag(PAGE)


def asking(method, headers):
    """Return a request with these header lines."""
    return Request({"type": "http", "method": method, "path": "/", "headers": headers})


def status_of(method, headers):
    """Return what `check_preconditions` makes of a request: 200, or the status of its refusal."""
    try:
        check_preconditions(asking(method, headers), PAGE)
    except PreconditionError as refusal:
        return refusal.status_code
    return 200


# -- reading the headers

opaque = st.binary(max_size=8).map(lambda raw: bytes(byte for byte in raw if byte == 0x21 or 0x23 <= byte != 0x7F))
spaces = st.sampled_from([b"", b" ", b"\t", b"  \t "])
tags = st.tuples(st.booleans(), st.one_of(st.just(TAG.strip('"').encode()), opaque))


@st.composite
def lists(draw):
    """Draw the tags of a list, and the list as header lines: with spaces, empty elements and line ends anywhere."""
    drawn = draw(st.lists(tags, max_size=5))
    lines = [b""]
    for weak, value in drawn:
        lines[-1] += draw(spaces) + (b'W/"' if weak else b'"') + value + b'"' + draw(spaces)
        separator = draw(st.sampled_from([b",", b", ,", b"\n"]))
        lines = [*lines, b""] if separator == b"\n" else [*lines[:-1], lines[-1] + separator]
    return drawn, lines


@cases
@given(lists())
def test_every_list_is_read(driver, drawn):
    """RFC 9110, 5.6.1 and 8.8.3: whatever a list looks like, its tags decide, and nothing else does."""
    tags, lines = drawn
    ours = TAG.strip('"').encode()
    strong = (False, ours) in tags
    weak = strong or (True, ours) in tags
    assert status_of("GET", [(b"if-match", line) for line in lines]) == (200 if strong else 412)
    assert status_of("GET", [(b"if-none-match", line) for line in lines]) == (304 if weak else 200)
    assert status_of("POST", [(b"if-none-match", line) for line in lines]) == (412 if weak else 200)


pieces = st.sampled_from([b"W/", b"w/", b'"', b",", b" ", b"\t", b"*", b"a", b"\xff", b"\x00", b"\r\n", TAG.encode()])
scribble = st.one_of(st.binary(max_size=60), st.lists(pieces, max_size=12).map(b"".join))


@cases
@given(st.lists(st.tuples(st.sampled_from([b"if-match", b"if-none-match"]), scribble), max_size=4))
def test_whatever_is_sent_has_an_answer(driver, headers):
    """W7: a header that is no list is a 400, or does not match; it never matches by accident."""
    found = status_of("GET", headers)
    assert found in (200, 304, 400, 412)
    if found == 200 and any(name == b"if-match" for name, _ in headers):
        text = b",".join(value for name, value in headers if name == b"if-match")
        assert TAG.encode() in text or text.strip(b" \t") == b"*"


@pytest.mark.parametrize(
    ("value", "status"),
    [
        (b" " * MEGABYTE + b"x", 400),
        (b'"' + b"a" * MEGABYTE, 400),
        (b'"' * MEGABYTE, 400),
        (b"W/" * MEGABYTE, 400),
        (b"," * MEGABYTE, 412),
        (b", " * MEGABYTE + b"x", 400),
        (b'"a",' * MEGABYTE, 412),
        (b'"a",' * MEGABYTE + TAG.encode(), 200),
        (b"*," * MEGABYTE, 400),
    ],
    ids=range(9),
)
def test_a_huge_header_is_read_once(driver, value, status):
    """W7: a megabyte takes a second, not the hour of a reader that goes back to the start of each run."""
    begun = time.process_time()
    assert status_of("GET", [(b"if-match", value)]) == status
    assert time.process_time() - begun < 10


# -- requests


def application():
    """Return an application that reads a body, changes a page under preconditions, and streams."""

    @transactional(retries=1)
    async def put(request, value):
        page = await current_session().get_one(Page, 1)
        check_preconditions(request, page)
        page.value = value
        await current_session().flush()
        return page

    async def change(request):
        try:
            value = int((await request.body())[:9])
        except ValueError:
            raise HTTPException(422, "no number") from None
        return answer(await put(request, value))

    async def show(request):
        page = await current_session().get_one(Page, 1)
        check_preconditions(request, page)
        return answer(page)

    return Starlette(
        routes=[Route("/", show), Route("/", change, methods=["PUT", "POST", "DELETE"])],
        exception_handlers=exception_handlers,
    )


class Exchange:
    """One request: what the application receives, and what it has sent."""

    def __init__(self, received):
        self.received = list(received)
        self.sent = []

    async def receive(self):
        return self.received.pop(0) if self.received else {"type": "http.disconnect"}

    async def send(self, message):
        self.sent.append(message)

    async def run(self, app, method="PUT", headers=()):
        """Return the status; None where the client had left."""
        scope = {"type": "http", "method": method, "path": "/", "query_string": b"", "headers": list(headers)}
        try:
            async with asyncio.timeout(10):
                await app(scope, self.receive, self.send)
        except ClientDisconnect:
            return None
        assert self.sent[0]["type"] == "http.response.start"
        return self.sent[0]["status"]


bodies = st.one_of(st.binary(max_size=20), st.integers(0, 99).map(lambda number: str(number).encode()))
messages = st.one_of(
    st.fixed_dictionaries({"type": st.just("http.request")}, optional={"body": bodies, "more_body": st.booleans()}),
    st.just({"type": "http.disconnect"}),
    st.fixed_dictionaries({"type": st.sampled_from(["", "http.nonsense", "websocket.receive", "lifespan.startup"])}),
)
lies = st.tuples(
    st.sampled_from(
        [b"content-length", b"transfer-encoding", b"expect", b"range", b"if-match", b"if-none-match", b"host"]
    ),
    st.one_of(
        scribble, st.sampled_from([b"0", b"-1", b"99999999999999999999", b"chunked", b"100-continue", TAG.encode()])
    ),
)


@cases
@given(
    st.sampled_from(["GET", "HEAD", "PUT", "POST", "DELETE", "BREW", ""]),
    st.lists(lies, max_size=4),
    st.lists(messages, max_size=5),
)
@pytest.mark.drivers("sqlite")
async def test_whatever_is_requested_has_an_answer(hostile, method, headers, received):
    """W1, W2: lengths that lie, messages of unknown types, methods of nobody: an answer of the application, or a client that left."""
    app, pool = hostile
    assert await Exchange(received).run(app, method, headers) in (None, 200, 304, 400, 405, 412, 422)
    assert pool.checkedout() == 0


@pytest.fixture(params=[{}, {"atomic": True}, {"atomic": True, "retries": 2, "max_replay_body": 8}], ids=MODES)
async def hostile(db, request):
    """Provide the application behind the middleware, and its pool."""
    async with pages(db) as manager:
        yield UnitOfWorkMiddleware(application(), manager=manager, **request.param), manager.engine.pool


@pytest.mark.drivers("sqlite", "asyncpg")
async def test_a_body_that_ends_early_changes_nothing(hostile, db):
    """W2: a client that announced more than it sends has left; its request is not carried out."""
    app, _ = hostile
    part = {"type": "http.request", "body": b"7", "more_body": True}
    assert await Exchange([part]).run(app, headers=[(b"content-length", b"1000")]) is None
    assert await db.rows("SELECT value, version FROM page") == [(0, 1)]
    whole = {"type": "http.request", "body": b"7"}
    assert await Exchange([whole]).run(app, headers=[(b"content-length", b"0")]) == 200
    assert await db.rows("SELECT value, version FROM page") == [(7, 2)]


@pytest.mark.drivers("sqlite")
@pytest.mark.parametrize("unknown", ["", "nonsense", "http.nonsense"])
async def test_what_is_no_request_passes_through(db, unknown):
    """W1: kinds of connection that nobody knows yet are the application's business."""
    scopes = []

    async def app(scope, _receive, send):
        scopes.append(scope)
        await send({"type": "nonsense"})

    exchange = Exchange([])
    async with pages(db) as manager:
        await UnitOfWorkMiddleware(app, manager=manager)({"type": unknown}, exchange.receive, exchange.send)
    assert (scopes, exchange.sent) == ([{"type": unknown}], [{"type": "nonsense"}])


@pytest.mark.drivers("sqlite")
async def test_messages_of_unknown_types_pass(hostile, db):
    """W1: extensions of ASGI that nobody knows yet reach the server, in their order, before and after the start."""
    sent = [
        {"type": "http.response.early_hint", "links": []},
        {"type": "http.response.start", "status": 200, "headers": [], "trailers": True},
        {"type": "http.response.nonsense"},
        {"type": "http.response.body", "body": b"a", "more_body": False},
        {"type": "http.response.trailers", "headers": []},
    ]

    async def app(_scope, _receive, send):
        for message in sent:
            await send(message)

    middleware, _ = hostile
    middleware.app = app
    exchange = Exchange([])
    await middleware({"type": "http", "method": "GET", "path": "/", "headers": []}, exchange.receive, exchange.send)
    assert exchange.sent == sent


WHOLE = b"PUT / HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: 1\r\n"
OPEN = b"PUT / HTTP/1.1\r\nHost: a\r\n"
LIES = {
    "a body that ends early": (OPEN + b"Content-Length: 1000\r\n\r\n7", b""),
    "a length that is no number": (OPEN + b"Content-Length: -1\r\n\r\n7", b"HTTP/1.1 400 "),
    "a chunk that is none": (OPEN + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n7\r\n0\r\n\r\n", b"HTTP/1.1 400 "),
    "a tag of 50 kB": (WHOLE + b'If-Match: "' + b"a" * 50_000 + b'"\r\n\r\n7', b"HTTP/1.1 412 "),
    "half a tag": (WHOLE + b'If-Match: "a\xff\r\n\r\n7', b"HTTP/1.1 400 "),
    "no HTTP": (b"\x16\x03\x01" * 50 + b"\r\n\r\n", b"HTTP/1.1 400 "),
}


@pytest.mark.parametrize(("lie", "expected"), LIES.values(), ids=LIES)
async def test_a_real_server_is_lied_to(hostile, db, lie, expected):
    """W2: behind a real server: a refusal or silence, never a 500; nothing is changed, and the next request is served."""
    app, pool = hostile
    async with served(app) as (port, _), asyncio.timeout(20):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(lie)
        if not expected:
            writer.write_eof()
        answered = await reader.read()
        writer.close()
        assert answered[:13] == expected
        assert await db.rows("SELECT value, version FROM page") == [(0, 1)]
        async with httpx.AsyncClient() as http:
            assert (await http.get(f"http://127.0.0.1:{port}/")).json() == {"value": 0}
    assert pool.checkedout() == 0
