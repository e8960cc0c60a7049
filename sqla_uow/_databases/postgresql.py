"""PostgreSQL, and its drivers asyncpg and psycopg."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import socket
from typing import TYPE_CHECKING, Any, ClassVar

from sqlalchemy import text
from sqlalchemy.exc import StatementError
from sqlalchemy.util import await_only

from sqla_uow._databases.driver import Driver, Ended, RawCalls, State, cover, raw_connection
from sqla_uow._databases.failures import code_of
from sqla_uow._databases.levels import LEVELS
from sqla_uow._databases.system import System

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from sqlalchemy import TextClause
    from sqlalchemy.engine import Connection

    from sqla_uow._databases.system import Opening
    from sqla_uow.typing import IsolationLevel

__all__ = ["Asyncpg", "PostgreSQL", "Psycopg", "SpeaksPostgreSQL", "milliseconds"]

_TRANSACTION_TIMEOUT_SINCE = (17,)  # transaction_timeout
_IDLE = 0  # libpq's PQTRANS_IDLE
_OWN_LIMITS = "sqla_uow.limits"
_UNITS = {"ms": 1, "s": 1000, "min": 60_000, "h": 3_600_000, "d": 86_400_000}
# The inner unit may wait for a third one that waits for the outer one.
_BLOCKER = (
    "WITH RECURSIVE blocker(pid) AS (SELECT unnest(pg_blocking_pids({inner})) UNION SELECT further.pid FROM blocker "
    "CROSS JOIN LATERAL unnest(pg_blocking_pids(blocker.pid)) AS further(pid)) SELECT pid FROM blocker WHERE pid IN ({outer})"
)


class SpeaksPostgreSQL(System):
    """What PostgreSQL has in common with those in which its clients feel at home."""

    family: str = "postgresql"
    fails_whole: ClassVar[bool] = True
    writes_in_with: ClassVar[bool] = True
    quoted: ClassVar[re.Pattern[str] | None] = re.compile(
        r"'(?:[^']|'')*'|\"[^\"]*\"|\$(\w*)\$.*?\$\1\$|--[^\n]*|/\*.*?\*/", re.DOTALL
    )
    harmless_inside: ClassVar[tuple[str, ...]] = ("BEGIN", "START")

    def engine_options(self, isolation: IsolationLevel | None, *, read_only: bool) -> dict[str, Any]:
        """Return the level, and that it only reads: both go with the BEGIN."""
        options = super().engine_options(isolation, read_only=read_only)
        return {**options, "postgresql_readonly": True} if read_only else options


class PostgreSQL(SpeaksPostgreSQL):
    """PostgreSQL."""

    levels: ClassVar[tuple[IsolationLevel, ...]] = LEVELS[1:]  # READ UNCOMMITTED is accepted, and run as READ COMMITTED
    keeps_status: ClassVar[bool] = True
    limits_lock_wait: ClassVar[bool] = True
    has_settings: ClassVar[bool] = True
    has_positions: ClassVar[bool] = True
    has_xmin: ClassVar[bool] = True
    # How far the server has written, not flushed: with synchronous_commit=off, COMMIT is answered before its record is.
    primary_position: ClassVar[str] = "SELECT CAST(pg_current_wal_insert_lsn() AS text)"
    # A replica that was promoted goes on with positions of its own, which say nothing of the primary's.
    replica_position: ClassVar[str] = (
        "SELECT CASE WHEN pg_is_in_recovery() THEN CAST(pg_last_wal_replay_lsn() AS text) END"
    )
    blockers: ClassVar[tuple[str, ...]] = (_BLOCKER,)
    stop_session: ClassVar[str] = "SELECT pg_cancel_backend({inner})"

    def __init__(self, name: str = "postgresql") -> None:
        super().__init__(name)
        self.title: str = "PostgreSQL"

    def open(self, connection: Any, driver: Driver, unit: Opening) -> None:
        """Set the limits; the level was told with the BEGIN.  Deadlocks are looked for only after deadlock_timeout, a second."""
        if unit.read_only and driver.in_transaction(connection):  # a listener has sent SQL, so BEGIN as well
            connection.exec_driver_sql("SET TRANSACTION READ ONLY")
        seconds, lock_wait, settings = unit.seconds_left(), unit.lock_wait, unit.settings
        limits = None if seconds is None and lock_wait is None else _limits(connection, seconds, lock_wait)
        if settings:
            _tell(connection, limits or {}, settings)
        elif limits is not None and unit.keeps_snapshot():
            _set(connection, driver, limits)
        elif limits is not None:
            connection.execute(_lowering(tuple(limits)), limits)

    def lift_lock_wait(self, connection: Connection) -> None:
        """Set the connection's own limit again, as far as that is known."""
        own = connection.info.get(_OWN_LIMITS, {}).get("lock_timeout")
        connection.exec_driver_sql(f"SET LOCAL lock_timeout = {'DEFAULT' if own is None else int(own)}")

    def read_position(self, answer: str) -> Mapping[int, int]:
        """Read an LSN, as in ``"0/300B040"``."""
        high, low = answer.split("/")
        return {0: int(high, 16) << 32 | int(low, 16)}


def milliseconds(seconds: float) -> str:
    """Spell a time limit for PostgreSQL, where 0 would be none."""
    return f"{max(1, round(seconds * 1000))}ms"


def _limits(connection: Connection, seconds: float | None, lock_wait: float | None) -> dict[str, int]:
    """Return the settings for a deadline and for the wait for locks, in milliseconds."""
    limits: dict[str, int] = {}
    if seconds is not None:
        limits["statement_timeout"] = max(1, round(seconds * 1000))
        if (connection.dialect.server_version_info or ()) >= _TRANSACTION_TIMEOUT_SINCE:
            # statement_timeout starts again with each statement; this one ends the transaction if all else fails.
            limits["transaction_timeout"] = max(1, round((seconds + 1) * 1000))
    if lock_wait is not None:
        limits["lock_timeout"] = max(1, round(lock_wait * 1000))
    return limits


@functools.lru_cache(maxsize=16)
def _lowering(names: tuple[str, ...]) -> TextClause:
    """Return what sets limits for the transaction, except where the server's own are stricter, in one round trip."""
    # Bound, not written in: asyncpg would prepare each new text, a second round trip, and forget a statement of the user.
    return text("SELECT " + ", ".join(_lowered(name, f":{name}") for name in names))


def _lowered(name: str, bound: str) -> str:
    return (
        f"set_config('{name}', CASE WHEN extract(epoch FROM CAST(current_setting('{name}') AS interval)) * 1000 "
        f"BETWEEN 0.1 AND CAST({bound} AS integer) THEN current_setting('{name}') "
        f"ELSE CAST(CAST({bound} AS integer) AS text) END, true)"
    )


@functools.lru_cache(maxsize=128)
def _telling(limits: tuple[str, ...], settings: tuple[str, ...], *, numbered: bool) -> str:
    """Return what sets the same limits, and settings, as the driver itself wants it: SQLAlchemy's own way costs a fiftieth more."""
    bound = [f"${at}" if numbered else f"%(p{at})s" for at in range(1, len(limits) + len(settings) + 1)]
    lowered = [_lowered(name, one) for name, one in zip(limits, bound, strict=False)]
    told = [f"set_config('{name}', {one}, true)" for name, one in zip(settings, bound[len(limits) :], strict=True)]
    return "SELECT " + ", ".join(lowered + told)


def _tell(connection: Connection, limits: dict[str, int], settings: Mapping[str, str]) -> None:
    """Set what holds in this transaction, and the limits with it; no log and no error shows the values.

    This takes a snapshot, unlike SET; but what SET is told stands in its text.
    """
    values: tuple[Any, ...] = (*limits.values(), *settings.values())
    numbered = connection.dialect.paramstyle == "numeric_dollar"
    statement = _telling(tuple(limits), tuple(settings), numbered=numbered)
    engine: Any = connection.engine  # this unit's own
    shown, engine.hide_parameters = engine.hide_parameters, True
    try:
        connection.exec_driver_sql(
            statement, values if numbered else {f"p{at}": value for at, value in enumerate(values, 1)}
        )
    except StatementError as error:
        error.params = None
        raise
    finally:
        engine.hide_parameters = shown


def _set(connection: Connection, driver: Driver, limits: dict[str, int]) -> None:
    """Do the same by SET, which unlike SELECT takes no snapshot; nor does it compute."""
    # The connection's own limits are asked for once: each costs a round trip.
    own: dict[str, int] = connection.info.setdefault(_OWN_LIMITS, {})
    for name, ours in limits.items():
        if name not in own:
            own[name] = _in_milliseconds(str(connection.exec_driver_sql(f"SHOW {name}").scalar_one()))
        if 0 < own[name] < ours:
            limits[name] = own[name]
    driver.send_at_once(connection, "; ".join(f"SET LOCAL {name} = {value}" for name, value in limits.items()))


def _in_milliseconds(shown: str) -> int:
    """Read a time as PostgreSQL's SHOW writes it: "300ms", "5s", "0"."""
    number = shown.rstrip("abcdefghijklmnopqrstuvwxyz")
    return int(number) * _UNITS.get(shown[len(number) :], 1)


class _PostgreSQLDriver(Driver):
    """What asyncpg and psycopg share."""

    can_ask: ClassVar[bool] = True
    can_stop: ClassVar[bool] = True
    # https://www.postgresql.org/docs/current/errcodes-appendix.html: there is no such statement; there is one already.
    _UNPREPARED_STATES: ClassVar[tuple[str, ...]] = ("26000", "42P05")

    def explain(self, error: BaseException | None) -> None:
        """Name what has to be set behind a pooler that gives each transaction another session of the server."""
        if error is None or code_of(getattr(error, "orig", None) or error) not in self._UNPREPARED_STATES:
            return
        error.add_note(
            "prepared statements do not outlive a transaction behind a pooler such as PgBouncer in transaction mode; pass "
            f"connect_args={self.unprepared} to create_async_engine()"
        )


class Asyncpg(_PostgreSQLDriver):
    """asyncpg.  SQLAlchemy's adapter begins with its own first statement only."""

    name: ClassVar[str] = "asyncpg"
    bound_to_loop: ClassVar[bool] = True
    knows_failure: ClassVar[bool] = False
    renews_plans: ClassVar[bool] = True
    unprepared: ClassVar[dict[str, Any]] = {"statement_cache_size": 0}

    def is_open(self, raw: Any) -> bool:
        """Say whether the driver still believes in its connection."""
        return not raw.is_closed()

    def version(self, raw: Any) -> str:
        """Return what the server has called its version when it was connected to."""
        return str(raw.get_settings().server_version)

    def session_number(self, raw: Any) -> int | None:
        """Return the process of the server, or what a pooler has made up for it."""
        return int(raw.get_server_pid())

    def set_back(self, lent: Any) -> Callable[[Any], None] | None:
        """Return what sets the adapter back: SQLAlchemy would say READ WRITE where nothing was said."""
        level, only_reads = lent.dbapi_connection.isolation_level, lent.dbapi_connection.readonly

        def set_back(adapted: Any) -> None:
            adapted.set_isolation_level(level)
            adapted.readonly = only_reads

        return set_back

    @staticmethod
    def is_idle(raw: Any) -> bool:
        """Say whether surely no transaction is open."""
        return raw._top_xact is None and not raw.is_in_transaction()

    def state(self, raw: Any) -> State | None:
        """Say where the transaction stands; that it has failed, only the server knows."""
        if raw is None or raw.is_closed():
            return None
        return State.OPEN if raw.is_in_transaction() else State.NONE

    def is_fit(self, raw: Any) -> bool:
        """Say whether a transaction can begin: what asyncpg remembers of a BEGIN that was refused keeps every later one from it."""
        return self.state(raw) is State.NONE and raw._top_xact is None

    def in_autocommit(self, connection: Any) -> bool:
        """Say whether the adapter begins no transaction."""
        return bool(connection._dbapi_connection.dbapi_connection.isolation_level == "autocommit")

    def watch(self, raw: Any) -> Callable[[bool], Ended | None] | None:
        """Return what sees that a statement has ended the transaction."""
        is_open = raw.is_in_transaction
        return lambda _wrote: None if is_open() else Ended.ENDED

    def begin_now(self, connection: Connection) -> None:
        """Have the adapter begin."""
        lent: Any = connection._dbapi_connection
        if not raw_connection(connection).is_in_transaction():
            await_only(lent.dbapi_connection._start_transaction())

    def listen_to_commit(self, connection: Connection) -> Any:
        """Put a `CommitAnswer` under the adapter's transaction."""
        lent: Any = connection._dbapi_connection
        transaction = getattr(lent.dbapi_connection, "_transaction", None)
        if transaction is None:
            return None
        transaction._connection = answer = CommitAnswer(transaction._connection)
        return answer

    def send_at_once(self, connection: Any, sql: str) -> None:
        """Send past the cursor, which would prepare the text first."""
        lent: Any = connection._dbapi_connection
        connection.transaction.before_statement(writes=False)
        try:
            await_only(_send(lent.dbapi_connection, lent.driver_connection, sql))
        except Exception as error:  # handled like the errors of a cursor; there is no public way
            connection._handle_dbapi_exception(error, sql, None, None, None)
        connection.transaction.after_statement()

    async def ask(self, raw: Any, question: str) -> Any:
        """Return the one value of the answer."""
        return await raw.fetchval(question)

    def tell_raw_calls(self, raw: Any, calls: RawCalls) -> Callable[[], object]:
        """Listen to the driver's own log: the connection takes no attributes.

        The log comes one turn of the loop later, before the next answer.
        """

        def sent(logged: Any) -> None:
            if logged.exception is None:
                calls.raw_sent(logged.query)
            else:
                calls.raw_failed(logged.exception)

        raw.add_query_logger(sent)
        return lambda: raw.remove_query_logger(sent)

    async def stop(self, raw: Any, connection: Connection, cursor: Any, seconds: float) -> None:
        """Close, which waits for the driver's own cancel request and then says goodbye."""
        await raw.close(timeout=seconds / 2)

    def break_link(self, raw: Any) -> bool:
        """Drop the connection: close() waits for an answer, and whoever gives up on it leaves the connection open."""
        raw.terminate()
        return True


async def _send(adapted: Any, raw: Any, sql: str) -> None:
    async with adapted._execute_mutex:
        if not raw.is_in_transaction():
            await adapted._start_transaction()  # as its cursors do before the first statement
        try:
            await raw.execute(sql)
        except Exception as error:
            adapted._handle_exception(error)


class CommitAnswer:
    """asyncpg's connection as its transaction sees it at COMMIT: keeps the server's answer, which the transaction drops."""

    __slots__ = ("_pool_release_ctr", "_raw", "_top_xact", "tag")  # what the transaction looks at, and nothing else

    def __init__(self, raw: Any) -> None:
        self._raw = raw
        self._pool_release_ctr: int = raw._pool_release_ctr
        self._top_xact: Any = raw._top_xact
        self.tag: str | None = None

    async def execute(self, query: str) -> str:
        self._raw._top_xact = self._top_xact
        self.tag = tag = await self._raw.execute(query)
        return str(tag)

    def is_closed(self) -> bool:
        return bool(self._raw.is_closed())


class Psycopg(_PostgreSQLDriver):
    """psycopg 3, which asks libpq: that keeps the state of the last ReadyForQuery."""

    name: ClassVar[str] = "psycopg"
    warns_of_cursors: ClassVar[bool] = True
    keeps_cancel_requests: ClassVar[bool] = True
    unprepared: ClassVar[dict[str, Any]] = {"prepare_threshold": None}
    _CANCEL: ClassVar[str] = "sqla_uow.cancel"
    # libpq's PGTransactionStatusType: idle, active, in a transaction, in a failed one; 4 is unknown
    _STATES: ClassVar[dict[int, State]] = {_IDLE: State.NONE, 1: State.BUSY, 2: State.OPEN, 3: State.FAILED}

    def session_number(self, raw: Any) -> int | None:
        """Return the process of the server, or what a pooler has made up for it."""
        return int(raw.pgconn.backend_pid)

    def set_back(self, lent: Any) -> Callable[[Any], None] | None:
        """Return what sets the connection back: SQLAlchemy would say READ WRITE where nothing was said.

        A hot standby refuses that, and a role that only reads by default would write.
        """
        raw = lent.driver_connection
        level, only_reads = raw.isolation_level, raw.read_only

        def set_back(adapted: Any) -> None:
            if raw.closed:
                return
            if raw.isolation_level != level:
                adapted.set_isolation_level(level)
            if raw.read_only != only_reads:
                adapted.set_read_only(only_reads)

        return set_back

    @staticmethod
    def is_idle(raw: Any) -> bool:
        """Say whether surely no transaction is open."""
        return raw.pgconn.transaction_status == _IDLE and not raw.pgconn.pipeline_status

    def state(self, raw: Any) -> State | None:
        """Say where the transaction stands."""
        return None if raw is None else self._STATES.get(raw.pgconn.transaction_status)

    def is_fit(self, raw: Any) -> bool:
        """Say whether a transaction can begin; with a pipeline left on, answers would reach the wrong statements."""
        return self.state(raw) is State.NONE and not raw.pgconn.pipeline_status

    def in_autocommit(self, connection: Any) -> bool:
        """Say what the driver was told."""
        return bool(connection.raw.autocommit)

    def switched_to_autocommit(self, raw: Any) -> bool:
        """Say what the driver was told."""
        return bool(raw.autocommit)

    def watch(self, raw: Any) -> Callable[[bool], Ended | None] | None:
        """Return what sees that a statement has ended the transaction."""
        link = raw.pgconn
        return lambda _wrote: Ended.ENDED if link.transaction_status == _IDLE else None

    async def ask(self, raw: Any, question: str) -> Any:
        """Return the one value of the answer, in a moment of autocommit; the server is not told of that."""
        await raw.set_autocommit(True)
        try:
            cursor = await raw.execute(question)
            return (await cursor.fetchone())[0]
        finally:
            await raw.set_autocommit(False)

    def tell_raw_calls(self, raw: Any, calls: RawCalls) -> Callable[[], object]:
        """Look at the transaction after each wait for the server: all of the driver's operations are made of such."""
        wait: Callable[..., Awaitable[Any]] = raw.wait

        async def waiting(*args: Any, **kwargs: Any) -> Any:
            try:
                result = await wait(*args, **kwargs)
            except Exception as error:
                calls.raw_failed(error)
                raise
            calls.raw_sent("")
            return result

        return cover(raw, {"wait": waiting})

    def keep_cancel_request(self, connection: Connection) -> None:
        """Keep one: psycopg 3.3 forgets its own when it is interrupted again, as anyio does in every turn of the loop."""
        if self._CANCEL in connection.info:
            return
        raw: Any = raw_connection(connection)
        try:
            connection.info[self._CANCEL] = raw.pgconn.cancel_conn()
        except raw.NotSupportedError:  # libpq before 17; its way to cancel would block the loop
            connection.info[self._CANCEL] = None

    async def stop(self, raw: Any, connection: Connection, cursor: Any, seconds: float) -> None:
        """Send a cancel request."""
        request = connection.info[self._CANCEL]
        if not raw.closed:
            await raw.cancel_safe(timeout=seconds / 2)
        elif request is not None:
            from psycopg import generators, waiting  # noqa: PLC0415  # loaded, as this is its connection

            request.start()
            await waiting.wait_conn_async(generators.cancel(request), interval=0.1)

    def break_link(self, raw: Any) -> bool:
        """Shut the socket down.

        The connection must not be closed under an operation: psycopg's C code reads freed memory when that wakes up (SIGSEGV
        with 3.3.9).
        """
        if raw.closed:
            return False
        with socket.socket(fileno=os.dup(raw.fileno())) as link, contextlib.suppress(OSError):  # gone already
            link.shutdown(socket.SHUT_RDWR)
        return True
