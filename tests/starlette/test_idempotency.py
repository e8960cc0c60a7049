"""The header Idempotency-Key: each row of what is promised of it."""

from __future__ import annotations

import asyncio
import json
import logging
from datetime import timedelta
from typing import Annotated

import pytest
from fastapi import Body, Depends, FastAPI, Header
from sqlalchemy import MetaData, text
from sqlalchemy.ext.asyncio import create_async_engine
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse

from sqla_uow import UnitOfWorkManager, after_commit, current_session, current_unit, transactional
from sqla_uow.idempotency import IdempotencyKeys
from sqla_uow.testing import count_queries
from sqla_uow_starlette import Idempotency, UnitOfWorkMiddleware, exception_handlers
from tests.kit.models import Account
from tests.starlette.client import add, app_of, client_of
from tests.starlette.keyed import caller, key


async def count(db):
    """Return how many accounts are committed."""
    return await db.scalar("SELECT count(*) FROM account")


async def records(db):
    """Return how many records are committed."""
    return await db.scalar("SELECT count(*) FROM uow_idempotency")


class Pay:
    """An endpoint that adds one account, and counts its runs."""

    __name__ = "pay"

    def __init__(self):
        self.runs = 0
        self.hooks = 0

    def hook(self):
        """Count a COMMIT."""
        self.hooks += 1

    async def __call__(self, request):
        self.runs += 1
        await request.body()
        await add(100 + self.runs)
        after_commit(self.hook)
        return JSONResponse(
            {"run": self.runs}, 201, {"Location": f"/pay/{self.runs}", "ETag": '"1"', "X-Own": "1", "Set-Cookie": "a=b"}
        )


@pytest.fixture
def pay():
    """Provide an endpoint that counts."""
    return Pay()


def endpoint_of(pay):
    """Return it as a function."""

    async def endpoint(request):
        return await pay(request)

    return endpoint


async def test_the_same_key_again_gets_the_same_answer(db, serve, pay):
    """Status, body and kept headers; the endpoint does not run, no hook runs, nothing else of it is stored."""
    async with serve(endpoint_of(pay)) as client:
        first = await client.post("/endpoint", headers=key("k"), content=b"5")
        again = await client.post("/endpoint", headers=key("k"), content=b"5")
    assert (again.status_code, again.content) == (first.status_code, first.content) == (201, b'{"run":1}')
    assert first.headers["x-own"] == "1"
    assert first.headers["set-cookie"] == "a=b"
    assert "idempotent-replayed" not in first.headers
    assert dict(again.headers) == {
        "content-type": "application/json",
        "location": "/pay/1",
        "etag": '"1"',
        "content-length": "9",
        "idempotent-replayed": "true",
    }
    assert (pay.runs, pay.hooks, await count(db), await records(db)) == (1, 1, 2, 1)


async def test_without_a_key_nothing_is_new(db, serve, pay):
    """Neither without the header nor with another method."""
    async with serve(endpoint_of(pay)) as client:
        for _ in range(2):
            assert (await client.post("/endpoint")).status_code == 201
            assert (await client.get("/endpoint", headers=key("k"))).status_code == 201
    assert (pay.runs, await records(db)) == (4, 0)


@pytest.mark.parametrize("how", ["returned", "raised", "unhandled", "doomed"])
async def test_an_answer_that_is_no_success_leaves_nothing(db, serve, how):
    """The same key runs again."""
    runs = []

    async def endpoint(request):
        runs.append(1)
        await add(100 + len(runs))
        if how == "raised":
            raise HTTPException(402)
        if how == "unhandled":
            raise ZeroDivisionError
        if how == "doomed":
            current_unit().doom()
            return PlainTextResponse("done")
        return PlainTextResponse("declined", 402)

    async with serve(endpoint) as client:
        statuses = [(await client.post("/endpoint", headers=key("k"))).status_code for _ in range(2)]
    expected = {"returned": 402, "raised": 402, "unhandled": 500, "doomed": 200}[how]
    assert (statuses, len(runs)) == ([expected] * 2, 2)
    assert (await count(db), await records(db)) == (1, 0)


@pytest.mark.parametrize("how", ["returned", "raised"])
async def test_a_declined_card_that_must_be_remembered(db, serve, how):
    """With `should_commit` an error is kept like a success."""
    runs = []

    async def endpoint(request):
        runs.append(1)
        await add(100 + len(runs))
        if how == "raised":
            raise HTTPException(402, "declined")
        return PlainTextResponse("declined", 402)

    async with serve(endpoint, should_commit=lambda _scope, status: status in (200, 402)) as client:
        answers = [await client.post("/endpoint", headers=key("k")) for _ in range(2)]
    assert [(answer.status_code, answer.text) for answer in answers] == [(402, "declined")] * 2
    assert (len(runs), await count(db), await records(db)) == (1, 2, 1)


async def test_a_hook_that_fails(db, serve):
    """The first client is told that it is committed; the same key gets the response."""

    async def fail():
        raise OSError("the mail server is away")

    async def endpoint(request):
        await add(100)
        after_commit(fail)
        return PlainTextResponse("paid")

    async with serve(endpoint) as client:
        first = await client.post("/endpoint", headers=key("k"))
        again = await client.post("/endpoint", headers=key("k"))
    assert (first.status_code, first.json()["code"]) == (500, "committed-hook-failed")
    assert (again.status_code, again.text) == (200, "paid")
    assert await count(db) == 2


@pytest.mark.parametrize("other", ["body", "query", "method", "path"])
async def test_a_key_for_another_request(db, serve, pay, other):
    """It is refused, whatever is not the same."""

    async def second(request):
        return await pay(request)

    async with serve(endpoint_of(pay), second, idempotency={"methods": ("POST", "GET")}) as client:
        await client.post("/endpoint", headers=key("k"), content=b"5")
        method = "GET" if other == "method" else "POST"
        path = "/second" if other == "path" else "/endpoint?a=1" if other == "query" else "/endpoint"
        answer = await client.request(method, path, headers=key("k"), content=b"6" if other == "body" else b"5")
    assert (answer.status_code, answer.json()["code"]) == (422, "idempotency-key-reused")
    assert answer.headers["content-type"] == "application/problem+json"
    assert (pay.runs, await count(db)) == (1, 2)


async def test_a_body_that_the_application_does_not_read(serve):
    """It is compared all the same."""

    async def endpoint(request):
        await add(100)
        return PlainTextResponse("done")

    async with serve(endpoint) as client:
        bodies = (b"5" * 200_000, b"5" * 200_000, b"6" * 200_000, b"")
        statuses = [(await client.post("/endpoint", headers=key("k"), content=body)).status_code for body in bodies]
    assert statuses == [200, 200, 422, 422]


async def test_a_fingerprint_of_ones_own(serve, pay):
    """Beside the body only what it says is compared; where it says None, nothing is."""
    own = {"fingerprint": lambda scope: None if b"free" in scope["query_string"] else scope["method"].encode()}
    async with serve(endpoint_of(pay), idempotency=own) as client:
        await client.post("/endpoint?a=1", headers=key("k"), content=b"5")
        assert (await client.post("/endpoint?a=2", headers=key("k"), content=b"5")).status_code == 201
        assert (await client.post("/endpoint?a=2", headers=key("k"), content=b"6")).status_code == 422
        assert (await client.post("/endpoint?free", headers=key("k"), content=b"6")).status_code == 201
    assert pay.runs == 1


async def test_another_caller_has_another_key(db, serve, pay):
    """Nobody is replayed what somebody else was answered."""
    async with serve(endpoint_of(pay)) as client:
        answers = [
            (await client.post("/endpoint", headers=key("k", Authorization=who))).json()["run"]
            for who in ("ann", "bob", "Ann", "ann", "bob")
        ]
    assert answers == [1, 2, 3, 1, 2]


@pytest.mark.parametrize("who", [None, "", 5])
async def test_a_caller_who_is_unknown(db, manager, keys, who, pay):
    """The request is not carried out: all who are unknown would be one."""
    middleware = UnitOfWorkMiddleware(
        app_of(manager, endpoint_of(pay)),
        manager=manager,
        atomic=True,
        idempotency=Idempotency(keys, caller=lambda _: who),
    )
    async with client_of(middleware, raise_app_exceptions=True) as client:
        with pytest.raises(TypeError, match=r"^the caller of an idempotency key is "):
            await client.post("/endpoint", headers=key("k"))
    assert (pay.runs, await records(db)) == (0, 0)


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ([], "missing"),
        ([b""], "malformed"),
        ([b'""'], "malformed"),
        ([b"x" * 256], "malformed"),
        ([b'"' + b"x" * 256 + b'"'], "malformed"),
        ([b"a b"], "malformed"),
        ([b"caf\xe9"], "malformed"),
        ([b"a\x7f"], "malformed"),
        ([b'"abc'], "malformed"),
        ([b'"a\\bc"'], "malformed"),
        ([b'"abc";a=1'], "malformed"),
        ([b"a", b"a"], "malformed"),
    ],
)
async def test_what_is_no_key(serve, pay, headers, code):
    """It is told before anything is sent to the database."""
    async with serve(endpoint_of(pay), idempotency={"required": True}) as client:
        answer = await client.post("/endpoint", headers=[(b"Idempotency-Key", value) for value in headers])
    assert (answer.status_code, answer.json()["code"]) == (400, f"idempotency-key-{code}")
    assert pay.runs == 0


async def test_spellings_of_a_key(serve, pay):
    """A structured field's string and its content are one key."""
    async with serve(endpoint_of(pay)) as client:
        values = [b"abc", b'"abc"', b"ABC", b'"a\\"b\\\\c"', b'a"b\\c', b"x" * 255, b'"' + b"x" * 255 + b'"']
        runs = [
            (await client.post("/endpoint", headers=[(b"Idempotency-Key", value)])).json()["run"] for value in values
        ]
    assert runs == [1, 1, 2, 3, 3, 4, 4]


@pytest.mark.parametrize("how", ["long", "announced", "streamed", "chunks"])
async def test_a_response_that_cannot_be_kept(db, serve, caplog, how):
    """It fails on the first day, and each time: rolled back, with the route in the log."""
    caplog.set_level(logging.ERROR, "sqla_uow_starlette")
    later = []

    async def parts():
        for _ in range(5 if how == "streamed" else 50):
            yield b"x" * 30

    async def endpoint(request):
        await add(100)
        if how in ("streamed", "chunks"):
            headers = {} if how == "streamed" else {"content-length": "900"}
            return StreamingResponse(parts(), headers=headers, background=BackgroundTask(later.append, 1))
        if how == "announced":
            return Response(headers={"content-length": "1001"}, background=BackgroundTask(later.append, 1))
        return PlainTextResponse("x" * 1001, background=BackgroundTask(later.append, 1))

    async with serve(endpoint, idempotency={"max_response": 1000}) as client:
        answers = [await client.post("/endpoint", headers=key("k")) for _ in range(2)]
    for answer in answers:
        assert (answer.status_code, answer.json()["code"]) == (500, "idempotency-response-too-large")
    assert (await count(db), await records(db), later) == (1, 0, [])
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2
    assert told[0].startswith(
        "POST /endpoint has an idempotency key, and a response that is streamed or has more than 1000 "
    )


async def test_a_response_in_parts_that_says_how_long_it_is(serve):
    """A middleware inside passes responses on in parts; they are whole all the same."""

    async def endpoint(request):
        await add(100)
        return PlainTextResponse("x" * 5000)

    async def dispatch(request, call_next):
        return await call_next(request)

    inside = [Middleware(BaseHTTPMiddleware, dispatch=dispatch), Middleware(GZipMiddleware)]
    async with serve(endpoint, inside=inside) as client:
        answers = [await client.post("/endpoint", headers=key("k")) for _ in range(2)]
    assert [answer.text for answer in answers] == ["x" * 5000] * 2
    assert [answer.headers["content-encoding"] for answer in answers] == ["gzip"] * 2
    assert answers[1].headers["idempotent-replayed"] == "true"


@pytest.mark.parametrize("status", [204, 200])
async def test_a_response_without_a_body(serve, status):
    """It is kept as such."""

    async def endpoint(request):
        await add(100)
        return Response(status_code=status)

    async with serve(endpoint) as client:
        first, again = [await client.post("/endpoint", headers=key("k")) for _ in range(2)]
    assert (again.status_code, again.content) == (first.status_code, first.content) == (status, b"")
    assert again.headers.get("content-length") == first.headers.get("content-length")


async def test_errors_of_any_length_are_sent_as_they_are(serve):
    """Nothing is kept of them, so nothing is held back."""

    async def parts():
        for _ in range(50):
            yield b"x" * 100

    async def endpoint(request):
        return StreamingResponse(parts(), 400)

    async with serve(endpoint, idempotency={"max_response": 1000}) as client:
        answer = await client.post("/endpoint", headers=key("k"))
    assert (answer.status_code, len(answer.content)) == (400, 5000)


async def test_a_background_task_runs_once_and_after_commit(db, serve):
    """Not for a repetition."""
    seen = []

    async def look():
        seen.append(await count(db))

    async def endpoint(request):
        await add(100)
        return PlainTextResponse("done", background=BackgroundTask(look))

    async with serve(endpoint) as client:
        for _ in range(2):
            await client.post("/endpoint", headers=key("k"))
    assert seen == [2]


async def test_a_table_that_is_missing(db, manager, caplog, pay):
    """500, and the log names the migration."""
    caplog.set_level(logging.ERROR, "sqla_uow")
    idempotency = Idempotency(IdempotencyKeys(MetaData(), name="nowhere"), caller=caller)
    app = app_of(manager, endpoint_of(pay), atomic=True, idempotency=idempotency)
    async with client_of(app) as client:
        answer = await client.post("/endpoint", headers=key("k"))
    assert answer.status_code == 500
    assert "alembic revision --autogenerate" in caplog.text
    assert pay.runs == 0


async def test_an_expired_key_runs_again(serve, pay):
    """After `keep`, a key is as good as new."""
    async with serve(endpoint_of(pay), idempotency={"keep": timedelta(milliseconds=20)}) as client:
        runs = []
        for body in (b"5", b"5", b"6"):
            runs.append((await client.post("/endpoint", headers=key("k"), content=body)).json()["run"])
            await asyncio.sleep(0.03)
    assert runs == [1, 2, 3]


class Reversed:
    """A codec that can be seen through."""

    def encode(self, plain):
        """Turn it round."""
        return plain[::-1]

    def decode(self, stored):
        """Turn it back."""
        return stored[::-1]


async def test_a_codec(db, serve, pay):
    """What is stored is what it makes of headers and body."""
    async with serve(endpoint_of(pay), idempotency={"codec": Reversed()}) as client:
        first, again = [await client.post("/endpoint", headers=key("k")) for _ in range(2)]
    assert again.json() == first.json()
    assert again.headers["location"] == first.headers["location"]
    ((result, headers),) = await db.rows("SELECT result, headers FROM uow_idempotency")
    assert json.loads(bytes(result)[::-1]) == {"run": 1}
    assert b"1/yap/:noitacol" in bytes(headers)


async def test_repetitions_while_the_first_one_runs(db, serve, manager):
    """They wait for it without a connection, and are answered by its response."""
    go_on, running = asyncio.Event(), asyncio.Event()
    runs = []

    async def endpoint(request):
        runs.append(1)
        await add(100)
        running.set()
        await go_on.wait()
        return PlainTextResponse("done")

    async with serve(endpoint, idempotency={"wait": 20}) as client:
        first = asyncio.create_task(client.post("/endpoint", headers=key("k")))
        await running.wait()
        others = [asyncio.create_task(client.post("/endpoint", headers=key("k"))) for _ in range(50)]
        await asyncio.sleep(0)
        assert manager.engine.pool.checkedout() == 1
        go_on.set()
        answers = await asyncio.gather(first, *others)
    assert {(answer.status_code, answer.text) for answer in answers} == {(200, "done")}
    assert [answer.headers.get("idempotent-replayed") for answer in answers] == [None] + ["true"] * 50
    assert len(runs) == 1


async def test_a_repetition_that_has_waited_long_enough(serve):
    """409; it does not run."""
    go_on, running = asyncio.Event(), asyncio.Event()

    async def endpoint(request):
        running.set()
        await go_on.wait()
        return PlainTextResponse("done")

    async with serve(endpoint, idempotency={"wait": 0.05}) as client:
        first = asyncio.create_task(client.post("/endpoint", headers=key("k")))
        await running.wait()
        answer = await client.post("/endpoint", headers=key("k"))
        go_on.set()
        await first
    assert (answer.status_code, answer.headers["retry-after"]) == (409, "1")
    assert answer.json()["code"] == "idempotency-key-in-progress"


async def test_when_the_first_one_fails_the_next_one_runs(db, serve):
    """One after the other, and never two at a time."""
    runs, at_once = [], []

    async def endpoint(request):
        runs.append(1)
        at_once.append(1)
        assert len(at_once) == 1
        await asyncio.sleep(0.01)
        at_once.clear()
        await add(100)
        return PlainTextResponse("done", 200 if len(runs) == 4 else 500)

    async with serve(endpoint, idempotency={"wait": 20}) as client:
        answers = await asyncio.gather(*(client.post("/endpoint", headers=key("k")) for _ in range(10)))
    assert sorted(answer.status_code for answer in answers) == [200] * 7 + [500] * 3
    assert len(runs) == 4


@pytest.mark.drivers("asyncpg", "psycopg", "asyncmy", "aiomysql")
@pytest.mark.parametrize("ends", ["commits", "rolls back", "hangs"])
async def test_a_key_that_another_process_has(db, keys, pay, ends):
    """It is asked for again and again, each time for a moment; never is a connection held meanwhile."""
    engine = db.engine(pool_size=1, max_overflow=0, pool_timeout=2)
    mine, theirs = UnitOfWorkManager(engine), UnitOfWorkManager(db.engine())
    wait = 0.3 if ends == "hangs" else 20
    go_on, running = asyncio.Event(), asyncio.Event()

    async def slow(request):
        await request.body()
        await add(99)
        running.set()
        await go_on.wait()
        return PlainTextResponse("theirs", 200 if ends == "commits" else 500)

    others = app_of(theirs, slow, atomic=True, idempotency=Idempotency(keys, caller=caller))
    app = app_of(
        mine, slow_or(pay), atomic=True, retries=5, idempotency=Idempotency(keys, caller=caller, wait=wait),
        exception_handlers=exception_handlers,
    )  # fmt: skip
    async with client_of(app) as here, client_of(others) as there:
        first = asyncio.create_task(there.post("/slow", headers=key("k")))
        await running.wait()
        repeating = [asyncio.create_task(here.post("/slow", headers=key("k"))) for _ in range(20)]
        if ends != "hangs":
            await asyncio.sleep(0.12)
            async with mine.begin() as unit:  # the pool has one connection
                await unit.session.execute(text("SELECT 1"))
            go_on.set()
        answers = await asyncio.gather(*repeating)
        go_on.set()
        await first
    told = {(answer.status_code, answer.text if answer.status_code != 409 else "") for answer in answers}
    assert told == {"commits": {(200, "theirs")}, "rolls back": {(201, '{"run":1}')}, "hangs": {(409, "")}}[ends]
    assert pay.runs == (1 if ends == "rolls back" else 0)
    assert engine.pool.checkedout() == 0
    assert not mine.statistics().retries  # waiting is no retry


def slow_or(pay):
    """Return the endpoint of this process, under the other's name."""

    async def slow(request):
        return await pay(request)

    return slow


async def test_read_session_and_database_see_the_work(db, serve):
    """What the record stands for is there: the account, by the key of the response."""

    async def endpoint(request):
        await add(100, 7)
        return JSONResponse({"balance": (await current_session().get_one(Account, 100)).balance})

    async with serve(endpoint) as client:
        answer = await client.post("/endpoint", headers=key("k"))
    assert answer.json() == {"balance": await db.scalar("SELECT balance FROM account WHERE id = 100")} == {"balance": 7}


async def test_what_it_costs(serve, manager):
    """Two statements more than without a key, and no further COMMIT or flush; a repetition is one statement."""

    async def endpoint(request):
        await add(int(request.query_params["id"]))
        return PlainTextResponse("done")

    async def sent(identity, headers):
        before = manager.statistics().committed
        with count_queries(manager) as queries:
            await client.post(f"/endpoint?id={identity}", headers=headers)
        return queries.count, manager.statistics().committed - before

    async with serve(endpoint) as client:
        without, commits = await sent(100, {})
        assert await sent(101, key("k")) == (without + 2, commits)
        assert await sent(101, key("k")) == (1, 0)


async def test_a_thousand_repetitions_that_wait(serve, manager, pay):
    """They hold no connection, and are all answered."""
    go_on, running = asyncio.Event(), asyncio.Event()

    async def endpoint(request):
        running.set()
        await go_on.wait()
        return await pay(request)

    async with serve(endpoint, idempotency={"wait": 50}) as client:
        first = asyncio.create_task(client.post("/endpoint", headers=key("k")))
        await running.wait()
        others = [asyncio.create_task(client.post("/endpoint", headers=key("k"))) for _ in range(1000)]
        for _ in range(50):
            await asyncio.sleep(0)
        assert manager.engine.pool.checkedout() <= 1
        go_on.set()
        answers = await asyncio.gather(first, *others)
    assert {(answer.status_code, answer.text) for answer in answers} == {(201, '{"run":1}')}
    assert (pay.runs, manager.statistics().attempts) == (1, 1)


async def test_one_object_for_two_databases(manager, keys, pay, tmp_path, db):
    """The same key of the same caller is another one in another database, also while the first one runs."""
    others = IdempotencyKeys(MetaData())
    assert others.table.name == keys.table.name
    engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path / 'other.db'}")
    async with engine.begin() as connection:
        await connection.run_sync(others.table.metadata.create_all)
        await connection.run_sync(Account.metadata.create_all)
    idempotency = Idempotency(keys, caller=caller)
    both = asyncio.Barrier(2)

    async def endpoint(request):
        await both.wait()  # neither waits for the other's end
        return await pay(request)

    apps = [app_of(one, endpoint, atomic=True, idempotency=idempotency) for one in (manager, UnitOfWorkManager(engine))]
    async with client_of(apps[0]) as here, client_of(apps[1]) as there, asyncio.timeout(20):
        answers = await asyncio.gather(*(client.post("/endpoint", headers=key("k")) for client in (here, there)))
    await engine.dispose()
    assert ["idempotent-replayed" in answer.headers for answer in answers] == [False, False]
    assert pay.runs == 2


async def test_a_header_of_the_middleware_itself_is_not_kept(db, serve, pay):
    """`Server-Timing` tells of one response; its repetition has its own or none."""
    async with serve(endpoint_of(pay), server_timing=True) as client:
        first, _again = [await client.post("/endpoint", headers=key("k")) for _ in range(2)]
    assert "commit" in first.headers["server-timing"]
    ((headers,),) = await db.rows("SELECT headers FROM uow_idempotency")
    names = [line.partition(b":")[0] for line in bytes(headers).split(b"\n")]
    assert sorted(names) == [b"content-type", b"etag", b"location"]


async def test_fastapi(db, manager, keys):
    """Its validation reads the body, and its errors are as they were; a dependency that knows the user goes with `once`."""
    app = FastAPI()
    app.add_middleware(UnitOfWorkMiddleware, manager=manager, atomic=True, idempotency=Idempotency(keys, caller=caller))

    @transactional
    @keys.once(space="opening", key=lambda user, key, identity: f"{user}:{key}")
    async def open_account(user, key, identity):
        await add(identity)
        return identity

    @app.post("/accounts", status_code=201)
    async def post(identity: Annotated[int, Body()]) -> dict[str, int]:
        await add(identity)
        return {"id": identity}

    @app.put("/accounts")
    async def put(
        idempotency_key: Annotated[str, Header()], identity: int, user: Annotated[int, Depends(lambda: 7)]
    ) -> int:
        return await open_account(user, idempotency_key, identity)

    async with client_of(app) as client:
        bad = await client.post("/accounts", json="x", headers=key("k"))
        posted = [await client.post("/accounts", json=100, headers=key("k")) for _ in range(2)]
        again = [await client.put("/accounts?identity=101", headers=key("k")) for _ in range(2)]
    assert bad.status_code == 422
    assert [(answer.status_code, answer.json()) for answer in posted] == [(201, {"id": 100})] * 2
    assert [(answer.status_code, answer.json()) for answer in again] == [(200, 101)] * 2
    assert await count(db) == 3
