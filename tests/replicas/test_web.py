"""The position between two requests: read-your-writes through the middleware."""

from __future__ import annotations

import asyncio
import os
import time
from itertools import count

import pytest
from sqlalchemy import text
from starlette.responses import JSONResponse

from sqla_uow import current_session, current_unit, transactional
from tests.kit.waiting import until
from tests.replicas.conftest import at_replica, write
from tests.starlette.client import app_of, client_of

PAIRS = int(os.environ.get("SQLA_UOW_PAIRS", "200"))
"""How many writes are read back in all; 10,000 take a minute or two: tox -e long."""
pytestmark = [
    pytest.mark.drivers("asyncpg", "psycopg", "asyncmy", "aiomysql"),
    pytest.mark.timeout(max(60, PAIRS / 20)),
]


async def put(request):
    """Write a row."""
    await write(int(request.query_params["id"]))
    return JSONResponse(None)


async def get(request):
    """Say whether the row is there, and whether a replica said so."""
    question = text("SELECT count(*) FROM note WHERE id = :id")
    found = await current_session().scalar(question, {"id": int(request.query_params["id"])})
    return JSONResponse([found, await at_replica()])


async def pairs(app, number, numbers):
    """As one client, write and read back; return how many were missing, and how many came from a replica."""
    stale = served = 0
    async with client_of(app, raise_app_exceptions=True) as client:
        for _ in range(number):
            key = next(numbers)
            await client.post("/put", params={"id": key})
            found, from_replica = (await client.get("/get", params={"id": key})).json()
            stale += not found
            served += from_replica
    return stale, served


async def all_pairs(app):
    """Let eight clients write and read."""
    numbers = count(1)
    outcomes = await asyncio.gather(*(pairs(app, PAIRS // 8, numbers) for _ in range(8)))
    return tuple(sum(column) for column in zip(*outcomes, strict=True))


@pytest.mark.parametrize("atomic", [False, True])
async def test_clients_read_what_they_have_written(pair, atomic):
    """Nothing is stale, and nearly all is read from the replica, which follows at once."""
    options = {"atomic": True, "read_only_methods": ["GET"]} if atomic else {}
    stale, served = await all_pairs(app_of(pair.manager(replica_wait=0.3), put, get, **options))
    assert (stale, served >= 0.9 * (PAIRS // 8 * 8)) == (0, True)


async def test_clients_read_what_they_have_written_while_the_replica_lags(pair):
    """It stops and goes on all the time: nothing is stale.  Without positions it would be."""
    app, blind = app_of(pair.manager(), put, get), app_of(pair.manager(), put, get, position_in="header")

    done = asyncio.Event()

    async def lag():
        while not done.is_set():
            await asyncio.to_thread(pair.replica.pause)
            await asyncio.sleep(0.1)
            await asyncio.to_thread(pair.replica.resume)
            await asyncio.sleep(0.02)

    lagging = asyncio.create_task(lag())
    try:
        stale, _served = await all_pairs(app)
        pair.primary.execute("DELETE FROM note")
        missed, _served = await all_pairs(blind)  # these clients do not send the header back
    finally:
        done.set()
        await lagging
    assert (stale, missed > 0) == (0, True)
    async with client_of(app, raise_app_exceptions=True) as client:
        await client.post("/put", params={"id": 0})

        async def caught_up():
            return (await client.get("/get", params={"id": 0})).json() == [1, True]

        await until(caught_up)


async def test_the_cookie(pair):
    """Set when something was written, and only then; for this site alone, and no script."""
    async with client_of(app_of(pair.manager(), put, get), raise_app_exceptions=True) as client:
        assert "set-cookie" not in (await client.get("/get", params={"id": 1})).headers
        written = await client.post("/put", params={"id": 1})
        name, _, rest = written.headers["set-cookie"].partition("=")
        assert (name, rest.partition("; ")[2]) == ("uow-position", "Path=/; HttpOnly; SameSite=Lax")
        assert len(rest) < 80
        assert "set-cookie" not in (await client.get("/get", params={"id": 1})).headers
        again = await client.post("https://test/put", params={"id": 2})
        assert again.headers["set-cookie"].endswith("; Secure")


async def test_the_header(pair):
    """For clients that keep no cookies; a name of its own for a manager that has one."""
    manager = pair.manager(name="notes")
    app = app_of(manager, put_there, get_there, position_in="header")
    pair.replica.pause()
    async with client_of(app, raise_app_exceptions=True) as client:
        written = await client.post("/put_there", params={"id": 1})
        position = {"Uow-Position-Notes": written.headers["uow-position-notes"]}
        params = {"id": 1}
        assert (await client.get("/get_there", params=params)).json() == [0, True]
        assert (await client.get("/get_there", params=params, headers=position)).json() == [1, False]
        pair.replica.resume()

        async def there():
            return (await client.get("/get_there", params=params, headers=position)).json() == [1, True]

        await until(there)


async def put_there(request):
    """Write a row, in the manager "notes"."""

    @transactional(using="notes")
    async def insert(number):
        await current_unit("notes").session.execute(text("INSERT INTO note (id) VALUES (:id)"), {"id": number})

    await insert(int(request.query_params["id"]))
    return JSONResponse(None)


async def get_there(request):
    """Say whether the row is there, in the manager "notes"."""
    session = current_session("notes")
    found = await session.scalar(
        text("SELECT count(*) FROM note WHERE id = :id"), {"id": int(request.query_params["id"])}
    )
    postgresql = session.get_bind().dialect.name == "postgresql"
    question = text("SELECT pg_is_in_recovery()" if postgresql else "SELECT @@global.read_only")
    return JSONResponse([found, bool(await session.scalar(question))])


@pytest.mark.parametrize("cookie", ["0-18446744073709551614", "0-99999999999999999999", "x" * 3000, "%00", "0-1,0-2"])
async def test_a_forged_cookie(pair, cookie):
    """No error, no wait longer than the bound, and another one instead."""
    manager = pair.manager(replica_wait=0.1)
    async with client_of(app_of(manager, put, get), raise_app_exceptions=True) as client:
        began = time.monotonic()
        answer = await client.get("/get", params={"id": 1}, headers={"cookie": f"a=b; uow-position={cookie}; c=d"})
        assert (answer.status_code, time.monotonic() - began < 3) == (200, True)
        assert answer.headers["set-cookie"].startswith("uow-position=")
        assert cookie not in answer.headers["set-cookie"]


async def test_nothing_is_kept(pair):
    """Without a place for positions, everybody is one client."""
    manager = pair.manager()
    pair.replica.pause()
    async with client_of(app_of(manager, put, get, position_in=None), raise_app_exceptions=True) as client:
        written = await client.post("/put", params={"id": 1})
        assert not {"set-cookie", "uow-position"} & set(written.headers)
        assert (await client.get("/get", params={"id": 1})).json() == [1, False]
