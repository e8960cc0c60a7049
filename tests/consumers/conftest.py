"""A broker, a queue of the test's own, and a database that has the tables."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sqla_uow import UnitOfWorkManager
from tests.consumers.work import Base
from tests.kit.databases import ONE_OF_EACH
from tests.kit.waiting import until

CHECKOUT = Path(__file__).parents[2]
_HERE = Path(__file__).parent
collect_ignore_glob = [] if os.environ.get("SQLA_UOW_CONSUMERS") else ["test_killed.py"]


def pytest_collection_modifyitems(config, items):
    """Leave out what costs time and tells little more: RabbitMQ with the second driver of a database, and some kills."""
    if not os.environ.get("SQLA_UOW_CONSUMERS"):
        left = [item for item in items if item.path.parent == _HERE and _is_for_the_long_run(item)]
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if item not in left]


def _is_for_the_long_run(item):
    client, driver = (item.callspec.params.get(name) for name in ("client", "driver"))
    return (client.startswith("rabbitmq") and driver not in (*ONE_OF_EACH, None)) or (
        client.endswith("faststream") and "start_worker" in item.fixturenames
    )


@pytest.fixture
async def manager(db):
    """An activated manager, whose pool has everything back at the end."""
    async with db.outside() as connection:
        await connection.run_sync(Base.metadata.drop_all)
        await connection.run_sync(Base.metadata.create_all)
        await connection.commit()
    manager = UnitOfWorkManager(db.engine(pool_size=5, max_overflow=0, pool_timeout=5))
    with manager.activate():
        yield manager
    assert manager.engine.pool.checkedout() == 0


@pytest.fixture
def broker(client, brokers):
    """The broker of a client, running."""
    return brokers.get(client.partition("-")[0])


@pytest.fixture
def queue():
    """A name that no other test has."""
    return f"deposits_{secrets.token_hex(4)}"


@pytest.fixture
async def post(client, broker, queue):
    """Who sends messages."""
    from tests.consumers.post import POSTS  # noqa: PLC0415  # whose packages may be missing

    async with POSTS[client.partition("-")[0]](broker.url(), queue) as post:
        yield post


class Worker:
    """A consumer in a process of its own.

    Args:
        pid: of the process.
        file: what it says.
    """

    def __init__(self, pid, file):
        self.is_alive = True
        self._pid, self._file = pid, file

    def said(self):
        """Return the lines that it has written."""
        return self._file.read_text().splitlines() if self._file.exists() else []

    def is_at_work(self):
        """Tell whether it lives and has worked a message."""
        return self.is_alive and self._file.exists() and self._file.stat().st_size > 0

    async def kill(self):
        """Kill it, and return when it is gone; it is an error if it has ended by itself."""
        self.is_alive = False
        os.kill(self._pid, signal.SIGKILL)
        await until(lambda: not Path(f"/proc/{self._pid}").exists())


@pytest.fixture(scope="session")
def nursery():
    """A process that forks workers."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.consumers.worker"],
        cwd=CHECKOUT,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        yield process
        process.stdin.close()


@pytest.fixture
def place(client, broker, queue, db):
    """What a worker is told of where its messages and its database are."""
    return {"client": client, "broker": broker.url(), "queue": queue, "database": db.url}


@pytest.fixture
async def start_worker(place, manager, nursery, tmp_path):
    """Return a function that starts a consumer in a process; none outlives the test.  See `tests.consumers.worker`."""
    workers = []

    def start_worker(how):
        file = tmp_path / f"worker-{len(workers)}"
        nursery.stdin.write(json.dumps({**place, "how": how, "said": str(file)}) + "\n")
        nursery.stdin.flush()
        workers.append(Worker(int(nursery.stdout.readline()), file))
        return workers[-1]

    yield start_worker
    for worker in workers:
        if worker.is_alive:
            await worker.kill()


class Consumer:
    """Works what is delivered in this process, and writes down what became of it."""

    def __init__(self, work):
        self.started = 0
        self.outcomes = []
        self._work = work

    async def __call__(self, name, payload):
        """Work a delivery."""
        self.started += 1
        try:
            outcome = await self._work(name, payload)
        except BaseException as error:
            self.outcomes.append(type(error))
            raise
        self.outcomes.append(outcome)


@pytest.fixture
def consuming(client, broker, queue, post, manager):
    """Return a block in which consumers run, one or more."""
    from tests.consumers.clients import CLIENTS  # noqa: PLC0415  # whose packages may be missing

    @contextlib.asynccontextmanager
    async def consuming(work, number=1, **options):
        consumer = Consumer(work)
        tasks = [asyncio.create_task(CLIENTS[client](broker.url(), queue, consumer, **options)) for _ in range(number)]
        try:
            yield consumer
            await post.until_acknowledged()
        finally:
            ended = [task for task in tasks if task.done()]
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            for task in ended:  # else nothing would say why nobody has consumed
                await task

    return consuming
