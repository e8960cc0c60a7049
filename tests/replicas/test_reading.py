"""Units that only read go to a replica that shows what their client has written."""

from __future__ import annotations

import pytest

from sqla_uow import UnitOfWorkManager
from tests.replicas.conftest import at_replica, read, write

servers = pytest.mark.drivers("asyncpg", "psycopg", "asyncmy", "aiomysql")


@servers
async def test_who_only_reads_goes_to_a_replica(pair):
    """A read-only unit and a scope's read session do; one that may write, or is SERIALIZABLE, does not."""
    manager = pair.manager()
    with manager.activate():
        assert await read() == (0, True)
    async with manager.begin():
        assert not await at_replica()
    async with manager.begin(read_only=True, isolation="SERIALIZABLE"):
        assert not await at_replica()
    async with manager.begin(read_only=True, isolation="REPEATABLE READ"):
        assert await at_replica()
    async with manager.scope():
        assert await at_replica()


@servers
async def test_a_client_reads_what_it_has_written(pair):
    """Each of 200 writes is read back, nearly always from the replica; the control does without positions."""
    manager, stale, served = pair.manager(replica_wait=1.0), 0, 0
    with manager.activate():
        for number in range(1, 201):
            await write(number)
            last, from_replica = await read()
            stale += last != number
            served += from_replica
    assert (stale, served >= 180) == (0, True)


@servers
async def test_a_replica_that_lags_is_passed_over(pair):
    """Its client reads from the primary; somebody who has written nothing reads there, and the old state."""
    manager = pair.manager()
    pair.replica.pause()
    async with manager.scope() as scope:
        await write(1)
        assert await read() == (1, False)
        position = scope.position
    async with manager.scope(position=""):
        assert await read() == (0, True)
    async with manager.scope(position=position):
        assert await read() == (1, False)
        pair.replica.resume()
    await pair.caught_up()
    async with manager.scope(position=""):
        assert await read() == (1, True)


@servers
async def test_a_replica_that_is_down_is_passed_over(pair):
    """The primary answers while it is down; it is used again once it is back."""
    manager = UnitOfWorkManager(pair.engine(pair.primary), replicas=[pair.engine(pair.replica)])
    with manager.activate():
        await write(1)
        pair.replica.kill()
        assert await read() == (1, False)
