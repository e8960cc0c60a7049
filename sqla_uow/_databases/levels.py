"""Isolation levels, their order, and how each database is told; SQLite's BEGIN."""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING, Any, get_args

from sqlalchemy import text
from sqlalchemy.util import await_only

from sqla_uow._databases.driver import raw_connection
from sqla_uow._databases.driver_state import in_transaction
from sqla_uow.typing import IsolationLevel

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy import TextClause
    from sqlalchemy.engine import Connection

    from sqla_uow._databases.distributed import Distributed

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
    "send_at_once",
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
    return _RANKS.get(asked, len(LEVELS)) <= _RANKS.get(given.replace("_", " ").upper(), -1)


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
    keeps_snapshot: Callable[[IsolationLevel | None], bool] = lambda _: False,
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
        keeps_snapshot: says whether at this level the first query decides what all see, so that it must be one of the body's.
        server: which one speaks as PostgreSQL does, if it is another.  It looks for deadlocks at once.
    """
    if family == "postgresql" and server is not None:
        if seconds is not None:  # set_config() for a transaction is not in its documentation
            connection.exec_driver_sql(f"SET LOCAL statement_timeout = '{milliseconds(seconds)}'")
    elif family == "postgresql":
        if read_only and in_transaction(connection):  # a listener has sent SQL, so BEGIN as well
            connection.exec_driver_sql("SET TRANSACTION READ ONLY")
        if seconds is not None or lock_wait is not None:
            _limit_postgresql(
                connection, _limits(connection, seconds, lock_wait), keeps_snapshot=keeps_snapshot(isolation)
            )
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


def _limits(connection: Connection, seconds: float | None, lock_wait: float | None) -> dict[str, int]:
    """Return PostgreSQL's settings for a deadline and for the wait for locks, in milliseconds."""
    limits: dict[str, int] = {}
    if seconds is not None:
        limits["statement_timeout"] = max(1, round(seconds * 1000))
        if (connection.dialect.server_version_info or ()) >= _TRANSACTION_TIMEOUT_SINCE:
            # statement_timeout starts anew with each statement; this one ends the transaction if all else fails.
            limits["transaction_timeout"] = max(1, round((seconds + 1) * 1000))
    if lock_wait is not None:
        limits["lock_timeout"] = max(1, round(lock_wait * 1000))
    return limits


def _limit_postgresql(connection: Connection, limits: dict[str, int], *, keeps_snapshot: bool) -> None:
    """Set limits for the transaction, but where the server's own are stricter, in one round trip."""
    if not keeps_snapshot:
        connection.execute(_lowering(tuple(limits)), limits)
        return
    # SET, unlike SELECT, takes no snapshot; nor does it compute.
    own = _own_limits(connection)
    for name, ours in limits.items():
        if name not in own:
            own[name] = _in_milliseconds(str(connection.exec_driver_sql(f"SHOW {name}").scalar_one()))
        if 0 < own[name] < ours:
            limits[name] = own[name]
    send_at_once(connection, "; ".join(f"SET LOCAL {name} = {value}" for name, value in limits.items()))


@functools.lru_cache(maxsize=16)
def _lowering(names: tuple[str, ...]) -> TextClause:
    # Bound, not written in: asyncpg would prepare each new text, a second round trip, and forget a statement of the user.
    return text(
        "SELECT "  # noqa: S608  # the names are ours
        + ", ".join(
            f"set_config('{name}', CASE WHEN extract(epoch FROM CAST(current_setting('{name}') AS interval)) * 1000 "
            f"BETWEEN 0.1 AND CAST(:{name} AS integer) THEN current_setting('{name}') "
            f"ELSE CAST(CAST(:{name} AS integer) AS text) END, true)"
            for name in names
        )
    )


_OWN_LIMITS = "sqla_uow.limits"
_UNITS = {"ms": 1, "s": 1000, "min": 60_000, "h": 3_600_000, "d": 86_400_000}


def _own_limits(connection: Connection) -> dict[str, int]:
    """Return what is known of the limits that a connection has by itself; asked once, as it costs a round trip each."""
    own: dict[str, int] = connection.info.setdefault(_OWN_LIMITS, {})
    return own


def _in_milliseconds(shown: str) -> int:
    """Read a time as PostgreSQL's SHOW writes it: "300ms", "5s", "0"."""
    number = shown.rstrip("abcdefghijklmnopqrstuvwxyz")
    return int(number) * _UNITS.get(shown[len(number) :], 1)


def send_at_once(connection: Any, sql: str) -> None:
    """Send what returns nothing in one round trip: asyncpg would prepare it first."""
    if connection.dialect.driver != "asyncpg":
        connection.exec_driver_sql(sql)
        return
    lent: Any = connection._dbapi_connection
    connection.unit.before_statement(writes=False)
    try:
        await_only(_send_asyncpg(lent.dbapi_connection, lent.driver_connection, sql))
    except Exception as error:  # as those of a cursor are handled; there is no public way
        connection._handle_dbapi_exception(error, sql, None, None, None)
    connection.unit.after_statement()


async def _send_asyncpg(adapted: Any, raw: Any, sql: str) -> None:
    async with adapted._execute_mutex:
        if not raw.is_in_transaction():
            await adapted._start_transaction()  # as its cursors do before the first statement
        try:
            await raw.execute(sql)
        except Exception as error:
            adapted._handle_exception(error)


def lift_lock_wait(connection: Connection) -> None:
    """Let the transaction wait for locks as long as its connection does by itself, as far as that is known."""
    own = connection.info.get("sqla_uow.limits", {}).get("lock_timeout")
    connection.exec_driver_sql(f"SET LOCAL lock_timeout = {'DEFAULT' if own is None else int(own)}")


def limit_statement(statement: str, seconds: float) -> str:
    """Give MariaDB what is left of the deadline with the statement itself: no round trip, nothing to set back."""
    if _LIMITABLE.match(statement) is None:
        return statement
    ours, server = f"{max(seconds, 0.001):.3f}", "@@max_statement_time"  # where it has a stricter limit, that stays
    return (
        f"SET STATEMENT max_statement_time=IF({server} BETWEEN 0.000001 AND {ours}, {server}, {ours}) FOR {statement}"
    )


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
    raw: Any = raw_connection(connection)
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
