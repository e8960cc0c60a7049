"""What an error means: retry, never retry, or not ours.  Decided by the driver's code, never by text or wrapper class.

Some codes need a second look: PostgreSQL's 0A000 is permanent as a rule, but not where a plan has been overtaken by a
migration.  The name of the server's function that raised it tells, which no translation changes.

Where each driver keeps its code (measured, see the driver table in the docs): asyncpg and psycopg in ``sqlstate``;
asyncmy, aiomysql and PyMySQL as an int in ``args[0]``; sqlite3 in ``sqlite_errorcode``; oracledb in ``args[0].code``;
pyodbc as the SQLSTATE in ``args[0]``.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, NamedTuple, cast

from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm.exc import StaleDataError

from sqla_uow.errors import (
    AfterCommitError,
    AmbiguousCommitError,
    ConflictError,
    TransactionTimeoutError,
    UnitOfWorkError,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["HARD", "Failure", "Kind", "chain", "classify", "code_of", "hidden_conflict", "is_retryable"]


class Kind(enum.Enum):
    """The classes of failure; the value is what `ConflictError.reason` says."""

    CONFLICT = "conflict"
    LOCK_TIMEOUT = "lock timeout"
    STALE = "stale version"
    NOT_STARTED = "not started"
    LOST = "lost connection"
    STALE_PLAN = "stale plan"
    AMBIGUOUS = "ambiguous"
    READ_ONLY = "read only"
    SERVER_TIMEOUT = "server timeout"
    PERMANENT = "permanent"
    CHOSEN = "retry_on"


RETRYABLE = frozenset(
    {Kind.CONFLICT, Kind.LOCK_TIMEOUT, Kind.STALE, Kind.NOT_STARTED, Kind.LOST, Kind.STALE_PLAN, Kind.CHOSEN},
)
HARD = frozenset({Kind.CONFLICT, Kind.LOCK_TIMEOUT, Kind.LOST, Kind.STALE_PLAN})
"""No savepoint brings the transaction back from these."""


class Failure(NamedTuple):
    """One error of the database, understood."""

    kind: Kind
    code: str | None
    error: BaseException

    @property
    def retryable(self) -> bool:
        return self.kind in RETRYABLE


# SQLSTATE: https://www.postgresql.org/docs/current/errcodes-appendix.html.  Not a test for "40": 40002 is a constraint
# and 40003 is an unknown outcome, and both must never be retried (zope.sqlalchemy 4.1 does).
_SQLSTATES = {
    "40001": Kind.CONFLICT,
    "40P01": Kind.CONFLICT,
    "55P03": Kind.LOCK_TIMEOUT,
    "57P01": Kind.LOST,
    "57P02": Kind.LOST,
    "57P04": Kind.LOST,
    "25P03": Kind.LOST,  # idle_in_transaction_session_timeout: the connection is gone
    "25P04": Kind.LOST,  # transaction_timeout: the connection is gone
    "08007": Kind.AMBIGUOUS,
    "40003": Kind.AMBIGUOUS,
    "XXA00": Kind.AMBIGUOUS,  # CockroachDB: committed, except the DDL in it
    "57P03": Kind.NOT_STARTED,
    "53300": Kind.NOT_STARTED,
    "26000": Kind.STALE_PLAN,  # the prepared statement is gone: a pooler gave us another session of the server
    "42P05": Kind.STALE_PLAN,  # or is there already, of somebody else
    "25006": Kind.READ_ONLY,
    "57014": Kind.SERVER_TIMEOUT,
}
# What was prepared before a migration: the plan gives other columns now; the type of a parameter was dropped and created again.
_STALE_IF_RAISED_BY = {
    "0A000": frozenset({"RevalidateCachedQuery"}),
    "XX000": frozenset(
        {"getTypeInputInfo", "getTypeBinaryInputInfo", "getTypeOutputInfo", "getTypeBinaryOutputInfo"},
    ),
}
_OUTDATED = "OutdatedSchemaCacheError"  # asyncpg's own: a composite type has other attributes than it remembers
# MariaDB: https://mariadb.com/kb/en/mariadb-error-code-reference/.  1020's SQLSTATE is HY000, so errno decides.
_ERRNOS = {
    1213: Kind.CONFLICT,
    1020: Kind.CONFLICT,
    1205: Kind.LOCK_TIMEOUT,
    1040: Kind.NOT_STARTED,
    1047: Kind.NOT_STARTED,  # Galera: the node is not in the primary component
    2002: Kind.NOT_STARTED,
    2003: Kind.NOT_STARTED,
    2006: Kind.LOST,
    2013: Kind.LOST,
    2055: Kind.LOST,
    1927: Kind.LOST,
    1792: Kind.READ_ONLY,
    1969: Kind.SERVER_TIMEOUT,
    3024: Kind.SERVER_TIMEOUT,
}
_SAVEPOINT_GONE = 1305  # MariaDB: the deadlock that rolled everything back is only in __context__
# https://www.sqlite.org/rescode.html; the low byte is the primary code, so 261, 517 and 262 are covered too.
_SQLITE = {5: Kind.CONFLICT, 6: Kind.CONFLICT, 8: Kind.READ_ONLY}
_ORACLE = {8177: Kind.CONFLICT, 60: Kind.CONFLICT}
_MSSQL = {1205: Kind.CONFLICT, 3960: Kind.CONFLICT}
_ADAPTER = "sqlalchemy.dialects.postgresql.asyncpg"
"""Whose errors have no code where asyncpg's own, behind them, has one: InvalidCachedStatementError."""
_CONFUSED = "InternalClientError"
"""asyncpg: an answer came that nobody had asked for, so the connection is of no use.  A server, or a pooler that has lost its
own, sends an error so before it closes the connection."""
_OF_DRIVER = frozenset({"OperationalError", "InterfaceError", _CONFUSED})
# Of drivers, without a code: what was asked of them cannot be, today or tomorrow.
_MISTAKES = frozenset({"ProgrammingError", "NotSupportedError", "DataError", "ClientConfigurationError"})


def code_of(error: BaseException) -> str | int | None:
    """Return the driver's own code: a SQLSTATE, an errno, an extended SQLite code, or None where it gives none."""
    sqlite = getattr(error, "sqlite_errorcode", None)
    if isinstance(sqlite, int):
        return sqlite
    first = error.args[0] if error.args else None
    if isinstance(first, int) and not isinstance(error, OSError):
        return first
    oracle = getattr(first, "full_code", None)
    if isinstance(oracle, str):
        return oracle
    for name in ("sqlstate", "pgcode"):
        state = getattr(error, name, None)
        if isinstance(state, str):
            return state
    if isinstance(first, str) and type(error).__module__ == "pyodbc":  # its SQLSTATE
        return first
    return None


def classify(error: BaseException, *, connecting: bool = False) -> Failure | None:
    """Say what one exception means, without looking at what it was raised from.

    Args:
        error: a SQLAlchemy wrapper or the driver's exception itself.
        connecting: it was raised while a connection was being made, where drivers often give no code at all.

    Returns:
        None where the exception does not come from a database.
    """
    if isinstance(error, StaleDataError):
        return Failure(Kind.STALE, None, error)
    invalidated = False
    if isinstance(error, DBAPIError):
        invalidated = error.connection_invalidated
        error = error.orig or error
    code = code_of(error)
    if code is None and isinstance(error.__cause__, Exception) and type(error).__module__ == _ADAPTER:
        error = error.__cause__
        code = code_of(error)
    if connecting:
        return _classify_connect(error, code)
    kind = _kind(error, code)
    # The code outranks the wrapper: hot-standby conflicts may close the connection, and are conflicts all the same.
    if invalidated and kind in (None, Kind.PERMANENT, Kind.NOT_STARTED, Kind.SERVER_TIMEOUT):
        kind = Kind.LOST
    return None if kind is None else Failure(kind, _spelled(error, code), error)


def _kind(error: BaseException, code: str | int | None) -> Kind | None:
    if code is None:
        return _kind_without_code(error)
    if hasattr(error, "sqlite_errorcode") and isinstance(code, int):
        return _SQLITE.get(code & 0xFF, Kind.PERMANENT)
    if isinstance(code, int):
        module = type(error).__module__
        return (_MSSQL if module.startswith("pymssql") else _ERRNOS).get(code, Kind.PERMANENT)
    if code.startswith("ORA-"):
        return _ORACLE.get(int(code[4:]), Kind.PERMANENT)
    if code in _STALE_IF_RAISED_BY and _raised_by(error) in _STALE_IF_RAISED_BY[code]:
        return Kind.STALE_PLAN
    return _SQLSTATES.get(code, Kind.LOST if code.startswith("08") else Kind.PERMANENT)


def _kind_without_code(error: BaseException) -> Kind | None:
    name = type(error).__name__
    if name == _CONFUSED:
        return Kind.LOST
    return Kind.STALE_PLAN if name == _OUTDATED else None


def _raised_by(error: BaseException) -> str | None:
    """Return the name of the function in PostgreSQL that raised it: a field of its message, as the code is."""
    for one, name in (
        (getattr(error, "diag", None), "source_function"),  # psycopg
        (error, "server_source_function"),  # asyncpg
        (error.__cause__, "server_source_function"),  # SQLAlchemy's error around it
    ):
        function = getattr(one, name, None)
        if isinstance(function, str):
            return function
    return None


def _classify_connect(error: BaseException, code: str | int | None) -> Failure | None:
    if code is None:
        # psycopg gives no SQLSTATE at connect and asyncpg raises plain OSError; programming errors stay what they are.
        of_driver = hasattr(error, "sqlstate") or _is_a(error, _OF_DRIVER)
        refused = isinstance(error, OSError) or (of_driver and not _is_a(error, _MISTAKES))
        return Failure(Kind.NOT_STARTED, None, error) if refused else None
    kind = _kind(error, code)
    # Not 08P01, though a startup parameter that is not supported has it: with PgBouncer, so has a server that is away or full.
    if kind in (Kind.PERMANENT, Kind.READ_ONLY):
        kind = Kind.PERMANENT
    elif kind is not Kind.CONFLICT:
        kind = Kind.NOT_STARTED
    return Failure(kind, _spelled(error, code), error)


def _is_a(error: BaseException, names: frozenset[str]) -> bool:
    return any(base.__name__ in names for base in type(error).__mro__)


def _spelled(error: BaseException, code: str | int | None) -> str | None:
    name = getattr(error, "sqlite_errorname", None)
    if isinstance(name, str):
        return name
    return None if code is None else str(code)


def hidden_conflict(error: BaseException) -> Failure | None:
    """Find the deadlock behind MariaDB's 1305 "SAVEPOINT does not exist": the server rolled back everything before."""
    if code_of(error) != _SAVEPOINT_GONE:
        return None
    for behind in chain(error):
        failure = classify(behind)
        if failure is not None and failure.kind in HARD:
            return failure
    return None


def chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception and all it came from: `orig`, `__cause__`, `__context__`, the members of a group.

    ``raise ... from None`` ends that branch: its author has said that the origin does not matter.
    """
    seen: set[int] = set()
    todo = [error]
    while todo:
        current = todo.pop()
        if id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        if current.__context__ is not None and not current.__suppress_context__:
            todo.append(current.__context__)
        if current.__cause__ is not None:
            todo.append(current.__cause__)
        orig = getattr(current, "orig", None)
        if isinstance(orig, BaseException):
            todo.append(orig)
        if isinstance(current, BaseExceptionGroup):
            todo.extend(cast("BaseExceptionGroup[BaseException]", current).exceptions)


_DONE = (AmbiguousCommitError, AfterCommitError)


def is_retryable(error: BaseException) -> bool:
    """Say whether `sqla_uow` would retry for this error if the caller's own unit had reported it.

    Use it in code outside a unit of work, such as a worker that decides whether to put its job back.  Three things are
    never retryable: an unknown outcome (`AmbiguousCommitError`, 40003, 08007), work that is committed
    (`AfterCommitError`, whatever its hooks met), and work that ran out of time.  A lost connection is retryable;
    outside a unit, rely on that only if you know that COMMIT was not sent yet.

    Args:
        error: any exception.  The exceptions that it was raised from are looked at too, but not past ``raise ... from
            None``.
    """
    links = list(chain(error))
    if isinstance(error, TransactionTimeoutError) or any(isinstance(link, _DONE) for link in links):
        return False
    if any(isinstance(link, ConflictError) for link in links):
        return True
    failures = [failure for link in links if not isinstance(link, UnitOfWorkError) and (failure := classify(link))]
    if any(failure.kind is Kind.AMBIGUOUS for failure in failures):
        return False
    return any(failure.retryable for failure in failures)
