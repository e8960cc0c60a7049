"""Codes that are permanent by themselves, and not if a certain function of PostgreSQL's raised them."""

from __future__ import annotations

import sqlite3
from types import SimpleNamespace

import pytest
from sqlalchemy.exc import DBAPIError, StatementError
from sqlalchemy.orm.exc import StaleDataError

from sqla_uow import is_retryable
from sqla_uow._databases.failures import Kind, classify

FUNCTIONS = {
    "RevalidateCachedQuery": "0A000",
    "getTypeInputInfo": "XX000",
    "getTypeBinaryInputInfo": "XX000",
    "getTypeOutputInfo": "XX000",
    "getTypeBinaryOutputInfo": "XX000",
}


@pytest.mark.parametrize(("function", "code"), FUNCTIONS.items())
def test_what_was_prepared_before_a_migration(function, code):
    """A plan, or a type, that is no more: the next attempt prepares anew."""
    assert kind_of(code, function) is Kind.STALE_PLAN


@pytest.mark.parametrize(("function", "code"), FUNCTIONS.items())
def test_wherever_the_driver_keeps_the_function(function, code):
    """In `diag` of psycopg; in the error of asyncpg, which stands behind SQLAlchemy's own."""
    asyncpg = pytest.importorskip("asyncpg.exceptions")
    adapter = pytest.importorskip("sqlalchemy.dialects.postgresql.asyncpg").AsyncAdapt_asyncpg_dbapi
    theirs = pytest.importorskip("psycopg.errors").lookup(code)("message")
    diagnosed = type("Diagnosed", (type(theirs),), {"diag": SimpleNamespace(source_function=function)})("message")
    assert classify(diagnosed).kind is Kind.STALE_PLAN
    behind = asyncpg.PostgresError.new({"C": code, "M": "message", "R": function})
    around = adapter.Error("message", behind)
    around.__cause__ = behind
    assert classify(around).kind is Kind.STALE_PLAN


@pytest.mark.parametrize("code", ["0A000", "XX000"])
def test_the_same_code_of_another_function(code):
    """What the server cannot do, or has found broken in itself, it will not do the next time either."""
    assert kind_of(code, "somewhere_else") is Kind.PERMANENT
    assert kind_of(code, None) is Kind.PERMANENT


def kind_of(code, function):
    """Return what SQLAlchemy's error around asyncpg's means."""
    asyncpg = pytest.importorskip("asyncpg.exceptions")
    theirs = asyncpg.PostgresError.new({"C": code, "M": "message"} | ({"R": function} if function else {}))
    return classify(DBAPIError("SELECT 1", {}, theirs)).kind


def adapted(theirs):
    """Make what SQLAlchemy makes of an error of asyncpg's; without a code, as of a statement it had prepared."""
    adapter = pytest.importorskip("sqlalchemy.dialects.postgresql.asyncpg").AsyncAdapt_asyncpg_dbapi
    error = adapter.Error("message")
    error.__cause__ = theirs
    return DBAPIError("SELECT 1", {}, error)


def test_the_code_is_behind_sqlalchemys_own_error():
    """Of the adapter around asyncpg only, and only where there is something behind it."""
    exceptions = pytest.importorskip("asyncpg.exceptions")
    failure = classify(adapted(exceptions.PostgresError.new({"C": "40001", "M": "message"})))
    assert (failure.kind, failure.code) == (Kind.CONFLICT, "40001")
    assert classify(adapted(exceptions.OutdatedSchemaCacheError("message"))).kind is Kind.STALE_PLAN
    assert classify(adapted(ValueError("message"))) is None
    assert classify(adapted(None)) is None
    unrelated = RuntimeError("message")
    unrelated.__cause__ = exceptions.PostgresError.new({"C": "40001", "M": "message"})
    assert classify(unrelated) is None


def test_a_mistake_found_while_connecting():
    """Told by the driver without a code: another attempt would be told the same.  What could not be reached did not start."""
    asyncpg = pytest.importorskip("asyncpg.exceptions")
    psycopg = pytest.importorskip("psycopg")
    mistakes = (
        psycopg.ProgrammingError,
        psycopg.NotSupportedError,
        psycopg.DataError,
        asyncpg.ClientConfigurationError,
    )
    for mistake in mistakes:
        assert classify(mistake("message"), connecting=True) is None
    for trouble in (psycopg.OperationalError, psycopg.InterfaceError, asyncpg.InterfaceError):
        assert classify(trouble("message"), connecting=True).kind is Kind.NOT_STARTED
    assert classify(BaseException("message"), connecting=True) is None


def test_the_error_itself_is_kept():
    """By which the unit that met it is known again."""
    stale = StaleDataError("message")
    assert classify(stale) == (Kind.STALE, None, stale)
    theirs = pytest.importorskip("psycopg.errors").lookup("40001")("message")
    assert classify(DBAPIError("SELECT 1", {}, theirs)) == (Kind.CONFLICT, "40001", theirs)
    assert classify(theirs, connecting=True) == (Kind.CONFLICT, "40001", theirs)
    refused = ConnectionRefusedError("message")
    assert classify(refused, connecting=True) == (Kind.NOT_STARTED, None, refused)


def test_the_code_is_spelled_as_the_database_names_it():
    """SQLite's by name; none where there is none, though the connection is lost."""
    busy = sqlite3.OperationalError("message")
    busy.sqlite_errorcode, busy.sqlite_errorname = sqlite3.SQLITE_BUSY, "SQLITE_BUSY"
    assert classify(busy, connecting=True) == (Kind.CONFLICT, "SQLITE_BUSY", busy)
    lost = classify(DBAPIError("SELECT 1", {}, ValueError("message"), connection_invalidated=True))
    assert (lost.kind, lost.code) == (Kind.LOST, None)


def test_what_two_errors_come_from_hides_no_third():
    """It is looked at once, and the looking goes on."""
    shared, late = KeyError("shared"), ValueError("late")
    late.__cause__ = shared
    conflict = DBAPIError("SELECT 1", {}, pytest.importorskip("psycopg.errors").lookup("40001")("message"))
    assert is_retryable(ExceptionGroup("of a task group", [conflict, shared, late]))


def test_what_a_column_type_has_met():
    """SQLAlchemy keeps it in `orig`, also where the error has lost its cause on the way from another process."""
    conflict = DBAPIError("SELECT 1", {}, pytest.importorskip("psycopg.errors").lookup("40001")("message"))
    assert is_retryable(StatementError("in a type", "SELECT :x", {}, conflict))


def test_the_sync_driver_of_postgresql():
    """`is_retryable` is for code outside of units too, which may use psycopg2; its code has another name."""
    theirs = type("SerializationFailure", (Exception,), {"pgcode": "40001"})("message")
    assert is_retryable(DBAPIError("SELECT 1", {}, theirs))
