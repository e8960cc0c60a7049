"""Isolation levels, their order, and how each database is told; SQLite's BEGIN."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, get_args

from sqlalchemy import text

from sqla_uow.typing import IsolationLevel

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection

    from sqla_uow._servers import Distributed

__all__ = [
    "begin_sqlite",
    "check_honoured",
    "check_level",
    "engine_options",
    "is_weaker_or_same",
    "lift_lock_wait",
    "limit_statement",
    "milliseconds",
    "opening",
    "restore_sqlite",
]

LEVELS: tuple[IsolationLevel, ...] = get_args(IsolationLevel)
"""Weakest first."""
_RANKS: dict[str, int] = {level: rank for rank, level in enumerate(LEVELS)}

# PostgreSQL accepts READ UNCOMMITTED and runs READ COMMITTED; SQLite has one level.  Neither is passed off as another.
# CockroachDB: what sqlalchemy-cockroachdb 2.0.4 can ask for.
_OFFERED: dict[str, tuple[IsolationLevel, ...]] = {
    "postgresql": LEVELS[1:],
    "cockroachdb": ("READ COMMITTED", "SERIALIZABLE"),
    "sqlite": ("SERIALIZABLE",),
}
_TRANSACTION_TIMEOUT_SINCE = (17,)  # PostgreSQL: transaction_timeout
# Bound, not written in: asyncpg would prepare each new text, a second round trip, and forget a statement of the user.
_STATEMENT_TIMEOUT = text("SELECT set_config('statement_timeout', :statement, true)")
_BOTH_TIMEOUTS = text(
    "SELECT set_config('statement_timeout', :statement, true), set_config('transaction_timeout', :late, true)"
)
_LIMITABLE = re.compile(r"\s*(SELECT|INSERT|UPDATE|DELETE|REPLACE|WITH)\b", re.IGNORECASE)


def check_level(dialect: str, isolation: object, *, who: str) -> None:
    """Refuse a level that does not exist, or that this database does not have.

    Args:
        dialect: its name.
        isolation: what was asked for.
        who: asks.

    Raises:
        ValueError: with what would be right.
    """
    if isolation is None:
        return
    if isolation not in LEVELS:
        raise ValueError(
            f"{who} asks for isolation {isolation!r}, which is no SQL level; use one of {', '.join(LEVELS)}"
        )
    offered = _OFFERED.get(dialect, LEVELS)
    if isolation not in offered:
        raise ValueError(
            f"{who} asks for isolation {isolation!r}, which {dialect} does not have; use {' or '.join(map(repr, offered))}"
        )


def check_honoured(connection: Connection, server: Distributed, isolation: IsolationLevel, *, who: str) -> None:
    """Refuse a level that the server has accepted and replaced by a stronger one, as its own settings may have it.

    Args:
        connection: of a transaction that was begun at the level, nothing sent yet.
        server: which it is.
        isolation: what was asked for.
        who: asks.

    Raises:
        ValueError: with what would be right.
    """
    runs = str(connection.exec_driver_sql(server.level).scalar_one()).upper()
    if runs != isolation:
        raise ValueError(
            f"{who} asks for isolation {isolation!r}, which this {server.name} runs as {runs}; {server.remedy}, or ask for {runs!r}"
        )


def is_weaker_or_same(asked: str, given: str) -> bool:
    """Say whether a unit at level `given` honours a call that asks for `asked`."""
    return _RANKS.get(asked, len(LEVELS)) <= _RANKS.get(given.replace("_", " ").replace("-", " ").upper(), -1)


def engine_options(family: str, isolation: IsolationLevel | None, *, read_only: bool) -> dict[str, Any]:
    """Return the execution options that make SQLAlchemy begin so, at no extra round trip, where it can."""
    options: dict[str, Any] = {}
    if family in ("mysql", "sqlite"):  # told in `opening`: SET SESSION would cost four round trips, PRAGMAs do nothing
        return options
    if isolation is not None:
        options["isolation_level"] = isolation
    if read_only and family == "postgresql":
        options["postgresql_readonly"] = True
    return options


def opening(
    connection: Connection,
    family: str,
    isolation: IsolationLevel | None,
    *,
    read_only: bool,
    seconds: float | None,
    lock_wait: float | None = None,
    server: Distributed | None = None,
) -> None:
    """Send what this transaction needs before its first statement.

    Args:
        connection: just begun, nothing sent yet.
        family: see `family_of`.
        isolation: the level, or None for the database's default.
        read_only: have the database refuse writes.
        seconds: what is left of the deadline, for the server to enforce as well.
        lock_wait: how long to wait for a lock, on PostgreSQL: it looks for deadlocks only after a second (deadlock_timeout).
        server: which one speaks as PostgreSQL does, if it is another.  It looks for deadlocks at once.
    """
    if family == "postgresql" and server is not None:
        if seconds is not None:  # set_config() for a transaction is not in its documentation
            connection.exec_driver_sql(f"SET LOCAL statement_timeout = '{milliseconds(seconds)}'")
    elif family == "postgresql":
        if seconds is not None:
            _limit_postgresql(connection, seconds)
        if lock_wait is not None:
            # SET, unlike SELECT set_config(), does not take the snapshot.
            connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{milliseconds(lock_wait)}'")
    elif family == "mysql":
        parts = [f"ISOLATION LEVEL {isolation}"] if isolation is not None else []
        parts += ["READ ONLY"] if read_only else []
        if parts:  # one shot: in force for the next transaction only, so nothing has to be set back
            connection.exec_driver_sql(f"SET TRANSACTION {', '.join(parts)}")
    elif family == "sqlite":
        _open_sqlite(connection, read_only=read_only, seconds=seconds)


def milliseconds(seconds: float) -> str:
    """Spell a time limit for PostgreSQL, where 0 would be none."""
    return f"{max(1, round(seconds * 1000))}ms"


def lift_lock_wait(connection: Connection) -> None:
    """Let the transaction wait for locks as long as its connection does by itself, as far as that is known."""
    own = connection.info.get("sqla_uow.limits", {}).get("lock_timeout")
    connection.exec_driver_sql(f"SET LOCAL lock_timeout = {'DEFAULT' if own is None else int(own)}")


def _limit_postgresql(connection: Connection, seconds: float) -> None:
    limits = {"statement": milliseconds(seconds)}
    settings = _STATEMENT_TIMEOUT
    if (connection.dialect.server_version_info or ()) >= _TRANSACTION_TIMEOUT_SINCE:
        # statement_timeout starts anew with each statement; this one ends the transaction if all else fails.
        limits["late"] = milliseconds(seconds + 1)
        settings = _BOTH_TIMEOUTS
    connection.execute(settings, limits)


def limit_statement(statement: str, seconds: float) -> str:
    """Give MariaDB what is left of the deadline with the statement itself: no round trip, nothing to set back."""
    if _LIMITABLE.match(statement) is None:
        return statement
    return f"SET STATEMENT max_statement_time={max(seconds, 0.001):.3f} FOR {statement}"


_BUSY_KEY = "sqla_uow.busy_timeout"
_QUERY_ONLY_KEY = "sqla_uow.query_only"


def _open_sqlite(connection: Connection, *, read_only: bool, seconds: float | None) -> None:
    info = connection.info
    if seconds is not None:
        info[_BUSY_KEY] = connection.exec_driver_sql("PRAGMA busy_timeout").scalar_one()
        connection.exec_driver_sql(f"PRAGMA busy_timeout={max(0, round(seconds * 1000))}")
    if read_only:
        info[_QUERY_ONLY_KEY] = True
        connection.exec_driver_sql("PRAGMA query_only=1")
    begin_sqlite(connection, read_only=read_only)


def begin_sqlite(connection: Connection, *, read_only: bool = False) -> None:
    """Begin a transaction: by itself the driver begins none before DDL or a SELECT."""
    raw: Any = connection.connection.driver_connection
    if not raw.in_transaction:  # else the user's own BEGIN recipe has spoken; two would be an error
        # IMMEDIATE: a writer that began as a reader fails with SQLITE_BUSY_SNAPSHOT, and waiting never helps it.
        connection.exec_driver_sql("BEGIN" if read_only else "BEGIN IMMEDIATE")


def restore_sqlite(dbapi_connection: Any, info: dict[str, Any]) -> None:
    """Undo what `opening` set on a pooled SQLite connection, before the next user gets it."""
    pragmas: list[str] = []
    if info.pop(_QUERY_ONLY_KEY, False):
        pragmas.append("PRAGMA query_only=0")
    if _BUSY_KEY in info:
        pragmas.append(f"PRAGMA busy_timeout={int(info.pop(_BUSY_KEY))}")
    for pragma in pragmas:
        cursor = dbapi_connection.cursor()
        cursor.execute(pragma)
        cursor.close()
