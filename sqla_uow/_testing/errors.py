"""The errors of the fault kit: raised by the server itself where it can be asked to, made by the driver where it cannot."""

from __future__ import annotations

import errno
import importlib
import sqlite3
from typing import TYPE_CHECKING, Any, NoReturn

from sqla_uow._databases.database import family_of

if TYPE_CHECKING:
    from sqlalchemy.engine import Dialect

__all__ = ["raise_by_server", "raise_lost", "raise_refused"]

# https://www.postgresql.org/docs/current/plpgsql-errors-and-messages.html: any SQLSTATE can be raised.
_POSTGRESQL = {
    "conflict": ("40001", "could not serialize access due to concurrent update"),
    "deadlock": ("40P01", "deadlock detected"),
    "lock timeout": ("55P03", "canceling statement due to lock timeout"),
}
# https://mariadb.com/kb/en/signal/: errno and SQLSTATE are free.  1020 and 1213 end the transaction, a SIGNAL does not.
_MARIADB = {
    "conflict": (1020, "HY000", "Record has changed since last read"),
    "deadlock": (1213, "40001", "Deadlock found when trying to get lock; try restarting transaction"),
    "lock timeout": (1205, "HY000", "Lock wait timeout exceeded; try restarting transaction"),
}
_ENDS_TRANSACTION = ("conflict", "deadlock")


def raise_by_server(dialect: Dialect, fault: str, connection: Any, *, committing: bool) -> None:
    """Have the database refuse what is going on, in its own words and through its driver.

    Args:
        dialect: of the engine.
        fault: ``"conflict"``, ``"deadlock"`` or ``"lock timeout"``.
        connection: the driver's, as SQLAlchemy has it.
        committing: COMMIT is what is refused.
    """
    if dialect.name == "sqlite":  # is in this process, and cannot be asked to
        error = sqlite3.OperationalError("database is locked")
        error.sqlite_errorcode, error.sqlite_errorname = sqlite3.SQLITE_BUSY, "SQLITE_BUSY"
        raise error
    if family_of(dialect) == "postgresql":
        state, message = _POSTGRESQL[fault]
        statement = f"DO $$ BEGIN RAISE EXCEPTION '{message}' USING ERRCODE = '{state}'; END $$"
    else:
        # A COMMIT meets conflicts in a Galera cluster only, whose certification fails as 1213.
        number, state, message = _MARIADB["deadlock" if committing and fault == "conflict" else fault]
        statement = f"SIGNAL SQLSTATE '{state}' SET MYSQL_ERRNO = {number}, MESSAGE_TEXT = '{message}'"
    cursor = connection.cursor()
    try:
        cursor.execute(statement)
    except Exception:
        if family_of(dialect) != "postgresql" and fault in _ENDS_TRANSACTION:
            dialect.do_rollback(connection)
        raise
    finally:
        cursor.close()


def raise_lost(dialect: Dialect, connection: Any) -> NoReturn:
    """Raise what the driver does when the link breaks under an operation."""
    driver, adapted = dialect.driver, getattr(connection, "dbapi_connection", connection)
    if driver == "asyncpg":
        errors = importlib.import_module("asyncpg.exceptions")
        adapted._handle_exception(
            errors.ConnectionDoesNotExistError("connection was closed in the middle of operation")
        )
    if driver == "psycopg":
        raise _error_class(dialect)("consuming input failed: server closed the connection unexpectedly")
    raise _error_class(dialect)(2013, "Lost connection to MySQL server during query")


def raise_refused(dialect: Dialect) -> NoReturn:
    """Raise what the driver does when nobody listens where the server should be."""
    refused = ConnectionRefusedError(errno.ECONNREFUSED, "Connect call failed")
    if dialect.driver == "asyncpg":
        raise refused
    if dialect.driver == "psycopg":
        raise _error_class(dialect)("connection failed: connection to server failed: Connection refused")
    raise _error_class(dialect)(2003, f"Can't connect to MySQL server ({refused})") from refused


def _error_class(dialect: Dialect) -> Any:
    module: Any = dialect.loaded_dbapi
    return module.OperationalError
