"""The proxy loses, holds and counts what it is told to."""

import asyncio
import contextlib
import socket
import socketserver
import threading
import time

import pytest
from sqlalchemy import make_url, text
from sqlalchemy.exc import DBAPIError

from tests.kit.waiting import eventually, until
from tests.servers import MariaDB, PostgreSQL, Proxy
from tests.servers.machine import free_port

DIRECTIONS = ["to_server", "to_client"]
on_servers = pytest.mark.drivers(*PostgreSQL.drivers, *MariaDB.drivers)


# ---- before a server that is plain to see


class Echo(socketserver.ThreadingTCPServer):
    """Send back what comes, and keep it."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), None)
        self.received = b""
        self.errors = []

    def finish_request(self, request, _address):
        try:
            while data := request.recv(65536):
                self.received += data
                request.sendall(data)
        except OSError as error:
            self.errors.append(type(error))


@pytest.fixture
def echo():
    """Run a server for one test."""
    with Echo() as server:
        thread = threading.Thread(target=server.serve_forever, args=[0.01])
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def proxy(echo):
    """Stand before it."""
    with Proxy(*echo.server_address) as proxy:
        yield proxy


@pytest.fixture
def client(proxy):
    """Connect through the proxy, once the server has answered."""
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=5) as client:
        exchange(client, b"hello")
        proxy.reset_counts()
        yield client


def exchange(client, data):
    """Send, and wait until all of it has come back."""
    client.sendall(data)
    assert receive(client, len(data)) == data


def receive(client, size):
    """Return that many bytes, fewer if the connection ends."""
    data = b""
    while len(data) < size and (more := client.recv(size - len(data))):
        data += more
    return data


def is_silent(client, seconds=0.1):
    """Tell whether nothing comes for a while; True where a proxy that keeps nothing back would have sent something."""
    client.settimeout(seconds)
    try:
        return client.recv(1) == b"never"
    except TimeoutError:
        return True
    finally:
        client.settimeout(5)


# ---- counting


def test_flights_and_round_trips(proxy, client, echo):
    """Pieces sent with no answer between are one flight; one answered flight is one round trip."""
    exchange(client, b"one")
    proxy.hold("to_server")
    client.sendall(b"tw")
    assert eventually(lambda: proxy.flights == [b"one", b"tw"])
    client.sendall(b"o")
    assert eventually(lambda: proxy.flights == [b"one", b"two"])
    assert proxy.round_trips == 1
    proxy.release("to_server")
    assert receive(client, 3) == b"two"
    assert proxy.round_trips == 2
    assert echo.received == b"helloonetwo"


def test_reset_forgets_what_is_under_way(proxy, client):
    """The answer to a flight from before the reset is not counted after it."""
    proxy.hold("to_server")
    client.sendall(b"old")
    assert eventually(lambda: proxy.flights == [b"old"])
    proxy.reset_counts()
    proxy.release("to_server")
    assert receive(client, 3) == b"old"
    assert (proxy.round_trips, proxy.flights) == (0, [])
    exchange(client, b"new")
    assert (proxy.round_trips, proxy.flights) == (1, [b"new"])


def test_record_is_bounded(proxy, client):
    """1000 flights are kept, and 64 KiB of each; all are counted, and nothing is cut short on the way."""
    with ThreadedReader(client, 200_000) as reader:
        client.sendall(bytes(200_000))
    assert reader.size == 200_000
    assert len(proxy.flights[0]) == 65_536
    proxy.reset_counts()
    for number in range(1001):
        exchange(client, b"%04d" % number)
    assert (proxy.round_trips, len(proxy.flights), proxy.flights[0]) == (1001, 1000, b"0001")


class ThreadedReader(threading.Thread):
    """Read while the test writes, so that neither fills the other's buffers."""

    def __init__(self, client, size):
        super().__init__()
        self.client, self.size = client, size

    def run(self):
        self.size = len(receive(self.client, self.size))

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.join()


@on_servers
async def test_statements_of_a_driver(db):
    """A warm statement is one round trip on every driver, a COMMIT one more, and the flight shows it."""
    with Proxy("127.0.0.1", db.server.port) as proxy:
        engine = db.engine(port=proxy.port)
        async with engine.connect() as connection:
            await connection.execute(text("SELECT 1"))
            proxy.reset_counts()
            for _ in range(3):
                await connection.execute(text("SELECT 1"))
            assert proxy.round_trips == 3
            await connection.commit()
            assert proxy.round_trips == 4
            assert b"COMMIT" in proxy.flights[-1]
        await engine.dispose()  # before the proxy closes: aiomysql warns of a connection that it cannot say goodbye on


# ---- disturbing


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_delay(proxy, client, direction):
    """Bytes wait, those behind them do not overtake, and the end of the delay counts for what comes then."""
    proxy.delay(direction, 0.2)
    before = time.monotonic()
    client.sendall(b"slow")
    assert eventually(lambda: proxy.round_trips == 1 if direction == "to_client" else proxy.flights)
    proxy.delay(direction, 0)
    client.sendall(b"fast")
    assert receive(client, 8) == b"slowfast"
    assert time.monotonic() - before >= 0.2
    before = time.monotonic()
    exchange(client, b"now")
    assert time.monotonic() - before < 0.2


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_hold_and_release(proxy, client, echo, direction):
    """Held bytes are kept on their side of the proxy and come in order when released."""
    proxy.hold(direction)
    client.sendall(b"held")
    assert is_silent(client)
    assert echo.received == (b"hello" if direction == "to_server" else b"helloheld")
    client.sendall(b"more")
    proxy.release(direction)
    assert receive(client, 8) == b"heldmore"


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_drop(proxy, client, echo, direction):
    """Swallowed bytes never come, not after forward_all() either, but later ones do."""
    proxy.drop(direction)
    client.sendall(b"lost")
    assert is_silent(client)
    assert echo.received == (b"hello" if direction == "to_server" else b"hellolost")
    proxy.forward_all()
    exchange(client, b"found")


def test_cut(proxy, client, echo):
    """Both ends see a reset, not an orderly end; new connections are welcome."""
    proxy.cut()
    with pytest.raises(ConnectionResetError):
        client.recv(1)
    assert eventually(lambda: echo.errors == [ConnectionResetError])
    assert eventually(lambda: proxy.connections == 0)
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=5) as again:
        exchange(again, b"again")
        assert proxy.connections == 1


def test_cut_before_the_server_accepts():
    """A connection that was cut while the server was slow is reset when the server comes round to it."""
    with (
        socket.create_server(("127.0.0.1", 0), backlog=0) as server,
        socket.create_connection(server.getsockname()),  # all that fits into the queue; the next waits for 1 s
        Proxy(*server.getsockname()) as proxy,
        socket.create_connection(("127.0.0.1", proxy.port), timeout=5) as client,
    ):
        server.settimeout(10)
        assert eventually(lambda: proxy.connections == 1)
        proxy.cut()
        with pytest.raises(ConnectionResetError):
            client.recv(1)
        server.accept()[0].close()
        late, _address = server.accept()
        with late, pytest.raises(ConnectionResetError):
            late.recv(1)


def test_refuse_and_accept(proxy, client):
    """New connections are refused while the open one stays; then the port is the same."""
    proxy.refuse()
    proxy.refuse()  # twice is once
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", proxy.port))
    exchange(client, b"still here")
    proxy.accept()
    proxy.accept()
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=5) as again:
        exchange(again, b"again")


def test_orderly_ends_pass(proxy, client):
    """The end of a connection at one side is the end at the other, behind what is held."""
    proxy.hold("to_server")
    client.sendall(b"bye")
    client.close()
    assert eventually(lambda: proxy.flights == [b"bye"])
    assert proxy.connections == 1
    proxy.release("to_server")
    assert eventually(lambda: proxy.connections == 0)


def test_server_that_is_down():
    """Where the server refuses, the client is accepted and reset; the reset may be faster than the client's connect()."""
    with (
        Proxy("127.0.0.1", free_port()) as proxy,
        pytest.raises(ConnectionResetError),
        socket.create_connection(("127.0.0.1", proxy.port), timeout=5) as client,
    ):
        client.recv(1)


def test_forward_all(proxy, client):
    """Everything is undone at once."""
    trigger = proxy.on_client_bytes(b"commit", "cut")
    proxy.hold("to_client")
    proxy.delay("to_server", 60)
    proxy.refuse()
    client.sendall(b"commit one")
    assert eventually(lambda: trigger.fired)
    proxy.forward_all()
    trigger = proxy.on_client_bytes(b"commit", "cut")
    proxy.forward_all()
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=5) as again:
        exchange(again, b"commit two")
    assert not trigger.fired


def test_forward_all_delivers(proxy, client):
    """What was held by a rule, by a trigger or by a delay arrives, in order."""
    proxy.delay("to_client", 60)
    proxy.on_client_bytes(b"commit", "hold")
    client.sendall(b"one ")
    assert eventually(lambda: proxy.round_trips == 1)
    client.sendall(b"commit two")
    assert is_silent(client)
    proxy.forward_all()
    assert receive(client, 14) == b"one commit two"


def test_closed_proxy(echo):
    """Outside its block a proxy listens to nobody and says so."""
    with Proxy(*echo.server_address) as proxy:
        pass
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", proxy.port))
    with pytest.raises(RuntimeError) as caught:
        proxy.cut()
    assert str(caught.value) == f"proxy on port {proxy.port} is not open; use it as a context manager"


# ---- triggers on plain bytes


def test_needle_in_two_pieces(proxy, client, echo):
    """A needle whose first half has passed already still fires, and the server never has the second."""
    trigger = proxy.on_client_bytes(b"COMMIT", "cut")
    exchange(client, b"comm")
    client.sendall(b"it")
    with pytest.raises(ConnectionResetError):
        client.recv(1)
    assert trigger.wait()
    assert echo.received == b"hellocomm"


def test_each_match_fires_one_trigger(proxy, client):
    """Two triggers on the same bytes need them twice; bytes that have passed do not match again."""
    called = []
    first = proxy.on_client_bytes(b"commit", lambda: called.append(1))
    second = proxy.on_client_bytes(b"commit", lambda: called.append(2))
    exchange(client, b"commit")
    assert first.wait()
    exchange(client, b";")
    assert called == [1]
    exchange(client, b"COMMIT")
    assert second.wait()
    exchange(client, b"commit")
    assert called == [1, 2]


def test_only_the_connection_of_the_match(proxy, client):
    """Another connection goes on while the first is held and cut."""
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=5) as other:
        held = proxy.on_client_bytes(b"commit", "hold")
        client.sendall(b"commit")
        assert held.wait()
        exchange(other, b"free")
        assert is_silent(client)
        held.release()
        assert receive(client, 6) == b"commit"
        proxy.on_client_bytes(b"commit", "cut")
        client.sendall(b"commit")
        with pytest.raises(ConnectionResetError):
            client.recv(1)
        exchange(other, b"still free")


def test_callable_may_use_the_proxy(proxy, client):
    """A callable runs in the proxy's thread, where the proxy's methods do not wait for themselves."""
    trigger = proxy.on_client_bytes(b"commit", lambda: proxy.drop("to_client"))
    client.sendall(b"commit")
    assert trigger.wait()
    assert is_silent(client)


def test_callable_that_raises(proxy, client):
    """The error is the test's to see; the connection is cut, lest it pass for a success."""

    def fail():
        raise ZeroDivisionError

    trigger = proxy.on_client_bytes(b"commit", fail)
    client.sendall(b"commit")
    with pytest.raises(ZeroDivisionError):
        trigger.wait()
    with pytest.raises(ConnectionResetError):
        client.recv(1)


def test_misused_triggers(proxy):
    """An empty needle and a release of nothing say what is the matter."""
    with pytest.raises(ValueError, match=r"^the needle b'' is in everything; name the bytes to wait for$"):
        proxy.on_client_bytes(b"", "cut")
    trigger = proxy.on_client_bytes(b"COMMIT", "hold", after_server=True)
    assert trigger.wait(0.01) is False
    with pytest.raises(RuntimeError) as caught:
        trigger.release()
    assert str(caught.value) == (
        "<Trigger on b'commit': 'hold', after_server=True, fired=False> holds nothing; "
        "wait() for one whose action is 'hold' before release()"
    )


# ---- triggers on a real COMMIT


@pytest.fixture
async def inserting(db):
    """Give (proxy, insert, rows): a coroutine function that commits one row through the proxy, and what is committed."""
    await db.run("CREATE TABLE t (x INT)")

    async def rows():
        return await db.scalar("SELECT count(*) FROM t")

    with Proxy("127.0.0.1", db.server.port) as proxy:
        engine = db.engine(port=proxy.port)

        async def insert():
            async with engine.begin() as connection:
                await connection.execute(text("INSERT INTO t VALUES (1)"))

        await insert()
        assert await rows() == 1
        yield proxy, insert, rows
        await engine.dispose()


async def sessions_end(db):
    """Wait until the server has noticed that everybody has left, so that what is not committed never will be."""

    async def ended():
        return not await db.sessions()

    await until(ended, seconds=5)


@on_servers
async def test_commit_lost_before_the_server_applied_it(db, inserting):
    """Cut before: the client has an error, the row is not there and never will be."""
    proxy, insert, rows = inserting
    lost = proxy.on_client_bytes(b"COMMIT", "cut")
    with pytest.raises(DBAPIError):
        await insert()
    assert lost.fired
    await sessions_end(db)
    assert await rows() == 1


@on_servers
async def test_commit_lost_after_the_server_applied_it(db, inserting):
    """Cut after: the client has the same error, and the row is there."""
    proxy, insert, rows = inserting
    lost = proxy.on_client_bytes(b"COMMIT", "cut", after_server=True)
    with pytest.raises(DBAPIError):
        await insert()
    assert lost.fired
    assert await rows() == 2
    await insert()
    assert await rows() == 3


@on_servers
async def test_answer_to_commit_held(inserting):
    """Hold after: the row is there while the client still waits."""
    proxy, insert, rows = inserting
    held = proxy.on_client_bytes(b"COMMIT", "hold", after_server=True)
    inserted = asyncio.create_task(insert())
    assert await asyncio.to_thread(held.wait)
    assert await rows() == 2
    assert not inserted.done()
    held.release()
    await inserted


@on_servers
async def test_commit_held(inserting):
    """Hold before: the row is not there until the release."""
    proxy, insert, rows = inserting
    held = proxy.on_client_bytes(b"COMMIT", "hold")
    inserted = asyncio.create_task(insert())
    assert await asyncio.to_thread(held.wait)
    assert await rows() == 1
    assert not inserted.done()
    held.release()
    await inserted
    assert await rows() == 2


@on_servers
async def test_call_before_commit(db, inserting):
    """A callable kills the backend just before it is told to commit: nothing is committed."""
    proxy, insert, rows = inserting

    sessions = await db.sessions()
    kill = "SELECT pg_terminate_backend({})" if db.family == "postgresql" else "KILL {}"
    trigger = proxy.on_client_bytes(b"COMMIT", lambda: db.server.execute(kill.format(sessions[0][0])))
    with pytest.raises(DBAPIError):
        await insert()
    assert trigger.wait()
    await sessions_end(db)
    assert await rows() == 1


@on_servers
async def test_call_after_commit(db, inserting):
    """A callable sees the row before the client knows of it."""
    proxy, insert, _rows = inserting
    seen = []
    database = make_url(db.url).database

    def look():
        seen.append(db.server.execute("SELECT count(*) FROM t", database=database))

    trigger = proxy.on_client_bytes(b"COMMIT", look, after_server=True)
    await insert()
    assert trigger.fired
    assert seen == ["2"]


@on_servers
async def test_server_killed_at_commit(db, inserting):
    """The whole server dies at the COMMIT; after its restart the proxy leads to it again."""
    proxy, insert, rows = inserting
    trigger = proxy.on_client_bytes(b"COMMIT", db.server.kill)
    with pytest.raises(DBAPIError):
        await insert()
    assert trigger.wait(20)
    db.server.restart()
    with contextlib.suppress(DBAPIError):  # a connection of the pool from before
        await insert()
        await insert()
    assert await rows() > 1
