"""`python -m examples.bank`, run as a user runs it."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from examples.bank.run import main
from tests.databases import SERVERS

CHECKOUT = Path(__file__).parents[2]
SMALL = ("--calls", "120", "--accounts", "4")
CODES = {"postgresql": "40001", "mysql": "1213"}


@contextlib.contextmanager
def started(*options, folder=None, **streams):
    """Start the command; its temporary files go into `folder`."""
    environ = os.environ | ({"TMPDIR": str(folder)} if folder else {})
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | streams
    argv = [sys.executable, "-m", "examples.bank", *options]
    with subprocess.Popen(argv, cwd=CHECKOUT, env=environ, text=True, **streams) as process:  # noqa: S603  # ours
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
    """Return one line of the table: transfer, deposit, swap_on_call."""
    (line,) = re.findall(rf"^ +{label} +(\d+) +(\d+) +(\d+) *$", output, re.MULTILINE)
    return [int(figure) for figure in line]


def rules(output):
    """Return whether each of the three rules holds."""
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
    """The load keeps every rule, commits every call, counts what failed by code, and leaves no table."""
    status, output, complaints = bank(*SMALL, *address(db))
    assert (status, complaints) == (0, "")
    assert rules(output) == [True, True, True]
    assert figures(output, "calls") == figures(output, "commits")
    assert sum(figures(output, "calls")) == 120
    conflicts = figures(output, f"failed by conflict {CODES[db.family]}") if db.server else [0, 0, 0]
    assert sum(conflicts) > 0 or db.server is None  # a server has conflicts, SQLite's writers queue
    assert figures(output, "attempts") == [sum(pair) for pair in zip(figures(output, "calls"), conflicts, strict=True)]
    assert await tables(db) == []


async def test_without_the_library_the_rules_break(db):
    """The positive control: the same calls in plain transactions lose money, without an error to anybody."""
    status, output, complaints = bank("--calls", "300", "--accounts", "4", "--without-library", *address(db))
    assert (status, complaints) == (0, "")
    assert rules(output)[0] is False
    assert "it broke, and no call was told so." in output
    assert figures(output, "calls") == figures(output, "commits")


@pytest.mark.drivers("sqlite")
def test_sqlite_is_the_default_and_leaves_no_file(driver, tmp_path):
    """Without options: a temporary file, removed at the end."""
    status, output, complaints = bank(*SMALL, folder=tmp_path)
    assert (status, complaints, rules(output)) == (0, "", [True, True, True])
    assert output.startswith("SQLite: 120 calls through @transactional, 16 at once, on 4 accounts\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.drivers("asyncpg", "asyncmy")
def test_database_starts_a_server_and_stops_it(driver):
    """One option brings a server of the example's own; nobody listens on its port afterwards."""
    reason = SERVERS[driver].unavailable()
    if reason is not None:
        pytest.skip(reason)
    status, output, complaints = bank(*SMALL, "--database", "postgresql" if driver == "asyncpg" else "mariadb")
    assert (status, complaints, rules(output)) == (0, "", [True, True, True])
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
    assert (process.returncode, complaints, rules(rest)) == (130, "", [True, True, True])
    assert "interrupted; the calls in flight were cancelled" in rest
    assert sum(figures(rest, "cut off")) > 0
    assert list(tmp_path.iterdir()) == []
    assert driver == "sqlite" or not listening(head)


@pytest.mark.drivers("sqlite")
def test_a_terminal_gets_a_progress_bar(driver):
    """On a terminal the calls are counted in one line that moves."""
    ours, theirs = pty.openpty()
    with started(*SMALL, "--workers", "4", stdout=theirs) as process:
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # the end of a terminal
            while piece := os.read(ours, 1000):
                shown += piece
        assert process.wait(timeout=20) == 0
    os.close(ours)
    assert b"120/120" in shown


@pytest.mark.drivers("sqlite")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--calls", "0"], "argument --calls: '0' cannot be; use a whole number from 1 to 10000000"),
        (["--workers", "many"], "argument --workers: 'many' cannot be; use a whole number from 1 to 1000"),
        (["--accounts", "1"], "argument --accounts: '1' cannot be; use a whole number from 2 to 10000"),
        (["--url", "nowhere"], "--url is no SQLAlchemy URL; write it as postgresql+asyncpg://user@host/database"),
        (
            ["--url", "sqlite:///x.db"],
            "driver 'sqlite' is not asynchronous; use sqlite+aiosqlite, postgresql+asyncpg or mysql+asyncmy",
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
    await db.run("CREATE TABLE sqla_uow_bank_gap (mine INTEGER)")
    status, _, complaints = bank(*SMALL, *address(db))
    assert status == 2
    assert complaints == (
        "python -m examples.bank: your database has tables of another run (sqla_uow_bank_gap); "
        "drop them, or wait until it is over\n"
    )
    assert await tables(db) == ["sqla_uow_bank_gap"]
