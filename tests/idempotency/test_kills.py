"""Whatever is killed, frozen or lost: a client that repeats its key gets one answer, and its work is done once."""

from __future__ import annotations

import asyncio
import functools
import os
import random
import signal
import time

import pytest
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from tests.idempotency.customers import Customers, Shop, ask, every_second
from tests.idempotency.shop import make_tables
from tests.kit.databases import SERVERS, UNPREPARED
from tests.servers import MariaDB, Proxy
from tests.servers.pgbouncer import PgBouncer

SECONDS = float(os.environ.get("SQLA_UOW_KEY_KILLS", "3"))
"""Of each harm; 30 in an environment of its own: tox -e idempotency-kills."""
SEED = int(os.environ.get("SQLA_UOW_KEY_SEED", "0")) or random.SystemRandom().randrange(1, 1_000_000)
CLIENTS = 50
pytestmark = [
    pytest.mark.timeout(SECONDS * 4 + 180),
    pytest.mark.direct("it has servers, and a pooler, of its own"),
]


@pytest.fixture
def server(driver):
    """A server of this test's own, None for SQLite."""
    kind = SERVERS.get(driver)
    if kind is None:
        yield None
        return
    if (reason := kind.unavailable()) is not None:
        pytest.skip(reason)
    with kind({"innodb_flush_log_at_trx_commit": "2"} if kind is MariaDB else {}) as server:
        yield server


@pytest.fixture
async def engine(driver, server, tmp_path):
    """An engine that nothing stands before, to a database with the shop's tables."""
    url = f"sqlite+aiosqlite:///{tmp_path / 'shop.db'}" if server is None else server.url(driver)
    engine = create_async_engine(url, poolclass=NullPool)
    await make_tables(engine)
    yield engine
    await engine.dispose()


@pytest.fixture
def shop(driver, server, engine):
    """Return the application's processes, before a database that is reached on this port."""

    def shop(port=None, **options):
        url = engine.url.render_as_string(hide_password=False) if server is None else server.url(driver, port=port)
        return Shop(url, options={"pool_size": 8, "pool_timeout": 5, **options.pop("engine", {})}, **options)

    return shop


async def worked(shop, engine, *harms, seconds=SECONDS):
    """Let clients ask while there is harm, one each second; check what came of it."""
    with shop:
        customers = Customers(shop, SEED)
        async with customers.asking(CLIENTS):
            done = await every_second(seconds, *harms)
        await customers.check(engine)
    print(f"\nseed {SEED}: {done} harms, {len(customers.answers)} keys; answers: {dict(customers.told)}")  # noqa: T201
    assert len(customers.answers) >= CLIENTS


def kill(server):
    """Kill a server, and start it again."""
    server.kill()
    server.restart()


async def test_application_and_database_are_killed(shop, server, engine):
    """One after the other, one each second."""
    the_shop = shop()
    harms = [functools.partial(the_shop.signal, port, signal.SIGKILL) for port in the_shop.ports]
    if server is not None:
        harms.insert(1, functools.partial(kill, server))
    await worked(the_shop, engine, *harms)
    assert the_shop.births > len(the_shop.ports)


@pytest.mark.drivers("asyncpg", "psycopg")
async def test_application_pooler_and_database_are_killed(driver, shop, server, engine):
    """With a pooler that gives each transaction another session of the server."""
    if (reason := PgBouncer.unavailable()) is not None:
        pytest.skip(reason)
    with PgBouncer(server, size=8, settings={"server_login_retry": "1"}) as pooler:
        the_shop = shop(pooler.port, engine={"connect_args": UNPREPARED[driver]})
        harms = [functools.partial(the_shop.signal, port, signal.SIGKILL) for port in the_shop.ports]
        await worked(the_shop, engine, harms[0], pooler.restart, harms[1], functools.partial(kill, server))


@pytest.mark.drivers("asyncpg", "psycopg", "asyncmy", "aiomysql")
async def test_answers_of_commit_are_lost(shop, server, engine):
    """Ten a second, before the server has COMMIT or after it has applied it; the application is killed too."""
    chance = random.Random(SEED)
    with Proxy("127.0.0.1", server.port) as proxy:
        the_shop = shop(proxy.port)

        def lose():
            end = time.monotonic() + 0.9
            while time.monotonic() < end:
                proxy.on_client_bytes(b"COMMIT", "cut", after_server=chance.random() < 0.5)
                time.sleep(0.1)
            the_shop.signal(chance.choice(the_shop.ports), signal.SIGKILL)

        await worked(the_shop, engine, lose)


async def test_the_process_that_holds_a_key_is_frozen(driver, shop, engine):
    """As long as it is, repetitions are told so, and none runs; when it goes on, they get its answer."""
    # Nobody can say what the one writer of SQLite is at: a repetition is told that it waited for that in vain.
    alone = driver == "sqlite"
    expected = (503, "conflict") if alone else (409, "idempotency-key-in-progress")
    here_and_there = shop(wait=0.2, engine={"connect_args": {"timeout": 0.1}} if alone else {})
    here, there = here_and_there.ports
    with here_and_there:
        customers = Customers(here_and_there, SEED)
        assert (await ask(there, "warm"))[0] == (await ask(here, "warm"))[0] == 201
        first = asyncio.create_task(ask(here, "one", seconds=1.0))
        await asyncio.sleep(0.5)
        here_and_there.signal(here, signal.SIGSTOP)
        assert not first.done()
        end = time.monotonic() + SECONDS * 2
        while time.monotonic() < end:
            status, *_headers, body = await ask(there, "one")
            assert (status, expected[1].encode() in body) == (expected[0], True), body
        here_and_there.signal(here, signal.SIGCONT)
        answer = await first
        for key, known in (("one", answer), ("warm", await ask(here, "warm"))):
            customers.answers[key] = known
        assert answer is None or answer[0] == 201  # None: it has lost patience meanwhile
        customers.answers["one"] = answer or await ask(there, "one")
        await customers.check(engine)
