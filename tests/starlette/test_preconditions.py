"""Versions over HTTP: what If-Match and If-None-Match let through, and what a race does."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter

import pytest
from sqlalchemy import select, text
from sqlalchemy.exc import IntegrityError
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from sqla_uow import current_session, errors, transactional
from sqla_uow_starlette import PreconditionError, UnitOfWorkMiddleware, check_preconditions, etag, exception_handlers
from tests.kit.models import Account
from tests.starlette.pages import Draft, Meeting, Page, answer, app, client, nothing, pages

WRITERS = 20
LEVELS = ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"]


async def race(application, headers, number=WRITERS):
    """Send PUTs at the same time; return how many had which status."""
    async with client(application) as http:
        puts = [http.put("/pages/1", json={"value": value + 1}, headers=headers) for value in range(number)]
        return Counter(answer.status_code for answer in await asyncio.gather(*puts))


def retried(caplog):
    """Return what was logged of attempts that are to be followed by another."""
    return [record.getMessage() for record in caplog.records if "again in" in record.getMessage()]


async def tag_of(application):
    """Return the ETag of page 1, as a client gets it."""
    async with client(application) as http:
        return (await http.get("/pages/1")).headers["ETag"]


@pytest.mark.drivers("asyncpg", "asyncmy")
@pytest.mark.parametrize("isolation", LEVELS)
async def test_one_of_many_writers_wins(db, isolation, caplog):
    """W7: all have compared the tag before anybody writes; one UPDATE finds the version, and nobody is run again."""
    caplog.set_level(logging.INFO, "sqla_uow")
    async with pages(db, pool_size=WRITERS):
        read = Meeting(WRITERS)
        writing = app(read=read.wait, isolation=isolation, retries=5)
        assert await race(writing, {"If-Match": await tag_of(writing)}) == {200: 1, 412: WRITERS - 1}
        assert read.met
        # MariaDB reads with shared locks then.  Their deadlocks may name their victims before anybody has committed: the
        # version is the same, so those are run again, and find the other one.
        if db.family == "postgresql" or isolation != "SERIALIZABLE":
            assert not retried(caplog)
    assert await db.scalar("SELECT version FROM page") == 2


@pytest.mark.drivers("asyncpg")
@pytest.mark.parametrize("isolation", LEVELS)
async def test_one_of_many_requests_that_are_units_wins(db, isolation, caplog):
    """W4, W7: the same where the request is the transaction; a replay would make nothing fresh."""
    caplog.set_level(logging.INFO, "sqla_uow")
    async with pages(db, pool_size=WRITERS) as manager:
        read = Meeting(WRITERS)
        unit = Middleware(UnitOfWorkMiddleware, manager=manager, atomic=True, retries=5, isolation=isolation)
        writing = app(read=read.wait, middleware=[unit])
        assert await race(writing, {"If-Match": await tag_of(writing)}) == {200: 1, 412: WRITERS - 1}
        assert read.met
        assert not retried(caplog)
    assert await db.scalar("SELECT version FROM page") == 2


@pytest.mark.drivers("sqlite")
async def test_one_of_many_writers_wins_on_sqlite(db):
    """W7: all are there before one writes; each unit is alone from its BEGIN on."""
    async with pages(db):
        arrived = Meeting(WRITERS)
        writing = app(arrived=arrived.wait, retries=5)
        assert await race(writing, {"If-Match": await tag_of(writing)}) == {200: 1, 412: WRITERS - 1}
        assert arrived.met
    assert await db.scalar("SELECT version FROM page") == 2


def by_hand(read):
    """Return an application that compares the tag, and writes without comparing the version."""

    @transactional(isolation="READ COMMITTED")
    async def put(request):
        page = await current_session().get_one(Page, 1)
        if request.headers["If-Match"] != etag(page):
            return Response(status_code=412)
        await read()
        await current_session().execute(text("UPDATE page SET value = value + 1, version = version + 1"))
        return answer(page)

    return Starlette(routes=[Route("/pages/1", put, methods=["PUT"])])


@pytest.mark.drivers("asyncpg", "asyncmy", "psycopg", "aiomysql")
async def test_a_write_elsewhere_is_held_to_the_tag(db):
    """V2, W7: a request that changes other rows on the strength of a tag fails if the page was changed meanwhile."""
    compared, changed = asyncio.Event(), asyncio.Event()

    @transactional(retries=5)
    async def draft(request):
        check_preconditions(request, await current_session().get_one(Page, 1))
        compared.set()
        await changed.wait()
        current_session().add(Draft(id=1))
        return Response(status_code=201)

    drafting = Starlette(routes=[Route("/", draft, methods=["POST"])], exception_handlers=exception_handlers)
    async with pages(db), client(drafting) as http, asyncio.timeout(20):
        headers = {"If-Match": await tag_of(app())}
        post = asyncio.create_task(http.post("/", headers=headers))
        await compared.wait()
        assert await race(app(), headers, 1) == {200: 1}
        changed.set()
        assert (await post).status_code == 412
    assert await db.rows("SELECT id FROM draft") == []


@pytest.mark.drivers("asyncpg", "asyncmy")
async def test_a_tag_compared_by_hand_lets_all_through(db):
    """The control of the race: where only the program compares, twenty of twenty overwrite each other."""
    async with pages(db, pool_size=WRITERS):
        tag = await tag_of(app())
        assert await race(by_hand(Meeting(WRITERS).wait), {"If-Match": tag}) == {200: WRITERS}
    assert await db.scalar("SELECT version FROM page") == 1 + WRITERS


@pytest.mark.drivers("asyncpg", "asyncmy")
async def test_a_race_without_if_match_is_a_conflict(db, caplog):
    """W6: a client that does not say what it has seen gets 409; with retries, its work is done."""
    async with pages(db, pool_size=4):
        read = Meeting(4)
        writing = app(read=read.wait, required=False, isolation="READ COMMITTED")
        assert await race(writing, {}, 4) == {200: 1, 409: 3}
        assert read.met
        assert await db.scalar("SELECT version FROM page") == 2
        caplog.set_level(logging.INFO, "sqla_uow")
        again = Meeting(4)
        runs = iter([again.wait] * 4)

        async def first_run():
            await next(runs, nothing)()

        assert await race(app(read=first_run, required=False, retries=8), {}, 4) == {200: 4}
        assert again.met
        assert retried(caplog)


@pytest.mark.drivers("asyncpg", "asyncmy")
async def test_one_of_many_creators_wins(db):
    """W7: `If-None-Match: *` creates once; who meets the winner's key is run again, and finds what is there."""
    async with pages(db, pool_size=4):
        read = Meeting(4)
        runs = iter([read.wait] * 4)

        async def first_run():
            await next(runs, nothing)()

        creating = app(read=first_run, retries=5, retry_on=lambda error: isinstance(error, IntegrityError))
        async with client(creating) as http:
            puts = [http.put("/pages/7", json={"value": 1}, headers={"If-None-Match": "*"}) for _ in range(4)]
            assert sorted([each.status_code for each in await asyncio.gather(*puts)]) == [200, 412, 412, 412]
        assert read.met
    assert await db.scalar("SELECT version FROM page WHERE id = 7") == 1


@pytest.mark.drivers("asyncpg", "asyncmy")
async def test_one_of_two_deletions_wins(db):
    """W7: a DELETE is held to its tag too."""
    read = Meeting(2)

    @transactional(retries=5)
    async def delete(request):
        page = await current_session().get_one(Page, 1)
        check_preconditions(request, page, required=True)
        await read.wait()
        await current_session().delete(page)
        return Response(status_code=204)

    deleting = Starlette(routes=[Route("/", delete, methods=["DELETE"])], exception_handlers=exception_handlers)
    async with pages(db), client(deleting) as http:
        headers = {"If-Match": await tag_of(app())}
        answers = await asyncio.gather(http.delete("/", headers=headers), http.delete("/", headers=headers))
    assert sorted(answer.status_code for answer in answers) == [204, 412]
    assert read.met


@pytest.mark.drivers("asyncpg", "sqlite")
async def test_a_tag_is_of_one_object_at_one_version(db):
    """W7: strong and opaque; another with each version, each key and each type; the same after the row was read again."""
    async with pages(db), client(app()) as http:
        first = await http.get("/pages/1")
        tag = first.headers["ETag"]
        put = await http.put("/pages/1", json={"value": 7}, headers={"If-Match": tag})
        assert put.status_code == 200
        assert (await http.get("/pages/1")).headers["ETag"] == put.headers["ETag"] != tag
        other = await http.put("/pages/2", json={"value": 0}, headers={"If-None-Match": "*"})
        assert other.status_code == 200
        assert other.headers["ETag"] not in (tag, put.headers["ETag"])
    assert len(tag) == 26
    assert tag[0] == tag[-1] == '"'
    assert await db.rows("SELECT id, value, version FROM page ORDER BY id") == [(1, 7, 2), (2, 0, 1)]


@pytest.mark.drivers("sqlite")
async def test_a_tag_is_of_one_type(db):
    """W7: objects of two types with the same key and version have different tags."""
    async with pages(db) as manager, manager.begin() as unit:
        unit.session.add(draft := Draft(id=1))
        page = await unit.session.get_one(Page, 1)
        await unit.session.flush()
        assert (draft.id, draft.version) == (page.id, page.version)
        assert etag(draft) != etag(page)


FAILED = 412
MATCHES = {
    "the tag": ("{tag}", 200),
    "in a list": ('"a",{tag}', 200),
    "with a comma inside another": ('"a,b" , {tag}', 200),
    "with empty elements": (',, "a",\t{tag},,', 200),
    "any": ("*", 200),
    "any in spaces": (" * ", 200),
    "weak": ("W/{tag}", FAILED),
    "another": ('"a"', FAILED),
    "no element": ("", FAILED),
    "the tag as a part of one": ('"a{tag}', 400),
    "no quotes": ("{bare}", 400),
    "a small w": ("w/{tag}", 400),
    "any in a list": ("*, {tag}", 400),
    "no comma": ("{tag} {tag}", 400),
    "an open quote": ('{tag}, "a', 400),
}


@pytest.mark.drivers("sqlite")
@pytest.mark.parametrize(("value", "status"), MATCHES.values(), ids=MATCHES)
async def test_if_match(db, value, status):
    """W7: lists and `*` as in RFC 9110; a weak tag never matches; what is no list is refused, wherever it is broken."""
    async with pages(db):
        changing = app()
        tag = await tag_of(changing)
        headers = {"If-Match": value.format(tag=tag, bare=tag.strip('"'))}
        assert await race(changing, headers, 1) == {status: 1}
    assert await db.scalar("SELECT version FROM page") == (2 if status == 200 else 1)


@pytest.mark.drivers("sqlite")
async def test_several_lines_are_one_list(db):
    """RFC 9110, 5.3: a header that comes twice is its lines, joined."""
    async with pages(db), client(app()) as http:
        lines = [("If-Match", '"a"'), ("If-Match", await tag_of(app()))]
        assert (await http.put("/pages/1", json={"value": 1}, headers=lines)).status_code == 200
        assert (
            await http.get("/pages/1", headers=[("If-None-Match", '"a"'), ("If-None-Match", "*")])
        ).status_code == 400


@pytest.mark.drivers("sqlite")
@pytest.mark.parametrize("value", ["{tag}", "W/{tag}", '"a", {tag}', "*"])
async def test_not_modified(db, value):
    """W7: 304 for GET and HEAD, with the ETag and no body, by weak comparison; another method gets 412."""
    async with pages(db), client(app(required=False)) as http:
        tag = await tag_of(app())
        headers = {"If-None-Match": value.format(tag=tag)}
        for ask in (http.get, http.head):
            found = await ask("/pages/1", headers=headers)
            assert (found.status_code, found.headers["ETag"], found.content) == (304, tag, b"")
        assert (await http.put("/pages/1", json={"value": 1}, headers=headers)).status_code == FAILED
        assert (await http.get("/pages/1", headers={"If-None-Match": '"a"'})).status_code == 200


OF_THE_200 = {
    "Cache-Control": "private, max-age=60",
    "vary": "Accept-Encoding, Cookie",
    "Content-Location": "/pages/1.json",
    "ETag": '"made up"',
    "Content-Language": "en",
    "Set-Cookie": "a=b",
}


@pytest.mark.drivers("sqlite")
@pytest.mark.parametrize("handlers", [exception_handlers, {}])
async def test_headers_of_a_304(db, handlers):
    """RFC 9110, 15.4.5: those by which a cache renews its copy are as in the 200, and nothing else is sent."""

    async def show(request):
        async with manager.begin(read_only=True) as unit:
            page = await unit.session.get_one(Page, 1)
            check_preconditions(request, page, headers=OF_THE_200)
            return Response("x", headers=OF_THE_200 | {"ETag": etag(page)})

    async with pages(db) as manager, client(Starlette(routes=[Route("/", show)], exception_handlers=handlers)) as http:
        full = await http.get("/")
        found = await http.get("/", headers={"If-None-Match": full.headers["ETag"]})
        assert (full.status_code, found.status_code) == (200, 304)
        for name in ("ETag", "Cache-Control", "Vary", "Content-Location"):
            assert found.headers[name] == full.headers[name]
        assert not {"content-language", "set-cookie"} & set(found.headers)


@pytest.mark.drivers("sqlite")
async def test_if_match_on_a_page_that_is_read(db):
    """RFC 9110, 13.1.1: If-Match holds for GET too, and goes before If-None-Match."""
    async with pages(db), client(app()) as http:
        tag = await tag_of(app())
        assert (await http.get("/pages/1", headers={"If-Match": tag})).status_code == 200
        assert (await http.get("/pages/1", headers={"If-Match": '"a"', "If-None-Match": tag})).status_code == FAILED
        assert (await http.get("/pages/1", headers={"If-Match": tag, "If-None-Match": tag})).status_code == 304


@pytest.mark.drivers("sqlite")
async def test_a_page_that_does_not_exist(db):
    """W7: If-None-Match: * creates it once; If-Match holds for nothing."""
    async with pages(db), client(app()) as http:
        for value in ("*", '"a"'):
            assert (await http.put("/pages/9", json={"value": 1}, headers={"If-Match": value})).status_code == FAILED
        assert (await http.put("/pages/9", json={"value": 1})).status_code == 428
        assert (await http.get("/pages/9", headers={"If-None-Match": "*"})).status_code == 404
        create = {"json": {"value": 1}, "headers": {"If-None-Match": "*"}}
        assert (await http.put("/pages/9", **create)).status_code == 200
        assert (await http.put("/pages/9", **create)).status_code == FAILED
    assert await db.scalar("SELECT version FROM page WHERE id = 9") == 1


@pytest.mark.drivers("sqlite")
@pytest.mark.parametrize("headers", [{}, {"If-None-Match": '"a"'}])
async def test_required(db, headers):
    """W7: where it is required, an object is changed only under an If-Match."""
    async with pages(db):
        assert await race(app(), headers, 1) == {428: 1}
        assert await db.scalar("SELECT version FROM page") == 1
        assert await race(app(required=False), headers, 1) == {200: 1}


# -- misuse


def asking(method, **headers):
    """Return a request."""
    lines = [(name.replace("_", "-").lower().encode(), value.encode()) for name, value in headers.items()]
    return Request({"type": "http", "method": method, "path": "/", "headers": lines})


def said_of(call, *arguments):
    """Return the type and the message of a refusal."""
    with pytest.raises((TypeError, ValueError)) as caught:
        call(*arguments)
    return type(caught.value), str(caught.value)


@pytest.mark.drivers("sqlite")
async def test_no_tag_for_what_has_no_version(db):
    """W7: a new, a changed, an expired object and one without a mixin say what to do instead."""
    async with pages(db) as manager, manager.begin() as unit:
        assert said_of(etag, Page(id=1)) == (ValueError, "Page has no row yet, and so no version; flush it first")
        unversioned = "got a Account, which has no version; give its model a mixin"
        assert said_of(etag, Account(id=1)) == (TypeError, f"etag() {unversioned}")
        assert said_of(check_preconditions, asking("GET"), Account(id=1)) == (
            TypeError,
            f"check_preconditions() {unversioned}",
        )
        page = await unit.session.get_one(Page, 1)
        page.value = 3
        assert said_of(etag, page) == (
            ValueError,
            (
                "Page(1,) has changes that are not written, and its version does not count them; take its etag() after the "
                "flush or the commit"
            ),
        )
        unit.session.expire(page)
        assert said_of(etag, page) == (
            ValueError,
            "the version of Page(1,) is not loaded, or its unit was rolled back; get the object again",
        )


@pytest.mark.drivers("sqlite", "asyncpg")
async def test_the_read_session_cannot_keep_a_tag(db):
    """S7, W7: what is checked in the read session and written elsewhere would not be checked again; GET may."""
    async with pages(db) as manager, manager.scope():
        page = (await current_session().scalars(select(Page))).one()
        check_preconditions(asking("GET", If_Match=etag(page)), page)
        with pytest.raises(errors.ReadOnlyError) as caught:
            check_preconditions(asking("PUT", If_Match=etag(page)), page)
        assert str(caught.value) == (
            "expect_version() was called for Page(1) in a session that only reads; write in a @transactional function: "
            "pass the key and get_one() the object inside, or open the unit around the read as well; never merge() it"
        )


@pytest.mark.drivers("sqlite")
async def test_an_object_of_no_open_unit_cannot_keep_a_tag(db):
    """W7: nor can one whose unit has ended."""
    async with pages(db) as manager:
        async with manager.begin() as unit:
            page = await unit.session.get_one(Page, 1)
        with pytest.raises(errors.NoUnitError):
            check_preconditions(asking("PUT", If_Match=etag(page)), page)
        with pytest.raises(PreconditionError) as caught:
            check_preconditions(asking("GET", If_None_Match=etag(page)), page)
        assert (caught.value.status_code, caught.value.code) == (304, "not-modified")
