"""What each code means, on the exceptions of the drivers themselves."""

from __future__ import annotations

import re
import socket
import sqlite3

import pytest
from sqlalchemy import exc
from sqlalchemy.orm.exc import StaleDataError

from sqla_uow import errors, is_retryable
from sqla_uow._databases.failures import Kind, classify, code_of, hidden_conflict

CONFLICT, LOCK, NOT_STARTED, LOST = Kind.CONFLICT, Kind.LOCK_TIMEOUT, Kind.NOT_STARTED, Kind.LOST
STALE_PLAN = Kind.STALE_PLAN
AMBIGUOUS, READ_ONLY, TIMEOUT, PERMANENT = Kind.AMBIGUOUS, Kind.READ_ONLY, Kind.SERVER_TIMEOUT, Kind.PERMANENT

POSTGRESQL = {
    "40001": CONFLICT, "40P01": CONFLICT, "55P03": LOCK, "57P03": NOT_STARTED, "53300": NOT_STARTED,
    "57P01": LOST, "57P02": LOST, "57P04": LOST, "25P03": LOST, "25P04": LOST,
    "08000": LOST, "08003": LOST, "08006": LOST, "08P01": LOST, "40003": AMBIGUOUS, "08007": AMBIGUOUS, "XXA00": AMBIGUOUS,
    "25006": READ_ONLY, "57014": TIMEOUT,
    "40000": PERMANENT, "40002": PERMANENT, "23505": PERMANENT, "23503": PERMANENT, "23P01": PERMANENT,
    "42601": PERMANENT, "25P02": PERMANENT, "28P01": PERMANENT, "28000": PERMANENT, "3D000": PERMANENT,
    "0A000": PERMANENT, "XX000": PERMANENT, "26000": STALE_PLAN, "42P05": STALE_PLAN,
}  # fmt: skip
MARIADB = {
    1213: CONFLICT, 1020: CONFLICT, 1205: LOCK, 1040: NOT_STARTED, 1047: NOT_STARTED, 2002: NOT_STARTED,
    2003: NOT_STARTED, 2006: LOST, 2013: LOST, 2055: LOST, 1927: LOST, 1792: READ_ONLY, 1969: TIMEOUT, 3024: TIMEOUT,
    1044: PERMANENT, 1045: PERMANENT, 1049: PERMANENT, 1054: PERMANENT, 1062: PERMANENT, 1064: PERMANENT,
    1305: PERMANENT, 1290: PERMANENT, 1317: PERMANENT, 1452: PERMANENT,
}  # fmt: skip
SQLITE = {
    5: CONFLICT, 261: CONFLICT, 517: CONFLICT, 773: CONFLICT, 6: CONFLICT, 262: CONFLICT, 518: CONFLICT,
    8: READ_ONLY, 14: PERMANENT, 1555: PERMANENT, 2067: PERMANENT, 787: PERMANENT, 1: PERMANENT, 9: PERMANENT,
}  # fmt: skip


class Coded(Exception):  # noqa: N818  # stands for a driver's own
    """An exception of a driver that keeps a SQLSTATE."""

    def __init__(self, state):
        super().__init__("message")
        self.sqlstate = state


def sqlite_error(code):
    """Make what sqlite3 raises, with its extended code."""
    error = sqlite3.OperationalError("database is locked")
    error.sqlite_errorcode = code
    error.sqlite_errorname = f"CODE_{code}"
    return error


def wrapped(error, *, invalidated=False):
    """Wrap as SQLAlchemy does."""
    return exc.DBAPIError("SELECT 1", {}, error, connection_invalidated=invalidated)


def kind_of(error, **options):
    """Return the class of an exception, None where it is not a database's."""
    failure = classify(error, **options)
    return None if failure is None else failure.kind


@pytest.mark.parametrize(("state", "kind"), POSTGRESQL.items())
def test_each_sqlstate(state, kind):
    """R2, T4: by the whole code, never by its class: 40002 and 40003 are not 40001; nor by the wrapper's class."""
    asyncpg = pytest.importorskip("asyncpg.exceptions")
    psycopg = pytest.importorskip("psycopg.errors")
    theirs = asyncpg.PostgresError.new({"C": state, "M": "message"})
    assert kind_of(wrapped(theirs)) is kind
    assert kind_of(wrapped(Coded(state))) is kind
    if state in psycopg._sqlcodes:
        assert kind_of(exc.InternalError("SELECT 1", {}, psycopg.lookup(state)("message"))) is kind
    assert classify(wrapped(theirs)).code == state


@pytest.mark.parametrize(("number", "kind"), MARIADB.items())
@pytest.mark.parametrize("module", ["asyncmy.errors", "pymysql.err"])
def test_each_errno(module, number, kind):
    """R2, T24: by errno, since 1020's SQLSTATE is HY000; the SQLSTATE beside it does not matter."""
    theirs = pytest.importorskip(module).OperationalError(number, "message")
    theirs.sqlstate = "HY000"
    assert kind_of(wrapped(theirs)) is kind
    assert classify(wrapped(theirs)).code == str(number)


@pytest.mark.parametrize(("code", "kind"), SQLITE.items())
def test_each_extended_code_of_sqlite(code, kind):
    """R2: SQLITE_BUSY and SQLITE_LOCKED with all their extended codes, told by SQLite's own name."""
    assert kind_of(wrapped(sqlite_error(code))) is kind
    assert classify(sqlite_error(code)).code == f"CODE_{code}"


@pytest.mark.parametrize(
    ("code", "kind"), [(8177, CONFLICT), (60, CONFLICT), (1, PERMANENT), (3113, PERMANENT), (10060, PERMANENT)]
)
def test_oracle_keeps_its_code_in_an_object(code, kind):
    """R2: oracledb's `args[0].full_code`."""
    detail = type("_Error", (), {"code": code, "full_code": f"ORA-{code:05}"})()
    assert kind_of(wrapped(Exception(detail))) is kind
    assert classify(Exception(detail)).code == f"ORA-{code:05}"


def test_sql_server_through_its_two_drivers():
    """R2: pymssql's number (1205 is a deadlock there), pyodbc's SQLSTATE as first argument."""
    pymssql = type("OperationalError", (Exception,), {"__module__": "pymssql"})
    pyodbc = type("Error", (Exception,), {"__module__": "pyodbc"})
    assert [kind_of(wrapped(pymssql(number, "message"))) for number in (1205, 3960, 547)] == [
        CONFLICT,
        CONFLICT,
        PERMANENT,
    ]
    assert [kind_of(wrapped(pyodbc(state, "message"))) for state in ("40001", "23000")] == [CONFLICT, PERMANENT]


@pytest.mark.parametrize(
    "error",
    [
        Coded(None), Exception(), Exception(None), ValueError("40001"), KeyError("1213"), Exception("40001", 1),
        OSError(1213, "an errno of the system, not of MariaDB"), ConnectionRefusedError(111, "refused"),
        exc.InvalidRequestError("x"), exc.PendingRollbackError("x"), exc.TimeoutError("pool"),
        exc.StatementError("bind", "SELECT :x", {}, KeyError("x")), errors.RollbackOnlyError("x"),
    ],
)  # fmt: skip
def test_what_has_no_code_of_a_database_is_not_ours(error):
    """R2, T46: None-safe, and no guessing by text."""
    assert classify(error) is None
    assert is_retryable(error) is False


def test_a_lost_connection_outranks_a_code_that_says_nothing_of_it():
    """R2: `connection_invalidated` is lost, unless the code is a conflict's (a hot-standby conflict closes, too)."""
    assert kind_of(wrapped(Coded(None), invalidated=True)) is LOST
    assert kind_of(wrapped(Coded("42601"), invalidated=True)) is LOST
    assert kind_of(wrapped(Coded("57014"), invalidated=True)) is LOST
    assert kind_of(wrapped(Coded("40001"), invalidated=True)) is CONFLICT


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ConnectionRefusedError(111, "refused"), NOT_STARTED), (socket.gaierror(-2, "unknown"), NOT_STARTED),
        (TimeoutError(), NOT_STARTED), (Coded(None), NOT_STARTED), (sqlite3.OperationalError("no code"), NOT_STARTED),
        (Coded("57P03"), NOT_STARTED), (Coded("53300"), NOT_STARTED), (Coded("08006"), NOT_STARTED), (Coded("08P01"), NOT_STARTED),
        (Coded("57P01"), NOT_STARTED), (Coded("40001"), CONFLICT), (sqlite_error(5), CONFLICT),
        (Coded("28P01"), PERMANENT), (Coded("28000"), PERMANENT), (Coded("3D000"), PERMANENT),
        (sqlite_error(14), PERMANENT), (TypeError("connect() got an unexpected keyword"), None),
    ],
)  # fmt: skip
def test_while_connecting(error, kind):
    """R2, T45: refused, raw OSError and what carries no code did not start; a wrong password stays wrong."""
    assert kind_of(error, connecting=True) is kind
    if not isinstance(error, OSError):
        assert kind_of(wrapped(error), connecting=True) is kind


@pytest.mark.parametrize("number", [1040, 1044, 1045, 1047, 1049, 1698, 2002, 2003, 2006, 2013])
def test_while_connecting_to_mariadb(number):
    """R2: 1044, 1045 and 1049 (1698: no password at all) will not get better by waiting."""
    error = pytest.importorskip("pymysql.err").OperationalError(number, "message")
    permanent = number in (1044, 1045, 1049, 1698)
    assert kind_of(wrapped(error), connecting=True) is (PERMANENT if permanent else NOT_STARTED)


def raised(error, *, cause=None, context=None, suppress=None):
    """Give an exception its origin, as `raise` would."""
    error.__context__ = context
    if cause is not None or suppress:
        error.__cause__ = cause
    return error


def test_is_retryable_walks_causes_contexts_and_groups_but_not_past_from_none():
    """R2: `__cause__`, `__context__`, `orig` and the members of a group; `from None` ends it; circles do."""
    conflict = wrapped(Coded("40001"))
    assert is_retryable(conflict)
    assert is_retryable(raised(KeyError(), cause=conflict))
    assert is_retryable(raised(KeyError(), context=raised(ValueError(), context=conflict)))
    assert is_retryable(ExceptionGroup("of a task group", [ValueError(), raised(KeyError(), cause=conflict)]))
    assert not is_retryable(raised(KeyError(), context=conflict, suppress=True))
    circle = raised(KeyError(), context=ValueError())
    circle.__context__.__context__ = circle
    assert not is_retryable(circle)


def test_is_retryable_says_no_to_what_is_done_or_unknown():
    """C1, H2: an unknown outcome, a committed unit whose hook met a conflict, and a passed deadline are not tried again."""
    conflict = wrapped(Coded("40001"))
    assert is_retryable(errors.ConflictError("outlived its retries"))
    assert is_retryable(StaleDataError("stale"))
    assert not is_retryable(raised(errors.AmbiguousCommitError("unknown"), cause=conflict))
    assert not is_retryable(errors.AfterCommitError("committed", [conflict]))
    assert not is_retryable(raised(errors.TransactionTimeoutError("late"), cause=conflict))
    assert not is_retryable(raised(wrapped(Coded("40003")), context=conflict))


def test_the_deadlock_behind_a_savepoint_that_is_gone():
    """D3, T22: MariaDB's 1305 is hard only if a deadlock, 1020 or 1205 stands behind it."""
    operational = pytest.importorskip("pymysql.err").OperationalError
    gone = operational(1305, "SAVEPOINT does not exist")
    assert hidden_conflict(gone) is None
    for number in (1213, 1020, 1205):
        assert hidden_conflict(raised(gone, context=wrapped(operational(number, "message")))).code == str(number)
    assert hidden_conflict(raised(gone, context=wrapped(operational(1062, "message")))) is None
    assert hidden_conflict(raised(operational(1064, "syntax"), context=operational(1213, "message"))) is None


def test_no_code_where_the_driver_gives_none():
    """T46: `sqlstate` None, arguments of other types."""
    assert [code_of(error) for error in (Coded(None), Exception(), Exception(None), Exception("40001"))] == [None] * 4
    assert re.fullmatch("4000[1]", code_of(Coded("40001")))
