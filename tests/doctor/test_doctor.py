"""The doctor: what it finds on real servers that are set up well and badly, and what it never says."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import urllib.parse

import pytest
from sqlalchemy import make_url

from sqla_uow import UnitOfWorkManager, __main__
from sqla_uow.__main__ import main
from sqla_uow._doctor import mariadb as _doctor_mariadb
from sqla_uow._doctor.subject import Subject
from sqla_uow._doctor.trials import Trial
from sqla_uow._doctor.url import place_of
from tests.kit.databases import ONE_OF_EACH
from tests.kit.waiting import until
from tests.servers import Proxy
from tests.servers.pgbouncer import PgBouncer

INTERRUPTED = 2
servers = pytest.mark.drivers("asyncpg", "psycopg", "asyncmy", "aiomysql")
TABLES = {
    "postgresql": "SELECT tablename FROM pg_tables WHERE tablename LIKE 'sqla!_uow!_doctor%' ESCAPE '!'",
    "mysql": "SELECT table_name FROM information_schema.tables WHERE table_name LIKE 'sqla!_uow!_doctor%' ESCAPE '!'",
    "sqlite": "SELECT name FROM sqlite_master WHERE name LIKE 'sqla!_uow!_doctor%' ESCAPE '!'",
}


# The signal is a real one; from outside it would come too late, as often as not.
INTERRUPTS_ITSELF = """
import signal, sys
from sqlalchemy import Engine, event
from sqla_uow.__main__ import main

# What a shell runs in the background ignores it, and so does all that is started from there, these tests too.
signal.signal(signal.SIGINT, signal.default_int_handler)

@event.listens_for(Engine, "before_cursor_execute")
def interrupt(connection, cursor, statement, *rest):
    if "UPDATE sqla_uow_doctor" in statement:
        print("its table is there")
        signal.raise_signal(signal.SIGINT)

sys.exit(main())
"""


@pytest.fixture
def say(capsys):
    """Run it in a thread, as it has a loop of its own; return its exit status, what it says, and what is wrong."""

    async def say(*arguments):
        status = await asyncio.to_thread(main, ["doctor", *arguments])
        return status, *capsys.readouterr()

    return say


@pytest.fixture
def doctor(say):
    """Run it; return its exit status and what it found, by name."""

    async def doctor(*arguments):
        status, output, errors = await say(*arguments, "--json")
        assert errors == ""
        return status, {one["name"]: one for one in json.loads(output)}

    return doctor


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


async def test_levels_are_tried(db, doctor):
    """What each prevents, as the published table has it; the table that was made for it is gone."""
    _status, found = await doctor(db.url)
    assert {name: one["value"] for name, one in found.items() if name in LEVELS["mysql"]} == LEVELS[db.family]
    assert found["ambiguous_commit='verify'"]["value"].startswith("works")
    assert await db.rows(TABLES[db.family]) == []


@pytest.mark.drivers("asyncpg", "psycopg")
async def test_a_server_that_is_set_up_well(db, doctor):
    """Exit status 0, and nothing to say."""
    status, found = await doctor(db.url)
    assert (status, [one["name"] for one in found.values() if one["level"] != "fine"]) == (0, [])
    assert found["pooler"]["value"] == "none seen"


@pytest.mark.drivers("asyncpg", "psycopg")
async def test_a_server_behind_another_port(db, doctor):
    """A pooler in session mode, a tunnel, a balancer: nobody can tell, so it is only noted."""
    with Proxy("127.0.0.1", db.server.port) as proxy:
        _status, found = await doctor(db.server.url(db.driver, port=proxy.port, database=db.name), "--read-only")
    assert (found["pooler"]["level"], found["pooler"]["value"]) == (
        "note", "perhaps: the server listens on another port",
    )  # fmt: skip


@pytest.mark.drivers("asyncpg", "psycopg")
async def test_settings_that_harm(db, doctor):
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
        status, found = await doctor(url, "--read-only", "--pool-size", "7", "--processes", "3")
        _status, refused = await doctor(url)
    finally:
        await db.run("DROP ROLE patient")
    assert status == 1
    assert found["statement_timeout"]["value"] == "7000 ms"
    assert found["synchronous_commit"]["level"] == "warning"
    assert found["default_transaction_isolation"]["value"] == "SERIALIZABLE"
    assert found["connections"]["value"] == "20 allowed, 21 wanted"
    assert found["connections"]["level"] == "warning"
    assert found["isolation levels"]["value"] == "not tried: --read-only"
    assert refused["try levels"]["value"].startswith("could not be looked at: ")
    assert refused["try levels"]["value"].endswith((" 42501", " 3F000"))  # it may not make a table
    assert await db.rows(TABLES["postgresql"]) == []


@pytest.mark.drivers("asyncmy", "aiomysql")
async def test_snapshot_isolation_of_mariadb(db, doctor):
    """Without it updates get lost, which is a warning; a session that has it is told otherwise."""
    status, found = await doctor(db.url)
    assert (status, found["innodb_snapshot_isolation"]["level"]) == (1, "warning")
    with_it = f"{db.url}?init_command={urllib.parse.quote('SET innodb_snapshot_isolation = ON')}"
    _status, found = await doctor(with_it)
    assert (found["innodb_snapshot_isolation"]["value"], found["innodb_snapshot_isolation"]["level"]) == ("ON", "fine")
    assert found["REPEATABLE READ"]["value"] == "write skew possible"


@pytest.mark.drivers("sqlite")
async def test_a_file_of_sqlite(db, doctor):
    """The journal is named, as readers and writers wait for each other without WAL."""
    status, found = await doctor(db.url)
    assert (status, found["journal_mode"]["value"], found["journal_mode"]["level"]) == (0, "delete", "note")
    await db.run("PRAGMA journal_mode = WAL")
    assert (await doctor(db.url))[1]["journal_mode"]["level"] == "fine"


@pytest.mark.drivers("asyncpg", "psycopg")
async def test_a_pooler_is_noticed(db, doctor):
    """By its transactions, which are given to one session of the server and then to another."""
    if (reason := PgBouncer.unavailable()) is not None:
        pytest.skip(reason)
    with PgBouncer(db.server) as pooler:
        _status, found = await doctor(pooler.url(db.driver))
        assert (found["pooler"]["value"], found["pooler"]["level"]) == ("in transaction mode", "note")
        assert found["SERIALIZABLE"]["value"] == "no lost update, no write skew"


@servers
async def test_what_is_no_replica(db, doctor):
    """A primary as a replica, and one that does not answer, are warnings."""
    nowhere = db.server.url(db.driver, port=1, database=db.name)
    status, found = await doctor(db.url, "--read-only", "--replica", db.url, "--replica", nowhere)
    assert status == 1
    assert not set(LEVELS["mysql"]) & set(found)  # --read-only
    assert (found["replica 1"]["level"], found["replica 1"]["value"]) == ("warning", "not usable")
    assert (found["replica 2"]["level"], "does not let us in" in found["replica 2"]["value"]) == ("warning", True)


@pytest.mark.drivers(*ONE_OF_EACH)
async def test_what_cannot_be_examined(db, say):
    """Exit status 2, one line, and never a password."""
    synchronous = {
        "postgresql": "postgresql://me:geheim@h/x",
        "mysql": "mysql://me:geheim@h/x",
        "sqlite": "sqlite:///x",
    }
    cases = {
        "geheim": "this is not a database URL; use one like postgresql+asyncpg://me@host/bank",
        "postgresql+asyncpg://me:geheim@127.0.0.1:1/x": (
            "postgresql+asyncpg at 127.0.0.1:1 does not let us in: ConnectionRefusedError"
        ),
        "oracle://me:geheim@h/x": "sqla_uow does not know the database 'oracle'; use postgresql, cockroachdb, mysql, mariadb, sqlite",
        synchronous[db.family]: None,
    }
    for url, message in cases.items():
        if db.family != "postgresql" and "asyncpg" in url:
            continue
        status, output, errors = await say(url)
        assert (status, output) == (2, "")
        assert errors.startswith("sqla_uow doctor: ")
        assert "geheim" not in errors
        assert len(errors.splitlines()) == 1
        assert message is None or errors == f"sqla_uow doctor: {message}\n"


# In each of them SQLAlchemy takes the password, or its end, for something else.
MISREAD = {
    "an @": "postgresql+asyncpg://me:p@geheim@127.0.0.1:1/bank",
    "an @ and a colon": "postgresql+asyncpg://me:p@x:geheim@127.0.0.1:1/bank",
    "an @ and a slash": "postgresql+asyncpg://me:p@geheim/x@127.0.0.1:1/bank",
    "an @, and a slash and more": "postgresql+asyncpg://me:p@127.0.0.1:1/geheim@127.0.0.1:1/bank",
    "an @ and a question mark": "postgresql+asyncpg://me:p@geheim?x@127.0.0.1:1/bank",
    "an @ and what looks like an argument": "postgresql+asyncpg://me:p@geheim?geheim=geheim@127.0.0.1:1/bank",
    "an @ and brackets": "postgresql+asyncpg://me:p@[geheim]x@127.0.0.1:1/bank",
    "no host": "postgresql+asyncpg:///me:geheim@127.0.0.1:1/bank",
    "no @ at all": "postgresql+asyncpg://me:geheim",
    "a port that is none": "postgresql+asyncpg://me:geheim@127.0.0.1:geheim/bank",
    "a slash too few": "postgresql+asyncpg:/me:geheim@127.0.0.1:1/bank",
    "a user, for SQLite": "sqlite+aiosqlite://me:geheim@127.0.0.1/bank",
}


@pytest.mark.drivers(*ONE_OF_EACH)
@pytest.mark.parametrize("case", MISREAD)
async def test_a_url_that_is_read_wrongly(db, say, case):
    """What it takes for a host, a port or a database is not printed, no traceback shows it, and what to write is said."""
    url = MISREAD[case]
    if db.family == "mysql":
        url = url.replace("postgresql+asyncpg", "mysql+asyncmy")
    if db.family == "sqlite" and case != "a user, for SQLite":
        return
    status, output, errors = await say(url, "--seconds", "1")
    assert (status, output) == (2, "")
    assert "geheim" not in errors
    assert len(errors.splitlines()) == 1
    if case not in ("a slash too few", "a user, for SQLite"):
        assert "write %40 for an @ in the user or the password" in errors
    status, output, errors = await say(db.url, "--read-only", "--replica", url, "--seconds", "5")
    assert "geheim" not in output + errors


async def test_an_at_sign_that_means_nothing(db, say):
    """A user may have one, and a file; the place is named, and one in a query's value costs no more than that."""
    if db.family == "sqlite":
        url = "sqlite+aiosqlite:////no/where/me@home.db"  # not connected to: aiosqlite's thread outlives a failure
        assert place_of(url, make_url(url)) == "sqlite+aiosqlite at /no/where/me@home.db"
        return
    url = re.sub("//[^:]+:secret@", "//m@e:geheim@", db.url)
    status, output, errors = await say(url, "--read-only")
    assert "geheim" not in output + errors
    assert status != INTERRUPTED or f"{db.driver} at 127.0.0.1:" in errors


def test_a_url_in_two_parts(capsys):
    """A password with a space, and no quotes: argparse would print its end."""
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "postgresql+asyncpg://me:p", "geheim@127.0.0.1/bank"])
    assert ended.value.code == 2
    errors = capsys.readouterr().err
    assert "not understood: more than one URL; put the URL in quotes" in errors
    assert "geheim" not in errors
    with pytest.raises(SystemExit):
        main(["doctor", "sqlite+aiosqlite://", "--proceses=3"])
    assert "not understood: --proceses;" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ("URL",),
        ("doctor", "--pool-size", "URL"),
        ("doctor", "--seconds=URL", "sqlite+aiosqlite://"),
        ("doctor", "postgresql+asyncpg://me:p", "--geheim@127.0.0.1/bank"),
        ("doctor", "postgresql+asyncpg://me:p", "--re=geheim@127.0.0.1/bank"),
        ("doctor", "postgresql+asyncpg://me:p", "--processes=geheim@127.0.0.1/bank"),
        ("doctor", "--json=URL"),
    ],
)
def test_a_url_where_none_belongs(arguments, capsys):
    """The command is forgotten, or an option's number: argparse would print what stands in its place."""
    url = "postgresql+asyncpg://me:geheim@127.0.0.1/bank"
    with pytest.raises(SystemExit) as ended:
        main([argument.replace("URL", url) for argument in arguments])
    assert ended.value.code == 2
    output, errors = capsys.readouterr()
    assert "python -m sqla_uow" in errors
    assert "geheim" not in output + errors


UNKNOWN = {
    "asyncpg": {
        "sslmode=verify-full": "'sslmode' is not an argument of asyncpg; write ssl=verify-full",
        "sslmode=geheim": "'sslmode' is not an argument of asyncpg; write ssl=require",
        "sslmode=require&channel_binding=require": (
            "'sslmode' is not an argument of asyncpg; write ssl=require; "
            "'channel_binding' is not an argument of asyncpg; leave it out"
        ),
        "connect_timeout=5": "'connect_timeout' is not an argument of asyncpg; pass connect_args={'timeout': seconds}",
    },
    "psycopg": {"ssl=require": "'ssl' is not an argument of psycopg; write sslmode=require"},
    "asyncmy": {
        "sslmode=geheim": (
            "'sslmode' is not an argument of asyncmy; leave it out, or pass what it is called there in connect_args"
        )
    },
    "aiomysql": {
        "sslmode=geheim": (
            "'sslmode' is not an argument of aiomysql; leave it out, or pass what it is called there in connect_args"
        )
    },
}


@servers
async def test_a_providers_arguments(db, say):
    """A URL for another driver: the argument is named, and what to write."""
    for query, message in UNKNOWN[db.driver].items():
        status, output, errors = await say(f"{db.url}?{query}")
        assert (status, output) == (2, "")
        assert errors.endswith(f" does not let us in: {message}\n")
        assert "geheim" not in errors


@servers
async def test_a_wrong_password(db, say):
    """Its code is said, and nothing of the message."""
    wrong = db.url.replace(":secret@", ":geheim@")
    if db.family == "postgresql":  # which lets everybody in, here
        wrong = db.url.replace("postgres:secret@", "nobody:geheim@")
    status, output, errors = await say(wrong)
    assert (status, output) == (2, "")
    assert "does not let us in" in errors
    assert "geheim" not in errors


async def test_it_is_interrupted(db):
    """Ctrl-C while it tries: its table is gone all the same."""
    argv = [sys.executable, "-c", INTERRUPTS_ITSELF, "doctor", db.url]
    process = await asyncio.to_thread(subprocess.run, argv, capture_output=True, text=True, timeout=30, check=False)
    assert process.stdout.startswith("its table is there\n")
    assert await db.rows(TABLES[db.family]) == []
    assert (process.returncode, process.stderr) == (
        INTERRUPTED,
        "sqla_uow doctor: interrupted; nothing is left behind\n",
    )


async def test_cut_off_while_its_table_is_made(db):
    """It is dropped, whether it was there already or only about to be."""
    engine = db.engine()
    subject = Subject(engine, UnitOfWorkManager(engine), 1)
    making = asyncio.create_task(Trial(subject).__aenter__())
    await until(engine.pool.checkedout, pause=0)
    making.cancel()
    with pytest.raises(asyncio.CancelledError):
        await making
    assert await db.rows(TABLES[db.family]) == []


@pytest.mark.drivers("sqlite")
async def test_for_people(db, say):
    """A line for each finding, its advice indented below."""
    _status, output, _errors = await say(db.url)
    assert "journal_mode               delete  [note]\n" in output
    assert "SERIALIZABLE               no lost update, no write skew\n" in output


def interrupt(*_arguments):
    """Stand for Ctrl-C, which would end the tests; the real one is sent above."""
    raise KeyboardInterrupt


def test_the_words_of_an_interruption(monkeypatch, capsys):
    """They say that nothing is left behind."""
    monkeypatch.setattr(__main__, "examine", interrupt)
    assert main(["doctor", "sqlite+aiosqlite://"]) == INTERRUPTED
    assert capsys.readouterr().err == "sqla_uow doctor: interrupted; nothing is left behind\n"


@pytest.mark.parametrize("number", ["0", "-1", "x"])
def test_numbers_that_make_no_sense(number, capsys):
    """Argparse says so."""
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "sqlite+aiosqlite://", "--processes", number])
    assert ended.value.code == 2
    assert "--processes" in capsys.readouterr().err


class Told:
    """Stands for servers of which none runs here: MySQL, which lacks variables, and nodes of Galera, slow to start."""

    def __init__(self, **variables):
        self.variables = variables

    async def row(self, statement, /, *, name=None):
        """Return a variable's or a status's row, as the server would."""
        name = name or statement.split("'")[1]
        return (name, self.variables[name]) if name in self.variables else None


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"wsrep_on": "ON", "wsrep_local_state_comment": "Synced", "wsrep_cluster_size": "3"}, ("Synced, 3 nodes", "note")),
        ({"wsrep_on": "ON", "wsrep_local_state_comment": "Donor/Desynced"}, ("Donor/Desynced, ? nodes", "warning")),
        ({"wsrep_on": "ON"}, ("unknown, ? nodes", "warning")),
        ({}, ("no", "fine")),
    ],
)  # fmt: skip
async def test_a_node_of_galera(variables, expected):
    """Its state and its size; one that is not in step is a warning."""
    (finding,) = await _doctor_mariadb._cluster(Told(**variables))
    assert (finding.value, finding.level) == expected


async def test_mysql_has_no_snapshot_isolation_to_set():
    """So nothing is said of it."""
    found = await _doctor_mariadb._settings(
        Told(transaction_isolation="REPEATABLE-READ", innodb_flush_log_at_trx_commit="1")
    )
    assert "innodb_snapshot_isolation" not in [finding.name for finding in found]
    assert ("default isolation", "REPEATABLE READ") in [finding[:2] for finding in found]
