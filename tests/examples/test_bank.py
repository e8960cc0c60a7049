"""`python -m examples.bank`, run as a user runs it."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from websockets.sync.client import connect

from examples.bank.runner.run import main
from tests.kit.databases import SERVERS

CHECKOUT = Path(__file__).parents[2]
ONCE = ("--once", "--calls", "60", "--accounts", "4")
RULES = [True] * 5
CODES = {"postgresql": "40001", "mysql": "1213"}


@contextlib.contextmanager
def started(*options, folder=None, **streams):
    """Start the command; its temporary files go into `folder`."""
    environ = os.environ | ({"TMPDIR": str(folder)} if folder else {})
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | streams
    argv = [sys.executable, "-m", "examples.bank", *options]
    with subprocess.Popen(argv, cwd=CHECKOUT, env=environ, text=True, **streams) as process:  # ours
        try:
            yield process
        finally:
            process.kill()


def bank(*options, folder=None):
    """Run the command to its end and return (status, output, errors)."""
    with started(*options, folder=folder) as process:
        output, complaints = process.communicate(timeout=50)
    return process.returncode, output, complaints


def figures(output, label):
    """Return one line of the table: transfer, deposit, edit, set_duty."""
    (line,) = re.findall(rf"^ +{label} +(\d+) +(\d+) +(\d+) +(\d+) *$", output, re.MULTILINE)
    return [int(figure) for figure in line]


def rules(output):
    """Return whether each of the five rules holds."""
    return [word == "holds" for word in re.findall(r"^(holds|BROKEN) ", output, re.MULTILINE)]


def address(db):
    """Return the options for a test's database, in its own driver."""
    return ("--url", db.engine().url.render_as_string(hide_password=False))


async def tables(db):
    """Return the names of the example's tables that are still there."""
    catalog = (
        "SELECT name FROM sqlite_master"
        if db.family == "sqlite"
        else "SELECT table_name FROM information_schema.tables"
    )
    return [name for (name,) in await db.rows(catalog) if name.startswith("sqla_uow_bank")]


async def test_every_rule_holds(db):
    """The load over HTTP keeps every rule, each call is done or refused, and no table is left."""
    status, output, complaints = bank(*ONCE, *address(db))
    assert (status, complaints) == (0, "")
    assert rules(output) == RULES
    called, done, refused = (figures(output, label) for label in ("calls", "commits", "refused, 409"))
    assert sum(called) == 60
    assert called == [sum(pair) for pair in zip(done, refused, strict=True)]
    assert figures(output, "told that another was first, 412")[2] > 0  # edits did meet
    conflicts = figures(output, f"failed by conflict {CODES[db.family]}") if db.server else [0, 0, 0, 0]
    assert sum(conflicts) > 0 or db.server is None  # a server has conflicts, SQLite's writers queue
    assert await tables(db) == []


async def test_without_the_library_the_rules_break(db):
    """The positive control: the same calls to plain endpoints lose money and edits, without an error to anybody."""
    status, output, complaints = bank("--calls", "200", "--accounts", "4", "--without-library", *address(db))
    assert (status, complaints) == (0, "")
    assert (rules(output)[0], rules(output)[4]) == (False, False)
    assert "it broke, and no caller was told so." in output
    called, done, refused = (figures(output, label) for label in ("calls", "commits", "refused, 409"))
    assert called == [sum(pair) for pair in zip(done, refused, strict=True)]
    assert await tables(db) == []


@pytest.mark.drivers("sqlite")
def test_sqlite_is_the_default_and_leaves_no_file(driver, tmp_path):
    """Without options: a temporary file, removed at the end."""
    status, output, complaints = bank(*ONCE, folder=tmp_path)
    assert (status, complaints, rules(output)) == (0, "", RULES)
    assert output.startswith("SQLite: 60 calls through @transactional, 16 at once, on 4 accounts, over HTTP to http://")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.drivers("asyncpg", "asyncmy")
def test_database_starts_a_server_and_stops_it(driver):
    """One option brings a server of the example's own; nobody listens on its port afterwards."""
    reason = SERVERS[driver].unavailable()
    if reason is not None:
        pytest.skip(reason)
    status, output, complaints = bank(*ONCE, "--database", "postgresql" if driver == "asyncpg" else "mariadb")
    assert (status, complaints, rules(output)) == (0, "", RULES)
    assert not listening(output)


def listening(output):
    """Say whether somebody answers on the port that the first line names."""
    (port,) = re.findall(r"^\w+ on port (\d+) by \w+: ", output)
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", int(port))) == 0


@pytest.mark.drivers("sqlite", "asyncpg")
def test_ctrl_c_cuts_off_the_calls_and_reports(driver, tmp_path):
    """Ctrl-C in the middle: what was acknowledged is there, no traceback, no file, no server; status 130."""
    options, folder = ([], tmp_path) if driver == "sqlite" else (["--database", "postgresql"], None)
    with started("--calls", "1000000", *options, folder=folder) as process:
        head = process.stdout.readline()
        seen = process.stdout.readline()  # the load is under way
        process.send_signal(signal.SIGINT)
        rest, complaints = process.communicate(timeout=50)
    assert seen == "250 of 1000000 calls\n"
    assert (process.returncode, complaints, rules(rest)) == (130, "", RULES)
    assert "interrupted; the calls in flight were cut off" in rest
    assert sum(figures(rest, "cut off")) > 0
    assert "the bank is open" not in rest
    assert list(tmp_path.iterdir()) == []
    assert driver == "sqlite" or not listening(head)


@pytest.mark.drivers("sqlite")
def test_ctrl_c_again_leaves_nothing_behind(driver, tmp_path):
    """Whoever presses Ctrl-C while it is closing sees no traceback and leaves no file; the status stays 130."""
    with started("--calls", "1000000", folder=tmp_path) as process:
        for beginning in ("250 of 1000000 calls", "every rule holds"):  # the load; the server's end, which takes 0.1 s
            while not process.stdout.readline().startswith(beginning):
                pass
            process.send_signal(signal.SIGINT)
        _, complaints = process.communicate(timeout=50)
    assert (process.returncode, complaints) == (130, "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.drivers("sqlite")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_page_is_left_open_until_ctrl_c(driver, tmp_path, number):
    """After the load the page is served at the printed address; Ctrl-C ends that cleanly, though somebody listens."""
    with started("--calls", "20", folder=tmp_path) as process:
        lines = iter(process.stdout.readline, "")
        opened = next(line for line in lines if line.startswith("the bank is open at "))
        address = opened.split()[5]
        assert b"<title>The bank of sqla-uow</title>" in httpx.get(address, trust_env=False).content
        with connect(address.replace("http", "ws") + "feed", proxy=None) as feed:
            assert len(json.loads(feed.recv(timeout=10))["accounts"]) == 20
            process.send_signal(number)
            rest, complaints = process.communicate(timeout=20)
    assert (process.returncode, rest, complaints) == (0, "closed\n", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.drivers("sqlite")
def test_a_port_that_is_taken_gets_one_line(driver, tmp_path):
    """A port that somebody listens on is named, and nothing is left."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status, output, complaints = bank("--port", str(port), folder=tmp_path)
    assert (status, output) == (2, "")
    assert complaints == (
        f"python -m examples.bank: port {port} of 127.0.0.1 cannot be listened on (Address already in use); "
        "use another --port\n"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.drivers("sqlite")
@pytest.mark.parametrize("name", ["bank", "bank-conflict"])
def test_the_pictures_in_the_docs_are_small(driver, name):
    """A page loads quickly."""
    picture = CHECKOUT / f"docs/images/{name}.png"
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert picture.stat().st_size < 100_000


@pytest.mark.drivers("sqlite")
def test_a_terminal_gets_a_progress_bar(driver):
    """On a terminal the calls are counted in one line that moves."""
    ours, theirs = pty.openpty()
    with started(*ONCE, "--workers", "4", stdout=theirs) as process:
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # the end of a terminal
            while piece := os.read(ours, 1000):
                shown += piece
        assert process.wait(timeout=20) == 0
    os.close(ours)
    assert b"60/60" in shown


@pytest.mark.drivers("sqlite")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--calls", "-1"], "argument --calls: '-1' cannot be; use a whole number from 0 to 10000000"),
        (["--port", "99999"], "argument --port: '99999' cannot be; use a whole number from 0 to 65535"),
        (["--once", "--without-library"], "argument --without-library: not allowed with argument --once"),
        (["--workers", "many"], "argument --workers: 'many' cannot be; use a whole number from 1 to 1000"),
        (["--accounts", "1"], "argument --accounts: '1' cannot be; use a whole number from 2 to 10000"),
        (["--url", "nowhere"], "--url is no SQLAlchemy URL; write it as postgresql+asyncpg://user@host/database"),
        (
            ["--url", "sqlite:///x.db"],
            "driver 'sqlite' is not asynchronous; use sqlite+aiosqlite, postgresql+asyncpg or mysql+asyncmy",
        ),
        (
            ["--url", "sqlite+aiosqlite://"],
            "a SQLite database in memory is seen by one connection only, and not by the migrations; name a file",
        ),
        (
            ["--url", "sqlite+aiosqlite:////no/such/folder/x.db"],
            "folder '/no/such/folder' of the SQLite file is not there; make it first",
        ),
    ],
)
def test_nonsense_gets_one_line(driver, options, message, capsys):
    """An option that cannot be: one line with the remedy, status 2, nothing run."""
    assert called(*options) == 2
    assert capsys.readouterr() == ("", f"python -m examples.bank: {message}\n")


def called(*options):
    """Run the command in this process, which is quicker, and return its status."""
    try:
        return main([*options])
    except SystemExit as stop:
        return stop.code


@pytest.mark.drivers("asyncpg", "psycopg", "asyncmy", "aiomysql")
def test_a_server_that_is_down_gets_one_line_without_its_password(driver, capsys):
    """A server that does not answer is named by the error's class, without a word of the URL."""
    dialect = "postgresql" if driver in ("asyncpg", "psycopg") else "mysql"
    assert called("--url", f"{dialect}+{driver}://me:hush@127.0.0.1:1/x") == 2
    output, complaints = capsys.readouterr()
    assert output == ""
    assert re.fullmatch(
        r"python -m examples\.bank: your database cannot be used \(\w+( \d+)?\); "
        r"see that it runs and that its URL is right\n",
        complaints,
    )


@pytest.mark.drivers("sqlite")
async def test_tables_of_another_run_are_not_touched(db):
    """In a database of yours, tables that are there already are neither used nor dropped."""
    await db.run("CREATE TABLE sqla_uow_bank_entry (mine INTEGER)")
    status, _, complaints = bank(*ONCE, *address(db))
    assert status == 2
    assert complaints == (
        "python -m examples.bank: your database has tables of another run (sqla_uow_bank_entry); "
        "drop them, or wait until it is over\n"
    )
    assert await tables(db) == ["sqla_uow_bank_entry"]
