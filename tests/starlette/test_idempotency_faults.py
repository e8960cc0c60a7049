"""The header Idempotency-Key where something goes wrong: conflicts, lost answers of COMMIT, cancellation, many at a time."""

from __future__ import annotations

import asyncio

import pytest
from starlette.responses import JSONResponse, PlainTextResponse

from sqla_uow import UnitOfWorkManager, current_session
from sqla_uow.testing import FaultPlan, assert_no_leaks, cancel_at
from sqla_uow_starlette import Idempotency, UnitOfWorkMiddleware
from tests.kit.databases import ONE_OF_EACH
from tests.kit.losses import COMMIT
from tests.kit.troubles import CommitBlocked
from tests.kit.waiting import until
from tests.servers import Proxy
from tests.starlette.client import add
from tests.starlette.keyed import caller, key

SERVERS = ("asyncpg", "psycopg", "asyncmy", "aiomysql")
ACCOUNTS = "SELECT count(*) FROM account"
RECORDS = "SELECT count(*) FROM uow_idempotency"
LEVELS = {
    "sqlite": ["SERIALIZABLE"],
    "postgresql": ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"],
    "mysql": ["READ UNCOMMITTED", "READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"],
}


async def begun(db):
    """Fill the tables that troubles need."""
    await db.run(
        "INSERT INTO account (id, balance) VALUES (2, 0)",
        "INSERT INTO versioned (id, value, version) VALUES (1, 0, 1)",
    )


@pytest.mark.parametrize("retries", [3, 0])
async def test_every_trouble(db, keys, serve, kind, retries):
    """With retries nobody notices it; without, the client is told, and the same key runs. There is one record, of what was done."""
    if kind.needs_first or kind is CommitBlocked:
        pytest.skip("it would strike the claim, before the endpoint can settle it")
    await begun(db)
    trouble, bodies = kind(db), []

    async def endpoint(request):
        bodies.append(await request.body())
        await trouble.settle()
        if len(bodies) == 3 or (len(bodies) == 2 and not retries):
            await trouble.write(current_session())
            return PlainTextResponse("done")
        await trouble.strike(current_session())
        return PlainTextResponse("done")

    manager = UnitOfWorkManager(trouble.engine())
    async with serve(endpoint, manager=manager, retries=retries, isolation=trouble.isolation) as client:
        first = await client.post("/endpoint", headers=key("k"), content=b"5")
        await trouble.settle()
        again = await client.post("/endpoint", headers=key("k"), content=b"5")
        last = await client.post("/endpoint", headers=key("k"), content=b"5")
    assert first.status_code == 200 if retries else first.status_code in (409, 503)
    assert (again.status_code, again.text) == (last.status_code, last.text) == (200, "done")
    assert "idempotent-replayed" in last.headers
    assert bodies == [b"5"] * (3 if retries else 2)
    assert (await db.scalar("SELECT count(*) FROM note"), await db.scalar(RECORDS)) == (1, 1)


@pytest.mark.drivers(*SERVERS)
@pytest.mark.parametrize("applied", [True, False])
async def test_an_answer_of_commit_that_is_lost(db, keys, serve, applied):
    """The client is told to send the same key again, and then it gets the truth: its response, or the work."""
    await begun(db)
    runs = []

    async def endpoint(request):
        runs.append(1)
        await add(100)
        return JSONResponse({"run": len(runs)})

    with Proxy("127.0.0.1", db.port) as proxy:
        manager = UnitOfWorkManager(db.engine(port=proxy.port, pool_size=1, max_overflow=0))
        async with serve(endpoint, manager=manager) as client:
            await client.post("/endpoint", headers=key("another"))  # connects
            await db.run("DELETE FROM account WHERE id = 100")
            runs.clear()
            proxy.on_client_bytes(COMMIT[db.driver], "cut", after_server=applied)
            first = await client.post("/endpoint", headers=key("k"))
            again = await client.post("/endpoint", headers=key("k"))
        await manager.engine.dispose()
    told = first.json()
    assert (first.status_code, told["code"], told["retry"]) == (500, "ambiguous-commit", "same-key")
    assert first.headers["retry-after"] == "1"
    assert "same Idempotency-Key" in told["detail"]
    assert (again.status_code, again.json()) == (200, {"run": 1 if applied else 2})
    assert ("idempotent-replayed" in again.headers) == applied
    assert await db.scalar("SELECT count(*) FROM account WHERE id = 100") == 1


@pytest.mark.drivers(*SERVERS)
@pytest.mark.parametrize("applied", [True, False])
async def test_a_commit_that_is_still_under_way(db, keys, serve, applied):
    """Who repeats it at another process waits while the server has not decided, and is answered by the first response."""
    await begun(db)
    runs = []

    async def endpoint(request):
        runs.append(1)
        await add(100)
        return JSONResponse({"run": len(runs)})

    with Proxy("127.0.0.1", db.port) as proxy:
        manager, other = UnitOfWorkManager(db.engine(port=proxy.port)), UnitOfWorkManager(db.engine())
        patient = {"wait": 20}
        async with (
            serve(endpoint, manager=manager) as here,
            serve(endpoint, manager=other, idempotency=patient) as there,
        ):
            held = proxy.on_client_bytes(COMMIT[db.driver], "hold", after_server=applied)
            first = asyncio.create_task(here.post("/endpoint", headers=key("k")))
            await until(lambda: held.fired)
            again = asyncio.create_task(there.post("/endpoint", headers=key("k")))
            if applied:
                await again
            else:
                await until(lambda: other.statistics().begun > 0 and not other.engine.pool.checkedout())
                assert not again.done()
            held.release()
            answers = await asyncio.gather(first, again)
        await manager.engine.dispose()
    assert [answer.json() for answer in answers] == [{"run": 1}] * 2
    assert len(runs) == 1


@pytest.mark.drivers(*SERVERS)
async def test_without_a_key_an_unknown_commit_invites_no_repetition(db, keys, serve):
    """As before: no Retry-After."""
    await begun(db)

    async def endpoint(request):
        await add(100)
        return PlainTextResponse("done")

    with Proxy("127.0.0.1", db.port) as proxy:
        manager = UnitOfWorkManager(db.engine(port=proxy.port, pool_size=1, max_overflow=0))
        async with serve(endpoint, manager=manager) as client:
            proxy.on_client_bytes(COMMIT[db.driver], "cut", after_server=True)
            answer = await client.post("/endpoint")
        await manager.engine.dispose()
    assert (answer.status_code, answer.json()["code"]) == (500, "ambiguous-commit")
    assert "retry" not in answer.json()
    assert "retry-after" not in answer.headers


async def test_a_fault_between_commit_and_the_first_byte(db, manager, serve):
    """What the kit calls a cancellation behind COMMIT: not a byte is sent, and the same key gets the response."""
    runs = []

    async def endpoint(request):
        runs.append(1)
        await add(100)
        return PlainTextResponse("done")

    async with serve(endpoint) as client:
        with FaultPlan(manager, "cancel", at="after commit"), pytest.raises(asyncio.CancelledError):
            await asyncio.create_task(client.post("/endpoint", headers=key("k")))
        again = await client.post("/endpoint", headers=key("k"))
    assert (again.status_code, again.text, again.headers["idempotent-replayed"]) == (200, "done", "true")
    assert (len(runs), await db.scalar("SELECT count(*) FROM account WHERE id = 100")) == (1, 1)


@pytest.mark.drivers(*ONE_OF_EACH)
async def test_two_hundred_requests_with_one_key(db, keys, serve):
    """At every level, in two processes: one works, all others are answered by its response, and none by an error."""
    await begun(db)
    for number, level in enumerate(LEVELS[db.family]):
        runs = []

        async def endpoint(request, runs=runs, number=number):
            runs.append(1)
            await add(1000 + number)
            return JSONResponse({"level": number})

        # Two middlewares know nothing of each other, as two processes.
        both = [
            serve(
                endpoint, manager=UnitOfWorkManager(db.engine(pool_size=5, max_overflow=0)), isolation=level, retries=10,
                idempotency={"wait": 30},
            )
            for _ in range(2)
        ]  # fmt: skip
        async with both[0] as here, both[1] as there:
            answers = await asyncio.gather(
                *(
                    client.post("/endpoint", headers=key(level.replace(" ", "")))
                    for client in (here, there)
                    for _ in range(100)
                )
            )
        told = {(answer.status_code, answer.text) for answer in answers}
        assert told == {(200, f'{{"level":{number}}}')}, level
        assert sum("idempotent-replayed" not in answer.headers for answer in answers) == 1, level
        assert await db.scalar("SELECT count(*) FROM account WHERE id >= 1000") == number + 1


@pytest.mark.drivers(*ONE_OF_EACH)
async def test_different_keys_at_the_same_time(db, keys, serve):
    """Claims of different keys are no conflicts of each other, at any level and in an empty table: none is run again."""
    await begun(db)
    for level in LEVELS[db.family]:
        ready, all_here = [], asyncio.Event()

        async def endpoint(request, ready=ready, all_here=all_here):
            ready.append(1)
            if len(ready) == 5:
                all_here.set()
            if db.family != "sqlite":  # whose writers come one after the other
                await all_here.wait()
            return PlainTextResponse("done")

        manager = UnitOfWorkManager(db.engine(pool_size=5, max_overflow=0))
        async with serve(endpoint, manager=manager, isolation=level) as client:
            answers = await asyncio.gather(
                *(client.post("/endpoint", headers=key(f"{level.replace(' ', '')}{n}")) for n in range(5))
            )
        assert [answer.status_code for answer in answers] == [200] * 5, level


@pytest.mark.drivers(*ONE_OF_EACH)
async def test_cancelled_anywhere(db, manager, keys):
    """Wherever the server cancels a request, its record is there if its work is, and the same key gives the truth."""
    runs = []

    async def endpoint(scope, receive, send):
        runs.append(1)
        await receive()
        await add(100)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
        await send({"type": "http.response.body", "body": b"done"})

    app = UnitOfWorkMiddleware(endpoint, manager=manager, atomic=True, idempotency=Idempotency(keys, caller=caller))

    async def call(name):
        sent = []

        async def receive():
            return {"type": "http.request", "body": b"5", "more_body": False}

        async def send(message):
            sent.append(message)

        headers = [(b"idempotency-key", name.encode())]
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/",
            "query_string": b"",
            "headers": headers,
            "scheme": "http",
        }
        await app(scope, receive, send)
        return sent

    await call("warm")
    with assert_no_leaks(manager):
        for suspension in range(1, 200):
            await db.run("DELETE FROM account WHERE id = 100")
            runs.clear()
            name = f"k{suspension}"
            if not await cancel_at(suspension, call(name)):
                break
            await until(lambda: not manager.engine.pool.checkedout())
            done = await db.scalar("SELECT count(*) FROM account WHERE id = 100")
            assert await db.scalar("SELECT count(*) FROM uow_idempotency WHERE space = 'http'") == suspension + done
            await call(name)
            assert await db.scalar("SELECT count(*) FROM account WHERE id = 100") == 1
            assert (await call(name))[1]["body"] == b"done"
        else:
            pytest.fail("it never came to its end")
    assert suspension >= 5
