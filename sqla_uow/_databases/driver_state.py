"""What the driver knows of its connection's transaction; the server has told it with each answer, and is not asked.

PostgreSQL's drivers keep the state of the last ReadyForQuery, MariaDB's the status flags of the last OK or EOF packet,
sqlite3 asks the library.  asyncmy passes over flags that are all zero, so what its last result says is looked at as well;
aiomysql does not read the flags behind rows.
"""

from __future__ import annotations

import enum
from sqlite3 import ProgrammingError
from typing import TYPE_CHECKING, Any

from sqlalchemy.util import await_only

from sqla_uow._databases.driver import raw_connection

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "Ended",
    "State",
    "idle_check",
    "in_autocommit",
    "in_transaction",
    "is_fit",
    "state_of",
    "switched_to_autocommit",
    "watch",
]

# https://mariadb.com/kb/en/ok_packet/
_IN_TRANSACTION, _AUTOCOMMIT = 1, 2
_IDLE = 0  # libpq's PQTRANS_IDLE


class State(enum.Enum):
    """Where the driver says that its transaction stands."""

    NONE = "none"
    OPEN = "open"
    FAILED = "failed"  # PostgreSQL would answer COMMIT by ROLLBACK
    BUSY = "busy"  # with what is still under way


class Ended(enum.Enum):
    """What a statement did to the transaction that it was sent in."""

    ENDED = "it was ended"
    MAYBE = "more statements follow in the same text, whose answers nobody has read yet"
    AUTOCOMMIT = "the connection was switched to autocommit"


def in_autocommit(connection: Any) -> bool:
    """Say whether each statement on a unit's connection commits by itself."""
    driver, raw = connection.dialect.driver, connection.raw
    if driver == "asyncpg":
        return bool(connection._dbapi_connection.dbapi_connection.isolation_level == "autocommit")  # the adapter's
    if driver == "psycopg":
        return bool(raw.autocommit)
    if driver == "aiosqlite":
        return _sqlite_autocommits(raw)
    if driver in _FLAGS:
        return _agree(raw, _AUTOCOMMIT)
    return False


def switched_to_autocommit(driver: str, raw: Any) -> bool:
    """Say whether the driver's own connection, which was in a unit, now commits each statement by itself."""
    if driver == "psycopg":
        return bool(raw.autocommit)
    return driver in _FLAGS and _agree(raw, _AUTOCOMMIT)


def _sqlite_autocommits(raw: Any) -> bool:
    # Since Python 3.12; the default is -1, which is no truth value.
    try:
        return getattr(raw._conn, "autocommit", None) is True
    except ProgrammingError:  # in memory: only the driver's own thread may ask
        return bool(await_only(raw._execute(lambda: getattr(raw._conn, "autocommit", None) is True)))


def state_of(driver: str, raw: Any) -> State | None:
    """Ask the driver's own connection; None where it cannot tell, or where it is gone."""
    ask = _STATES.get(driver)
    return None if ask is None or raw is None else ask(raw)


def in_transaction(connection: Any) -> bool:
    """Say whether a transaction is open on a unit's connection, before anything was sent on it here."""
    return state_of(connection.dialect.driver, raw_connection(connection)) in (State.OPEN, State.FAILED, State.BUSY)


def idle_check(driver: str) -> Callable[[Any], bool]:
    """Return what says quickly, of nearly every connection, that it is in no transaction and can begin one."""
    return _IDLE_CHECKS.get(driver, lambda _: False)


_IDLE_CHECKS: dict[str, Callable[[Any], bool]] = {
    "asyncpg": lambda raw: not raw.is_closed() and raw._top_xact is None and not raw.is_in_transaction(),
    "psycopg": lambda raw: raw.pgconn.transaction_status == _IDLE and not raw.pgconn.pipeline_status,
}


def is_fit(driver: str, raw: Any) -> bool:
    """Say whether the next user of the connection can begin a transaction on it."""
    if driver in _STATES and state_of(driver, raw) is not State.NONE:
        return False
    if driver == "psycopg" and raw.pgconn.pipeline_status:  # left on: answers would reach the wrong statements
        return False
    # What asyncpg remembers of a BEGIN that was refused keeps every later one from beginning.
    return driver != "asyncpg" or raw._top_xact is None


def _state_asyncpg(raw: Any) -> State | None:
    if raw.is_closed():
        return None
    return State.OPEN if raw.is_in_transaction() else State.NONE


# libpq's PGTransactionStatusType: idle, active, in a transaction, in a failed one; 4 is unknown
_LIBPQ = {_IDLE: State.NONE, 1: State.BUSY, 2: State.OPEN, 3: State.FAILED}


def _state_psycopg(raw: Any) -> State | None:
    return _LIBPQ.get(raw.pgconn.transaction_status)


def _state_mysql(raw: Any) -> State | None:
    return State.OPEN if _agree(raw, _IN_TRANSACTION) else State.NONE


def _state_aiosqlite(raw: Any) -> State | None:
    try:
        return State.OPEN if raw.in_transaction else State.NONE
    except ValueError:  # closed
        return None


_STATES: dict[str, Callable[[Any], State | None]] = {
    "asyncpg": _state_asyncpg,
    "psycopg": _state_psycopg,
    "asyncmy": _state_mysql,
    "aiomysql": _state_mysql,
    "aiosqlite": _state_aiosqlite,
}


def _agree(raw: Any, flag: int) -> bool:
    """Say whether all that knows flags says so: either may be older than the other."""
    result = raw._result
    latest = None if result is None or result.unbuffered_active else result.server_status
    return bool((raw.server_status or 0) & flag) and (latest is None or bool(latest & flag))


def watch(connection: Any) -> Callable[[bool], Ended | None] | None:
    """Return what says, after each statement, what that did to the transaction; None for other drivers.

    It is told whether the unit has written rows, so that there is something that could be committed behind its back.
    """
    make = _WATCHES.get(connection.dialect.driver)
    return None if make is None else make(connection.raw)


def _asyncpg(raw: Any) -> Callable[[bool], Ended | None]:
    is_open = raw.is_in_transaction
    return lambda _wrote: None if is_open() else Ended.ENDED


def _psycopg(raw: Any) -> Callable[[bool], Ended | None]:
    link = raw.pgconn
    return lambda _wrote: Ended.ENDED if link.transaction_status == _IDLE else None


def _aiosqlite(raw: Any) -> Callable[[bool], Ended | None]:
    return lambda _wrote: None if raw.in_transaction else Ended.ENDED


def _mysql(driver: str) -> Callable[[Any], Callable[[bool], Ended | None]]:
    flags_of = _FLAGS[driver]

    def make(raw: Any) -> Callable[[bool], Ended | None]:
        was_open = False

        def look(wrote: bool) -> Ended | None:  # noqa: FBT001  # called for each statement
            nonlocal was_open
            flags = flags_of(raw)
            if flags is None:
                return None
            result = raw._result
            if result is not None and result.has_next:
                return Ended.MAYBE
            if flags & _AUTOCOMMIT:
                return Ended.AUTOCOMMIT
            before, was_open = was_open, bool(flags & _IN_TRANSACTION)
            # It begins by itself with the first statement that needs one.
            return Ended.ENDED if before and not was_open and wrote else None

        return look

    return make


def _flags_asyncmy(raw: Any) -> int | None:
    result = raw._result
    return None if result is None or result.unbuffered_active else result.server_status


def _flags_aiomysql(raw: Any) -> int | None:
    flags: int | None = raw.server_status
    return flags


_FLAGS: dict[str, Callable[[Any], int | None]] = {"asyncmy": _flags_asyncmy, "aiomysql": _flags_aiomysql}
_WATCHES: dict[str, Callable[[Any], Callable[[bool], Ended | None]]] = {
    "asyncpg": _asyncpg,
    "psycopg": _psycopg,
    "aiosqlite": _aiosqlite,
    "asyncmy": _mysql("asyncmy"),
    "aiomysql": _mysql("aiomysql"),
}
