"""Over a real server: what a client has seen, another connection sees too; what failed at COMMIT is no success (W3)."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from sqlalchemy import select, text
from sqlalchemy.exc import IntegrityError
from starlette.background import BackgroundTask
from starlette.responses import PlainTextResponse, StreamingResponse

from sqla_uow import RetryPolicy, UnitOfWorkManager, after_commit, current_session, current_unit, errors, transactional
from tests.kit.losses import COMMIT
from tests.kit.models import Account
from tests.servers import Proxy
from tests.starlette.client import app_of
from tests.starlette.serving import first_byte, served

pytest.importorskip("uvicorn")

POSTGRESQL = pytest.mark.drivers("asyncpg", "psycopg")


@pytest.fixture
async def manager(db):
    """A manager over two accounts; its pool is whole at the end."""
    await db.run("INSERT INTO account (id, balance) VALUES (1, 10), (2, 20)")
    engine = db.engine(pool_size=5)
    yield UnitOfWorkManager(engine, retry=RetryPolicy(base=0.001))
    if hasattr(engine.pool, "checkedout"):
        assert engine.pool.checkedout() == 0


@pytest.mark.parametrize("atomic", [False, True], ids=["default", "atomic"])
async def test_the_first_byte_of_a_success_comes_after_the_commit(db, manager, atomic):
    """W2, W3: 200 of 200, streamed or not."""

    @transactional
    async def add(key):
        current_session().add(Account(id=key))

    async def endpoint(request):
        key = int(request.query_params["key"])
        await add(key)
        return PlainTextResponse("done") if key % 2 else StreamingResponse(iter(["done"]))

    seen = 0
    async with served(app_of(manager, endpoint, atomic=atomic)) as (port, _), db.outside() as other:
        for key in range(100, 300):
            request = f"GET /endpoint?key={key} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
            byte, reader, writer = await first_byte(port, request.encode())
            rows = await other.execute(text("SELECT count(*) FROM account WHERE id = :key"), {"key": key})
            seen += byte == b"H" and rows.scalar_one() == 1
            await other.rollback()
            assert b" 200 " in await reader.read()
            writer.close()
            await writer.wait_closed()
    assert seen == 200


class Outcome:
    """What of a request has happened."""

    def __init__(self):
        self.hooks = []
        self.background = []

    def answer(self):
        after_commit(self.hooks.append, 1)
        return PlainTextResponse("success", background=BackgroundTask(self.background.append, 1))


async def raw(port, path="/endpoint"):
    """Return all bytes of the answer."""
    _byte, reader, writer = await first_byte(
        port, f"GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n".encode()
    )
    answer = _byte + await reader.read()
    writer.close()
    await writer.wait_closed()
    return answer


@POSTGRESQL
@pytest.mark.parametrize("handled", [False, True], ids=["unhandled", "handled"])
async def test_a_deferred_constraint_that_fails_at_commit(db, manager, handled):
    """W3: never a byte of success; the application's own handler answers; no background task, no hook."""
    await db.run(
        "ALTER TABLE note ADD CONSTRAINT late FOREIGN KEY (account_id) REFERENCES account (id) DEFERRABLE INITIALLY DEFERRED"
    )
    outcome = Outcome()

    async def endpoint(request):
        await current_session().execute(text("INSERT INTO note (account_id, text) VALUES (77, '')"))
        return outcome.answer()

    async def own(request, error):
        return PlainTextResponse(f"own {type(error).__name__}", 409)

    await db.run("ALTER TABLE note DROP CONSTRAINT note_account_id_fkey")
    app = app_of(manager, endpoint, atomic=True, exception_handlers={IntegrityError: own} if handled else None)
    async with served(app) as (port, _):
        answer = await raw(port)
    assert answer.startswith(b"HTTP/1.1 409 " if handled else b"HTTP/1.1 500 ")
    assert answer.endswith(b"own IntegrityError" if handled else b"Internal Server Error")
    assert (outcome.hooks, outcome.background) == ([], [])
    assert await db.scalar("SELECT count(*) FROM note") == 0


async def _skew(db, session):
    """Make this SERIALIZABLE transaction's COMMIT fail with 40001."""
    await session.execute(text("SELECT sum(balance) FROM account"))
    await session.execute(text("UPDATE account SET balance = balance + 1 WHERE id = 1"))
    async with db.outside() as other:
        await other.execute(text("SET TRANSACTION ISOLATION LEVEL SERIALIZABLE"))
        await other.execute(text("SELECT sum(balance) FROM account"))
        await other.execute(text("UPDATE account SET balance = balance + 1 WHERE id = 2"))
        await other.commit()


@POSTGRESQL
@pytest.mark.parametrize("handled", [False, True], ids=["unhandled", "handled"])
async def test_a_conflict_at_commit_without_retries(db, manager, handled):
    """W3: 40001 at COMMIT: 503 of ours, or the application's own handler; nothing else happens."""
    outcome = Outcome()

    async def endpoint(request):
        await _skew(db, current_session())
        return outcome.answer()

    async def own(request, error):
        return PlainTextResponse(f"own {error.code} {error.attempts}", 409)

    handlers = {errors.ConflictError: own} if handled else None
    app = app_of(manager, endpoint, atomic=True, isolation="SERIALIZABLE", exception_handlers=handlers)
    async with served(app) as (port, _):
        answer = await raw(port)
    assert answer.startswith(b"HTTP/1.1 409 " if handled else b"HTTP/1.1 503 ")
    assert (b"own 40001 1" in answer) == handled
    assert (b"retry-after: 1" in answer) == (not handled)
    assert (outcome.hooks, outcome.background) == ([], [])
    assert await db.scalar("SELECT balance FROM account WHERE id = 1") == 10


@pytest.mark.drivers("asyncpg", "psycopg", "asyncmy", "aiomysql")
@pytest.mark.parametrize("applied", [False, True], ids=["before", "after"])
async def test_a_lost_answer_to_commit(db, applied):
    """W3, W4, C1: 500 with a code, no success, no second attempt though there are retries, no background, no hook."""
    await db.run("INSERT INTO account (id, balance) VALUES (1, 0)")
    outcome, runs = Outcome(), []

    async def endpoint(request):
        runs.append(1)
        await current_session().execute(text("UPDATE account SET balance = balance + 1"))
        return outcome.answer()

    with Proxy("127.0.0.1", db.port) as proxy:
        manager = UnitOfWorkManager(db.engine(port=proxy.port))
        lost = proxy.on_client_bytes(COMMIT[db.driver], "cut", after_server=applied)
        async with served(app_of(manager, endpoint, atomic=True, retries=5)) as (port, _):
            answer = await raw(port)
        assert lost.fired
        proxy.forward_all()
        await manager.engine.dispose()
    assert answer.startswith(b"HTTP/1.1 500 ")
    assert b'"code":"ambiguous-commit"' in answer
    assert b"retry-after" not in answer
    assert (outcome.hooks, outcome.background, runs) == ([], [], [1])
    assert await db.scalar("SELECT balance FROM account") == applied


@POSTGRESQL
@pytest.mark.parametrize("atomic", [False, True], ids=["transactional", "atomic"])
async def test_two_serializable_writers_both_succeed(db, manager, atomic):
    """W4, R1: each reads what the other writes; one meets the conflict, and both get 2xx."""
    met, runs = asyncio.Barrier(2), []

    async def write(key):
        runs.append(key)
        session = current_session()
        total = sum((await session.scalars(select(Account.balance))).all())
        if current_unit().attempt == 1:
            await met.wait()
        (await session.get_one(Account, key)).balance = total

    called = write if atomic else transactional(retries=5, isolation="SERIALIZABLE")(write)

    async def endpoint(request):
        await called(int(request.query_params["key"]))
        return PlainTextResponse("done")

    options = {"atomic": True, "retries": 5, "isolation": "SERIALIZABLE"} if atomic else {}
    async with served(app_of(manager, endpoint, **options)) as (port, _), httpx.AsyncClient() as client:
        url = f"http://127.0.0.1:{port}/endpoint?key="
        answers = await asyncio.gather(client.get(url + "1"), client.get(url + "2"))
    assert [answer.status_code for answer in answers] == [200, 200]
    assert len(runs) > 2
    assert sorted(await db.rows("SELECT balance FROM account")) in ([(30,), (50,)], [(30,), (40,)])


@POSTGRESQL
async def test_the_positive_control_of_two_writers(db, manager):
    """Without retries one of the two gets 503: the conflict is real."""
    met = asyncio.Barrier(2)

    async def endpoint(request):
        session = current_session()
        total = sum((await session.scalars(select(Account.balance))).all())
        await met.wait()
        (await session.get_one(Account, int(request.query_params["key"]))).balance = total
        return PlainTextResponse("done")

    app = app_of(manager, endpoint, atomic=True, isolation="SERIALIZABLE")
    async with served(app) as (port, _), httpx.AsyncClient() as client:
        url = f"http://127.0.0.1:{port}/endpoint?key="
        answers = await asyncio.gather(client.get(url + "1"), client.get(url + "2"))
    assert sorted(answer.status_code for answer in answers) == [200, 503]


async def test_an_error_in_mid_stream_changes_nothing_committed(db, manager):
    """W5: the connection breaks, the row stays, and nothing is left open."""

    async def endpoint(request):
        current_session().add(Account(id=3))

        async def stream():
            yield "one"
            raise OSError

        return StreamingResponse(stream())

    async with served(app_of(manager, endpoint, atomic=True)) as (port, _):
        answer = await raw(port)
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert not answer.endswith(b"0\r\n\r\n")
    assert await db.scalar("SELECT count(*) FROM account") == 3


async def test_a_failing_background_task_changes_nothing_committed(db, manager):
    """W5: the client has its answer, the row stays."""

    async def fail():
        raise OSError

    async def endpoint(request):
        current_session().add(Account(id=3))
        return PlainTextResponse("done", background=BackgroundTask(fail))

    async with served(app_of(manager, endpoint, atomic=True)) as (port, _):
        answer = await raw(port)
    assert answer.endswith(b"done")
    assert await db.scalar("SELECT count(*) FROM account") == 3
