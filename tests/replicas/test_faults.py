"""What becomes of replicas and positions when something is in their way."""

from __future__ import annotations

import asyncio
import gc
import time

import pytest
from sqlalchemy import text
from sqlalchemy.exc import ProgrammingError

from sqla_uow import Status, UnitOfWorkManager, current_session, transactional
from sqla_uow._replicas import router as _replicas
from sqla_uow._replicas.position import UNKNOWN, to_text
from sqla_uow.errors import AmbiguousCommitError, ConflictError
from tests.kit.waiting import until
from tests.replicas.conftest import at_replica, read, write
from tests.servers import Proxy, Standby

pytestmark = pytest.mark.drivers("asyncpg", "psycopg", "asyncmy", "aiomysql")
POSITION = {"postgresql": b"pg_current_wal_insert_lsn", "mysql": b"gtid_binlog_pos"}


@transactional(read_only=True, retries=2)
async def read_stubbornly():
    """Return whether a replica answered."""
    return await at_replica()


@pytest.fixture
def quick(monkeypatch):
    """Be forgiven soon."""
    monkeypatch.setattr(_replicas, "DOWN_SECONDS", (0.2, 0.2))
    monkeypatch.setattr(_replicas, "LAGGING_SECONDS", 0.2)


async def test_a_replica_is_killed_and_comes_back(pair, quick, caplog):
    """Who was reading there is run again, at the primary; later the replica is used again."""
    manager = pair.manager()
    with manager.activate():
        assert await read_stubbornly()
        pair.replica.kill()
        assert not await read_stubbornly()
        assert "replica 1 is passed over for 0.2 s" in caplog.text
        pair.replica.restart()
        await until(read_stubbornly)


async def test_a_read_session_leaves_a_dead_replica(pair):
    """Its first statement meets a replica that has died since: it is sent to another, or to the primary."""
    manager = pair.manager()
    async with manager.scope():
        assert await at_replica()
    pair.replica.kill()
    async with manager.scope():
        assert not await at_replica()
        assert await current_session().scalar(text("SELECT count(*) FROM note")) == 0
    assert manager.engine.pool.checkedout() == manager.replicas[0].pool.checkedout() == 0


async def test_one_of_two_is_down(pair, caplog):
    """The other one is read from; the first is asked once."""
    with Proxy("127.0.0.1", pair.replica.port) as proxy:
        proxy.refuse()
        engines = [pair.engine(pair.replica, port=proxy.port), pair.engine(pair.replica)]
        manager = UnitOfWorkManager(pair.engine(pair.primary), replicas=engines)
        with manager.activate():
            assert [await read() for _ in range(6)] == [(0, True)] * 6
    assert [record.message for record in caplog.records if "passed over" in record.message] == [
        "replica 1 is passed over for 1 s (ConnectionRefusedError)"
        if pair.driver == "asyncpg"
        else "replica 1 is passed over for 1 s (OperationalError 2003)"
        if pair.driver in ("asyncmy", "aiomysql")
        else "replica 1 is passed over for 1 s (OperationalError)"
    ]


# aiomysql leaves a connection that was cut off while it was being made to the garbage collector
@pytest.mark.filterwarnings("ignore:Exception ignored in. <function Connection:pytest.PytestUnraisableExceptionWarning")
async def test_a_replica_that_does_not_answer(pair, monkeypatch):
    """It is waited for no longer than the bound, once."""
    monkeypatch.setattr(_replicas, "ANSWER_SECONDS", 1.0)
    with Proxy("127.0.0.1", pair.replica.port) as proxy:
        manager = pair.manager(port=proxy.port)
        with manager.activate():
            assert await read() == (0, True)
            await manager.replicas[0].dispose()
            proxy.hold("to_client")
            began = time.monotonic()
            assert await read() == (0, False)
            assert 1 <= time.monotonic() - began < 5
            began = time.monotonic()
            assert await read() == (0, False)
            assert time.monotonic() - began < 0.9
            proxy.forward_all()
        await manager.replicas[0].dispose()
        gc.collect()


@pytest.mark.drivers("asyncpg", "psycopg")
async def test_the_replay_cancels_a_reader(pair):
    """A conflict with recovery is retried elsewhere."""
    pids = []

    @transactional(read_only=True, isolation="REPEATABLE READ", retries=2)
    async def look_twice():
        session = current_session()
        await session.execute(text("SELECT count(*) FROM note"))
        if not pids:
            await asyncio.to_thread(pair.primary.execute, "DELETE FROM note")
            await asyncio.to_thread(pair.primary.execute, "VACUUM note")
            await until(lambda: standby.execute("SELECT sum(confl_snapshot) FROM pg_stat_database_conflicts") != "0")
        pids.append(await at_replica())
        return len(pids)

    with Standby(pair.primary, {"max_standby_streaming_delay": "0"}) as standby:
        manager = pair.manager(replica=pair.engine(standby))
        with manager.activate():
            await write(1)
            await until(lambda: standby.execute("SELECT count(*) FROM note") == "1")
            assert await look_twice() == 1
        await manager.replicas[0].dispose()
    assert pids == [False]


async def test_the_position_is_lost(pair, caplog):
    """What is committed stays so; its client reads from the primary until that has told how far it is."""
    with Proxy("127.0.0.1", pair.primary.port) as proxy:
        manager = UnitOfWorkManager(pair.engine(pair.primary, port=proxy.port), replicas=[pair.engine(pair.replica)])
        async with manager.scope() as scope:
            family = manager.engine.dialect.name
            pair.replica.pause()
            trigger = proxy.on_client_bytes(POSITION[family], "cut")
            async with manager.begin() as unit:
                await unit.session.execute(text("INSERT INTO note (id) VALUES (1)"))
            assert (unit.status, trigger.fired) == (Status.COMMITTED, True)
            assert scope.position == "0-18446744073709551615"
            assert "begin() is committed, but the primary did not tell its position" in caplog.text
            assert await read() == (1, False)
            assert scope.position != "0-18446744073709551615"
            pair.replica.resume()
            await pair.caught_up()
            await until(lambda: _reads_at_replica(1))
        await manager.engine.dispose()


async def _reads_at_replica(expected):
    last, replica = await read()
    assert last == expected
    return replica


async def test_an_unknown_commit_is_not_read_past(pair):
    """The answer to COMMIT is lost: the client does not read from a replica that may not have it."""
    with Proxy("127.0.0.1", pair.primary.port) as proxy:
        manager = UnitOfWorkManager(pair.engine(pair.primary, port=proxy.port), replicas=[pair.engine(pair.replica)])
        pair.replica.pause()
        async with manager.scope():
            async with manager.begin():
                assert not await at_replica()  # connected: MariaDB's drivers say SET AUTOCOMMIT then
            proxy.on_client_bytes(b"commit", "cut", after_server=True)
            with pytest.raises(AmbiguousCommitError):
                await write(1)
            assert await read() == (1, False)
        await manager.engine.dispose()


@pytest.mark.parametrize("position", ["0-18446744073709551615", "0-18446744073709551614", "7-1.9-1"])
async def test_a_forged_position(pair, position):
    """It costs its sender no more than the bound, and nobody else anything."""
    manager = pair.manager(replica_wait=0.1)
    with manager.activate():
        assert await read() == (0, True)
    async with manager.scope(position=position) as scope:
        began = time.monotonic()
        await read()
        assert time.monotonic() - began < 3
        if position != "7-1.9-1" or manager.engine.dialect.name == "postgresql":
            assert scope.position != position
            # What the primary has written it may send a fifth of a second later: nobody waits for the end of a COMMIT.
            await until(lambda: _reads_at_replica(0))
    async with manager.scope(position=""):
        assert await read() == (0, True)


@pytest.mark.parametrize(
    "position",
    ["x", "0-", "-1", "0-1.", "00-1", "0-01", "0-1,0-2", "0-1.0-1", "2-1.1-1", "0-18446744073709551616", "4294967296-1",
     "0-1\n", "\u0660-\u0661", "0-1" * 10_000, ".".join(f"{number}-1" for number in range(9))],
    ids=range(15),
)  # fmt: skip
async def test_a_garbled_position(pair, position):
    """It counts as nothing."""
    manager = pair.manager()
    async with manager.scope(position=position) as scope:
        assert scope.position == ""


async def test_a_replica_comes_back_as_it_was_long_ago(pair):
    """What is known of it was told to connections that are dead: a new one asks again."""
    manager = pair.manager(replica_wait=0.01)
    pair.replica.pause()
    with manager.activate():
        assert await read() == (0, True)
        await write(1)
        manager._setup.replicas._replicas[0]._replayed = {0: 2**64 - 1}
        assert await read() == (0, True)  # as if it had been told so on this connection
        await manager.replicas[0].dispose()
        assert await read() == (1, False)


@pytest.mark.parametrize("connected", [False, True])
async def test_cancelled_while_it_waits_for_a_replica(pair, connected):
    """Nothing stays checked out, and the next one reads."""
    manager = pair.manager(replica_wait=30)
    with manager.activate():
        if connected:  # then the wait is for an answer alone
            assert await read() == (0, True)
        pair.replica.pause()
        await write(1)
        reading = asyncio.create_task(read())
        await until(manager.replicas[0].pool.checkedout)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        assert (manager.replicas[0].pool.checkedout(), manager.engine.pool.checkedout()) == (0, 0)
        pair.replica.resume()
        await pair.caught_up()
        assert await read() == (1, True)


@pytest.mark.drivers("asyncpg", "psycopg")
async def test_a_standby_does_not_tell_what_became_of_a_commit(pair):
    """C2: it may not have replayed it yet; it is asked again, until it or another one is the primary."""
    manager = UnitOfWorkManager(pair.engine(pair.primary), ambiguous_commit="verify")
    verification = manager._setup.verifier.verification()
    pair.replica.pause()
    async with manager.engine.begin() as connection:
        await connection.run_sync(verification.mark)
    async with pair.engine(pair.replica).connect() as standby, manager.engine.connect() as primary:
        assert await verification._ask_status(standby) == "again"
        assert await verification._ask_status(primary) == "committed"


async def test_a_deadline_bounds_the_wait(pair):
    """Half of what is left is waited at most."""
    manager = pair.manager(replica_wait=30)
    pair.replica.pause()
    with manager.activate():
        await write(1)
        async with manager.begin(read_only=True, timeout=1) as unit:
            assert await unit.session.scalar(text("SELECT max(id) FROM note")) == 1


async def test_nobody_waits_again_for_a_replica_that_lags(pair):
    """One read in half a second does, whoever's it is."""
    manager = pair.manager(replica_wait=1.0)
    pair.replica.pause()
    took = []
    for number in (1, 2):
        async with manager.scope(position=""):
            await write(number)
            began = time.monotonic()
            assert await read() == (number, False)
            took.append(time.monotonic() - began)
    assert took[0] > 0.9  # the last look is a pause before the end
    assert took[1] < 0.5


async def test_one_that_has_caught_up_is_found(pair, monkeypatch):
    """Nobody waits for it for a minute, but somebody looks: a hiccup does not send all reads to the primary."""
    monkeypatch.setattr(_replicas, "LAGGING_SECONDS", 60.0)
    manager = pair.manager()
    pair.replica.pause()
    with manager.activate():
        await write(1)
        assert await read() == (1, False)
        pair.replica.resume()
        await until(lambda: _reads_at_replica(1))


async def test_a_primary_is_no_replica(pair, caplog):
    """What was promoted, or never was one, is not read from."""
    manager = UnitOfWorkManager(pair.engine(pair.primary), replicas=[pair.engine(pair.primary)])
    with manager.activate():
        assert await read() == (0, False)
    assert "replica 1 is passed over for 1 s (it takes part in no replication)" in caplog.text
    assert manager.replicas[0].pool.checkedout() == 0


async def test_it_is_not_changed_within_a_unit(pair):
    """One unit is one session of one server, whatever its client writes meanwhile."""
    manager = pair.manager()
    pair.replica.pause()
    async with manager.scope(), manager.begin(read_only=True):
        assert await at_replica()
        async with manager.begin(propagation="requires_new") as unit:
            await unit.session.execute(text("INSERT INTO note (id) VALUES (1)"))
        assert await at_replica()
        assert await current_session().scalar(text("SELECT count(*) FROM note")) == 0


async def test_a_mistake_is_not_the_replicas(pair):
    """A statement that fails for itself does not pass the replica over."""
    manager = pair.manager()
    with manager.activate():
        with pytest.raises(ProgrammingError):
            async with manager.begin(read_only=True) as unit:
                await unit.session.execute(text("SELECT nonsense FROM nowhere"))
        assert await read() == (0, True)


async def test_the_primary_is_away_as_well(pair):
    """Whose position is not known cannot read anywhere then, and is told so."""
    with Proxy("127.0.0.1", pair.primary.port) as proxy:
        proxy.refuse()
        manager = UnitOfWorkManager(pair.engine(pair.primary, port=proxy.port), replicas=[pair.engine(pair.replica)])
        async with manager.scope(position="0-18446744073709551615"):
            with pytest.raises(ConflictError) as caught:
                await read()
        assert caught.value.reason == "not started"
        async with manager.scope(position=""):
            assert await read() == (0, True)


def test_a_position_in_too_many_streams():
    """A cookie stays small: then the primary is asked."""
    assert to_text(dict.fromkeys(range(9), 1)) == to_text(UNKNOWN)
