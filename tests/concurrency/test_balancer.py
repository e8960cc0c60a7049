"""A5: what is killed on a server is proven ours first, behind an address that leads to several servers."""

from __future__ import annotations

import asyncio
import itertools

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from sqla_uow import UnitOfWorkManager
from tests.kit.waiting import until
from tests.servers import MariaDB, Proxy

SLEEPING = "SELECT id FROM information_schema.processlist WHERE state = 'User sleep'"


class Balancer(Proxy):
    """Lead each new connection to the next server of a plan, as a TCP balancer does."""

    def __init__(self, ports):
        super().__init__("127.0.0.1", 0)
        self._ports = ports

    @property
    def _upstream(self):
        return "127.0.0.1", next(self._ports)

    @_upstream.setter
    def _upstream(self, upstream):
        """Take no single one."""


@pytest.fixture(scope="module")
def two_servers():
    """Two servers of MariaDB that know nothing of each other."""
    if (reason := MariaDB.unavailable()) is not None:
        pytest.skip(reason)
    servers = MariaDB(), MariaDB()
    for server in servers:
        server.start()
    yield servers
    for server in servers:
        server.stop()


async def _connections_until(server, driver, number):
    """Let the server give out connection numbers up to one, so that both give the same ones next."""
    while True:
        engine = create_async_engine(server.url(driver))
        async with engine.connect() as connection:
            current = await connection.scalar(text("SELECT connection_id()"))
        await engine.dispose()
        if current >= number:
            return current


@pytest.mark.drivers("asyncmy", "aiomysql")
@pytest.mark.parametrize("order", ["innocent next", "ours next", "ours never"])
async def test_kill_hits_nobody_else(driver, two_servers, order, caplog):
    """A5: the same number is an innocent's on the other server; ours is looked for a few times, else there is a warning."""
    first, second = two_servers
    numbers = [await _connections_until(server, driver, 1) for server in two_servers]
    for server in two_servers:
        await _connections_until(server, driver, max(numbers) + 3)
    numbers = [await _connections_until(server, driver, 1) for server in two_servers]
    assert numbers[0] == numbers[1]
    plan = {
        "innocent next": itertools.chain([first.port, second.port], itertools.cycle([first.port])),
        "ours next": itertools.chain([first.port], itertools.cycle([first.port])),
        "ours never": itertools.chain([first.port], itertools.cycle([second.port])),
    }[order]
    innocent = create_async_engine(second.url(driver))
    with Balancer(plan) as balancer:
        connection = await innocent.connect()
        theirs = await connection.scalar(text("SELECT connection_id()"))
        engine = create_async_engine(first.url(driver, port=balancer.port))
        manager = UnitOfWorkManager(engine)
        mine = []

        async def work():
            async with manager.begin() as unit:
                mine.append(await unit.session.scalar(text("SELECT connection_id()")))
                await unit.session.execute(text("SELECT SLEEP(20)"))

        task = asyncio.create_task(work())
        await until(lambda: bool(mine))  # asking the server would use up a number
        await until(lambda: bool(first.execute(SLEEPING)))
        assert mine == [theirs]
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await connection.scalar(text("SELECT 'alive'")) == "alive"
        if order == "ours never":
            assert "was not sent there" in caplog.text
            first.execute(f"KILL {mine[0]}")
        await until(lambda: not first.execute(SLEEPING))
        await engine.dispose()
    await connection.close()
    await innocent.dispose()
