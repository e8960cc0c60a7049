"""The doctor: what it finds on real servers that are set up well and badly, and what it never says."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import urllib.parse

import pytest

from tests.databases import ONE_OF_EACH
from tests.servers.pgbouncer import PgBouncer

INTERRUPTED = 2
servers = pytest.mark.drivers("asyncpg", "psycopg", "asyncmy", "aiomysql")
TABLES = {
    "postgresql": "SELECT tablename FROM pg_tables WHERE tablename LIKE 'sqla!_uow!_doctor%' ESCAPE '!'",
    "mysql": "SELECT table_name FROM information_schema.tables WHERE table_name LIKE 'sqla!_uow!_doctor%' ESCAPE '!'",
    "sqlite": "SELECT name FROM sqlite_master WHERE name LIKE 'sqla!_uow!_doctor%' ESCAPE '!'",
}


def start(*arguments):
    """Start it, as on the command line."""
    argv = [sys.executable, "-m", "sqla_uow", "doctor", *arguments]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def doctor(*arguments):
    """Run it; return its exit status and what it found, by name."""
    process = start(*arguments, "--json")
    output, errors = process.communicate(timeout=50)
    assert errors == ""
    return process.returncode, {one["name"]: one for one in json.loads(output)}


LEVELS = {
    "postgresql": {
        "READ COMMITTED": "lost update and write skew possible",
        "REPEATABLE READ": "write skew possible",
        "SERIALIZABLE": "no lost update, no write skew",
    },
    "mysql": {
        "READ UNCOMMITTED": "lost update and write skew possible",
        "READ COMMITTED": "lost update and write skew possible",
        "REPEATABLE READ": "lost update and write skew possible",
        "SERIALIZABLE": "no lost update, no write skew",
    },
    "sqlite": {"SERIALIZABLE": "no lost update, no write skew"},
}


async def test_levels_are_tried(db):
    """What each prevents, as the published table has it; the table that was made for it is gone."""
    _status, found = doctor(db.url)
    assert {name: one["value"] for name, one in found.items() if name in LEVELS["mysql"]} == LEVELS[db.family]
    assert found["ambiguous_commit='verify'"]["value"].startswith("works")
    assert await db.rows(TABLES[db.family]) == []


@pytest.mark.drivers("asyncpg", "psycopg")
async def test_a_server_that_is_set_up_well(db):
    """Exit status 0, and nothing to say."""
    status, found = doctor(db.url)
    assert (status, [one["name"] for one in found.values() if one["level"] != "fine"]) == (0, [])
    assert found["pooler"]["value"] == "none seen"


@pytest.mark.drivers("asyncpg", "psycopg")
async def test_settings_that_harm(db):
    """Those of the role count: a timeout, asynchronous commits, too few connections."""
    await db.run(
        "DROP ROLE IF EXISTS patient",
        "CREATE ROLE patient LOGIN CONNECTION LIMIT 20",
        "ALTER ROLE patient SET statement_timeout = '7s'",
        "ALTER ROLE patient SET synchronous_commit = 'off'",
        "ALTER ROLE patient SET default_transaction_isolation = 'serializable'",
    )
    try:
        url = db.url.replace("postgres:secret@", "patient:secret@")
        status, found = doctor(url, "--read-only", "--pool-size", "7", "--processes", "3")
    finally:
        await db.run("DROP ROLE patient")
    assert status == 1
    assert found["statement_timeout"]["value"] == "7000 ms"
    assert found["synchronous_commit"]["level"] == "warning"
    assert found["default_transaction_isolation"]["value"] == "SERIALIZABLE"
    assert found["connections"]["value"] == "20 allowed, 21 wanted"
    assert found["connections"]["level"] == "warning"
    assert found["isolation levels"]["value"] == "not tried: --read-only"


@pytest.mark.drivers("asyncmy", "aiomysql")
async def test_snapshot_isolation_of_mariadb(db):
    """Without it updates get lost, which is a warning; a session that has it is told otherwise."""
    status, found = doctor(db.url)
    assert (status, found["innodb_snapshot_isolation"]["level"]) == (1, "warning")
    with_it = f"{db.url}?init_command={urllib.parse.quote('SET innodb_snapshot_isolation = ON')}"
    _status, found = doctor(with_it)
    assert (found["innodb_snapshot_isolation"]["value"], found["innodb_snapshot_isolation"]["level"]) == ("ON", "fine")
    assert found["REPEATABLE READ"]["value"] == "write skew possible"


@pytest.mark.drivers("sqlite")
async def test_a_file_of_sqlite(db):
    """The journal is named, as readers and writers wait for each other without WAL."""
    status, found = doctor(db.url)
    assert (status, found["journal_mode"]["value"], found["journal_mode"]["level"]) == (0, "delete", "note")
    await db.run("PRAGMA journal_mode = WAL")
    assert doctor(db.url)[1]["journal_mode"]["level"] == "fine"


@pytest.mark.drivers("asyncpg", "psycopg")
async def test_a_pooler_is_noticed(db):
    """By its transactions, which are given to one session of the server and then to another."""
    if (reason := PgBouncer.unavailable()) is not None:
        pytest.skip(reason)
    with PgBouncer(db.server) as pooler:
        _status, found = doctor(pooler.url(db.driver))
        assert (found["pooler"]["value"], found["pooler"]["level"]) == ("in transaction mode", "note")
        assert found["SERIALIZABLE"]["value"] == "no lost update, no write skew"


@servers
async def test_what_is_no_replica(db):
    """A primary as a replica, and one that does not answer, are warnings."""
    nowhere = db.server.url(db.driver, port=1, database=db.name)
    status, found = doctor(db.url, "--read-only", "--replica", db.url, "--replica", nowhere)
    assert status == 1
    assert (found["replica 1"]["level"], found["replica 1"]["value"]) == ("warning", "not usable")
    assert (found["replica 2"]["level"], "does not let us in" in found["replica 2"]["value"]) == ("warning", True)


@pytest.mark.drivers(*ONE_OF_EACH)
async def test_what_cannot_be_examined(db):
    """Exit status 2, one line, and never a password."""
    synchronous = {
        "postgresql": "postgresql://me:geheim@h/x",
        "mysql": "mysql://me:geheim@h/x",
        "sqlite": "sqlite:///x",
    }
    cases = {
        "geheim": "this is no database URL; use one as postgresql+asyncpg://me@host/bank",
        "postgresql+asyncpg://me:geheim@127.0.0.1:1/x": (
            "postgresql+asyncpg at 127.0.0.1:1 does not let us in: ConnectionRefusedError"
        ),
        "oracle://me:geheim@h/x": "sqla_uow does not know the database 'oracle'; use postgresql, mysql, mariadb, sqlite",
        synchronous[db.family]: None,
    }
    for url, message in cases.items():
        if db.family != "postgresql" and "asyncpg" in url:
            continue
        process = start(url)
        output, errors = process.communicate(timeout=30)
        assert (process.returncode, output) == (2, "")
        assert errors.startswith("sqla_uow doctor: ")
        assert "geheim" not in errors
        assert len(errors.splitlines()) == 1
        assert message is None or errors == f"sqla_uow doctor: {message}\n"


@servers
async def test_a_wrong_password(db):
    """Its code is said, and nothing of the message."""
    wrong = db.url.replace(":secret@", ":geheim@")
    if db.family == "postgresql":  # which lets everybody in, here
        wrong = db.url.replace("postgres:secret@", "nobody:geheim@")
    process = start(wrong)
    output, errors = process.communicate(timeout=30)
    assert (process.returncode, output) == (2, "")
    assert "does not let us in" in errors
    assert "geheim" not in errors


async def test_it_is_interrupted(db):
    """Ctrl-C while it tries: its table is gone all the same."""
    for _ in range(5):  # it may have ended before the signal came
        process = start(db.url)
        while not await db.rows(TABLES[db.family]) and process.poll() is None:
            pass
        process.send_signal(signal.SIGINT)
        _output, errors = process.communicate(timeout=30)
        assert await db.rows(TABLES[db.family]) == []
        if process.returncode == INTERRUPTED:
            break
    assert (process.returncode, errors) == (INTERRUPTED, "sqla_uow doctor: interrupted; nothing is left behind\n")


@pytest.mark.drivers("sqlite")
async def test_for_people(db):
    """A line for each finding, its advice indented below."""
    process = start(db.url)
    output, _errors = process.communicate(timeout=30)
    assert "journal_mode               delete  [note]\n" in output
    assert "SERIALIZABLE               no lost update, no write skew\n" in output
