"""One engine, and what is known of its server."""

from __future__ import annotations

import asyncio
import weakref
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sqlalchemy.pool import NullPool
from sqlalchemy.util import await_only

from sqla_uow._databases.distributed import CockroachDB, UnconfirmedPostgreSQL
from sqla_uow._databases.driver import Driver, raw_connection
from sqla_uow._databases.levels import is_weaker_or_same
from sqla_uow._databases.mariadb import Aiomysql, Asyncmy, MariaDB, MySQL
from sqla_uow._databases.postgresql import Asyncpg, Psycopg
from sqla_uow._databases.sqlite import Aiosqlite, SQLite
from sqla_uow._databases.system import System
from sqla_uow.errors import TaskBoundaryError

if TYPE_CHECKING:
    from collections.abc import Generator

    from sqlalchemy.engine import Connection, Dialect, Engine
    from sqlalchemy.ext.asyncio import AsyncEngine
    from sqlalchemy.pool import Pool

    from sqla_uow._databases.writer_queue import WriterQueue
    from sqla_uow.typing import IsolationLevel

__all__ = [
    "WITHIN",
    "Database",
    "driver_named",
    "driver_of",
    "drivers_that_ask",
    "family_of",
    "recognised",
    "system_of",
]

WITHIN = "sqla_uow_within"
"""Option of an engine whose transactions are savepoints of a larger one: the name of whoever ends that."""

_owners: weakref.WeakKeyDictionary[Pool, weakref.ref[asyncio.AbstractEventLoop]] = weakref.WeakKeyDictionary()
FIRST_LOOK_SECONDS = 0.002
"""Pause between two looks whether another event loop has made the first connection."""
_SYSTEMS: dict[str, type[SQLite | MySQL | UnconfirmedPostgreSQL | CockroachDB]] = {
    "postgresql": UnconfirmedPostgreSQL,
    "cockroachdb": CockroachDB,
    "mysql": MySQL,
    "mariadb": MariaDB,
    "sqlite": SQLite,
}
_DRIVERS: dict[str, Driver] = {
    driver.name: driver for driver in (Asyncpg(), Psycopg(), Asyncmy(), Aiomysql(), Aiosqlite())
}
_UNKNOWN_DRIVER = Driver()


def system_of(dialect: Dialect) -> System:
    """Return what is known of a dialect's database before anybody has connected; `System.recognise` knows more."""
    if getattr(dialect, "is_mariadb", False):  # under "mysql" SQLAlchemy finds out with the first connection
        return MariaDB()
    make = _SYSTEMS.get(dialect.name)
    return System(dialect.name) if make is None else make()


def family_of(dialect: Dialect) -> str:
    """Return which way of speaking this dialect needs; its own name where it has none of the three."""
    system = _SYSTEMS.get(dialect.name)
    return dialect.name if system is None else system.family


def recognised(connection: Connection) -> System:
    """Return which database a connection leads to; nothing is sent."""
    return system_of(connection.dialect).recognise(connection, driver_of(connection.dialect))


def driver_of(dialect: Dialect) -> Driver:
    """Return what is known of a dialect's driver."""
    return driver_named(dialect.driver)


def driver_named(name: str) -> Driver:
    """Return what is known of a driver."""
    return _DRIVERS.get(name, _UNKNOWN_DRIVER)


def drivers_that_ask() -> list[str]:
    """Return the names of the drivers over which a server can be asked for its position."""
    return [driver.name for driver in _DRIVERS.values() if driver.can_ask]


class Database:
    """One engine, and what is known of its server.

    Args:
        engine: of the units.

    Raises:
        ValueError: the engine is in AUTOCOMMIT, where there is no transaction.
    """

    def __init__(self, engine: AsyncEngine) -> None:
        self.engine: AsyncEngine = engine
        self.sync_engine: Engine = self.engine.sync_engine
        self.system: System = system_of(self.sync_engine.dialect)
        self.driver: Driver = driver_of(self.sync_engine.dialect)
        self.recognised: bool = False
        configured = self.sync_engine.get_execution_options().get("isolation_level")
        # The level given to create_engine() has no public name.
        configured = configured or getattr(self.sync_engine.dialect, "_on_connect_isolation_level", None)
        if str(configured).upper() == "AUTOCOMMIT":
            raise ValueError(
                "the engine is in AUTOCOMMIT, where nothing can be rolled back; pass one without isolation_level='AUTOCOMMIT'"
            )
        self._configured: str | None = configured
        self.within: str | None = self.sync_engine.get_execution_options().get(WITHIN)
        self.unit_engines: dict[tuple[IsolationLevel | None, bool], AsyncEngine] = {}
        """The engines of its units, by level and by whether they only read; see `UnitEngine.for_unit`."""
        self.has_connected: bool = False
        self._first: dict[str, asyncio.AbstractEventLoop] = {}
        self._home: tuple[weakref.ref[asyncio.AbstractEventLoop], weakref.ref[Pool]] | None = None

    @property
    def system_name(self) -> str:
        """What OpenTelemetry calls it; MariaDB under the dialect "mysql" is known with anybody's first connection."""
        dialect = self.sync_engine.dialect
        return "mariadb" if getattr(dialect, "is_mariadb", False) else dialect.name

    @property
    def pool(self) -> Pool:
        return self.sync_engine.pool

    def check_loop(self, loop: asyncio.AbstractEventLoop, *, who: str) -> None:
        """Refuse to take a connection out of the pool that works in another event loop only, as with most drivers.

        If that loop is closed, the connections cannot be used any more, so new ones are made.

        Raises:
            TaskBoundaryError: the pool is another loop's.
        """
        pool = self.pool
        if self._home is not None and self._home[0]() is loop and self._home[1]() is pool:
            return
        if self.driver.bound_to_loop and not isinstance(pool, NullPool):
            owner = _owners.get(pool)
            other = None if owner is None else owner()
            if other is not None and other is not loop and not other.is_closed():
                raise TaskBoundaryError(
                    f"{who} runs in another event loop than the one whose connections the engine's pool keeps; give each "
                    "loop an engine and a manager of its own, or make the engine with poolclass=NullPool"
                )
            if owner is not None and other is not loop:
                self.sync_engine.dispose(close=False)
                pool = self.pool
            _owners[pool] = weakref.ref(loop)
        self._home = weakref.ref(loop), weakref.ref(pool)

    @contextmanager
    def first_alone(self, loop: asyncio.AbstractEventLoop) -> Generator[None]:
        """Let one event loop make the engine's first connections; in SQLAlchemy's greenlet.

        SQLAlchemy learns what server it is with the first one, under a lock of asyncio that only one loop can wait for.
        """
        while not self.has_connected and self._first.setdefault("loop", loop) is not loop:
            await_only(asyncio.sleep(FIRST_LOOK_SECONDS))
        try:
            yield
            self.has_connected = True
        finally:
            self._first.clear()

    def writer_queue(self) -> WriterQueue | None:
        """Return where the writers wait for their turn; None where the database has room for several."""
        return self.system.writer_queue(self.pool) if self.system.queues_writers else None

    def recognise(self, connection: Connection) -> None:
        """Find out which database has answered; nothing is sent."""
        if not self.recognised and self.is_open(connection):
            self.system = self.system.recognise(connection, self.driver)
            self.recognised = True

    def keeps_status(self) -> bool:
        """Say whether the server can be asked what became of a transaction."""
        return self.system.keeps_status and self.within is None

    def capacity(self) -> int | None:
        """Return how many connections the pool can lend, None where there is no limit."""
        pool: Any = self.pool
        # QueuePool's overflow has no public name; -1 means that there is no limit.
        overflow = getattr(pool, "_max_overflow", None)
        if overflow is None or overflow < 0:
            return None
        return int(pool.size()) + int(overflow)

    def is_exhausted(self) -> bool:
        """Say whether one that asks the pool for a connection now must wait."""
        pool: Any = self.pool
        capacity = self.capacity()
        return capacity is not None and pool.checkedout() >= capacity

    def default_isolation(self) -> str | None:
        """Return the level of a unit that does not ask for one; None before the first connection."""
        if self.system.default_level is not None:
            return self.system.default_level
        if self._configured is not None:
            return self._configured
        # Set by the first connection to what the server says, so a server's own configuration counts.
        return getattr(self.sync_engine.dialect, "default_isolation_level", None)

    def keeps_snapshot(self, isolation: IsolationLevel | None) -> bool:
        """Say whether all statements of a unit at this level see what its first one saw."""
        level = isolation or self.default_isolation()
        return level is not None and not is_weaker_or_same(level, "READ COMMITTED")

    def is_open(self, connection: Connection | None) -> bool:
        """Say whether the driver still believes in its connection; if not, nothing we send can arrive."""
        if connection is None or connection.closed or connection.invalidated:
            return False
        return self.driver.is_open(raw_connection(connection))
