"""SQLite, and its driver aiosqlite."""

from __future__ import annotations

import asyncio
import re
import weakref
from sqlite3 import ProgrammingError
from typing import TYPE_CHECKING, Any, ClassVar

from sqlalchemy.pool import StaticPool
from sqlalchemy.util import await_only, greenlet_spawn

from sqla_uow._databases.driver import Driver, Ended, RawCalls, State, cover, raw_connection, told
from sqla_uow._databases.system import System
from sqla_uow._databases.writer_queue import WriterQueue

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy.engine import Connection
    from sqlalchemy.pool import Pool

    from sqla_uow._databases.system import Opening
    from sqla_uow.typing import IsolationLevel

__all__ = ["Aiosqlite", "SQLite", "begin"]

INTERRUPT_SECONDS = 0.05
"""How often SQLite is told to stop."""
_BUSY_KEY = "sqla_uow.busy_timeout"
_QUERY_ONLY_KEY = "sqla_uow.query_only"
_queues: weakref.WeakKeyDictionary[Pool, WriterQueue] = weakref.WeakKeyDictionary()


class SQLite(System):
    """SQLite: one writer, one isolation level, and settings that stay on a connection."""

    family: str = "sqlite"
    levels: ClassVar[tuple[IsolationLevel, ...]] = ("SERIALIZABLE",)  # which is not passed off as another
    default_level: ClassVar[str | None] = "SERIALIZABLE"
    begins_by_sql: ClassVar[bool] = True
    lends_open: ClassVar[bool] = True
    sets_back: ClassVar[bool] = True
    queues_writers: ClassVar[bool] = True
    quoted: ClassVar[re.Pattern[str] | None] = re.compile(
        r"'(?:[^']|'')*'|\"[^\"]*\"|`[^`]*`|\[[^\]]*\]|--[^\n]*|/\*.*?\*/", re.DOTALL
    )
    harmless_inside: ClassVar[tuple[str, ...]] = ("BEGIN", "START")

    def __init__(self, name: str = "sqlite") -> None:
        super().__init__(name)
        self.title: str = "SQLite"

    def engine_options(self, isolation: IsolationLevel | None, *, read_only: bool) -> dict[str, Any]:
        """Return none: SQLAlchemy's PRAGMA would do nothing."""
        return {}

    def open(self, connection: Any, driver: Driver, unit: Opening) -> None:
        """Set what has no end of its own, and begin."""
        info, seconds = connection.info, unit.seconds_left()
        if seconds is not None:
            info[_BUSY_KEY] = connection.exec_driver_sql("PRAGMA busy_timeout").scalar_one()
            connection.exec_driver_sql(f"PRAGMA busy_timeout={max(0, round(seconds * 1000))}")
        if unit.read_only:
            info[_QUERY_ONLY_KEY] = True
            connection.exec_driver_sql("PRAGMA query_only=1")
        begin(connection, read_only=unit.read_only)

    @staticmethod
    def restore(dbapi_connection: Any, info: dict[Any, Any]) -> None:
        """Set the connection back as it was before `open`."""
        pragmas: list[str] = []
        if info.pop(_QUERY_ONLY_KEY, False):
            pragmas.append("PRAGMA query_only=0")
        if _BUSY_KEY in info:
            pragmas.append(f"PRAGMA busy_timeout={int(info.pop(_BUSY_KEY))}")
        for pragma in pragmas:
            cursor = dbapi_connection.cursor()
            cursor.execute(pragma)
            cursor.close()

    def writer_queue(self, pool: Pool) -> WriterQueue:
        """Return the queue of the pool's writers; of all its users, where they share one connection."""
        queue = _queues.get(pool)
        if queue is None:
            queue = _queues[pool] = WriterQueue(everyone=isinstance(pool, StaticPool))
        return queue


def begin(connection: Connection, *, read_only: bool) -> None:
    """Begin a transaction: the driver does not begin one before DDL or a SELECT."""
    raw: Any = raw_connection(connection)
    if not raw.in_transaction:  # else the user's own BEGIN recipe has spoken; two would be an error
        # IMMEDIATE: a writer that began as a reader fails with SQLITE_BUSY_SNAPSHOT, and waiting never helps it.
        connection.exec_driver_sql("BEGIN" if read_only else "BEGIN IMMEDIATE")


class Aiosqlite(Driver):
    """aiosqlite, which asks the library."""

    name: ClassVar[str] = "aiosqlite"
    says_closed: ClassVar[bool] = False
    can_stop: ClassVar[bool] = True

    def state(self, raw: Any) -> State | None:
        """Say where the transaction stands."""
        if raw is None:
            return None
        try:
            return State.OPEN if raw.in_transaction else State.NONE
        except ValueError:  # closed
            return None

    def is_fit(self, raw: Any) -> bool:
        """Say whether the connection is open and in no transaction."""
        return self.state(raw) is State.NONE

    def in_autocommit(self, connection: Any) -> bool:
        """Say whether the connection was made with ``autocommit=True``, which Python 3.12 and later have."""
        raw = connection.raw
        try:
            return _autocommits(raw)
        except ProgrammingError:  # in memory: only the driver's own thread may ask
            return bool(await_only(raw._execute(lambda: _autocommits(raw))))

    def watch(self, raw: Any) -> Callable[[bool], Ended | None] | None:
        """Return what sees that a statement has ended the transaction."""
        return lambda _wrote: None if raw.in_transaction else Ended.ENDED

    def tell_raw_calls(self, raw: Any, calls: RawCalls) -> Callable[[], object]:
        """Cover the one method that everything comes by."""
        return cover(raw, {"_execute": told("_execute", raw._execute, calls)})

    async def stop(self, raw: Any, connection: Connection, cursor: Any, seconds: float) -> None:
        """Interrupt the statement, roll back and close: a cursor left behind would hold the write lock until it is collected."""
        over = asyncio.ensure_future(_end_of_statement(raw, cursor))
        # Interrupt what is still running, and nothing else: SQLite goes on interrupting, ROLLBACK too, until every SELECT
        # that has begun is reset, and SQLAlchemy 2.0 gives us no way to its cursor.  A ROLLBACK that fails leaves the lock.
        while not (await asyncio.wait({over}, timeout=INTERRUPT_SECONDS))[0]:
            await raw.interrupt()
        try:
            await over
            await raw.rollback()
        finally:
            await raw.close()  # here, where nothing cancels it: aiosqlite cannot finish a close that was cut off


def _autocommits(raw: Any) -> bool:
    return getattr(raw._conn, "autocommit", None) is True  # the default is -1, which is not a truth value


async def _end_of_statement(raw: Any, cursor: Any) -> None:
    """Wait in the driver's queue, with what runs nothing, for the statement to end."""
    if cursor is not None:
        await greenlet_spawn(cursor.close)
    await raw.execute("")
