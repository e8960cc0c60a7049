"""One fresh database for each test, on a server that the test run owns."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import URL, event, make_url, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.pool import NullPool

from tests.kit.models import Base
from tests.kit.waiting import until
from tests.servers import MariaDB, PostgreSQL
from tests.servers.pgbouncer import PgBouncer

if TYPE_CHECKING:
    from pathlib import Path

    from tests.servers.database import DatabaseServer

DRIVERS = ("sqlite", "asyncpg", "psycopg", "asyncmy", "aiomysql")
ONE_OF_EACH = ("sqlite", "asyncpg", "asyncmy")
"""One driver for each kind of database, for what is about the database and takes its time."""
MODULES = {"sqlite": "aiosqlite"} | {name: name for name in DRIVERS[1:]}
SERVERS: dict[str, type[DatabaseServer]] = {
    "asyncpg": PostgreSQL,
    "psycopg": PostgreSQL,
    "asyncmy": MariaDB,
    "aiomysql": MariaDB,
}
FAMILIES = {
    "sqlite": "sqlite",
    "asyncpg": "postgresql",
    "psycopg": "postgresql",
    "asyncmy": "mysql",
    "aiomysql": "mysql",
}

_POOLER = os.environ.get("SQLA_UOW_POOLER")
if _POOLER not in (None, "transaction"):
    raise pytest.UsageError(f"SQLA_UOW_POOLER={_POOLER!r} is unknown; use 'transaction', or leave it out")
POOLED = _POOLER is not None
"""Whether the tests reach PostgreSQL through PgBouncer in transaction mode; see `tests.conftest`."""
UNPREPARED: dict[str, dict[str, Any]] = {
    "asyncpg": {"statement_cache_size": 0},
    "psycopg": {"prepare_threshold": None},
}
"""The settings that our guide on PgBouncer tells to use."""
THROUGH_POOLER = {"client_connection_check_interval": "100ms"}
"""Likewise of the server: by itself it goes on with a statement whose client has left the pooler."""

NO_SUCH_THREAD = 1094


class Database:
    """A database, the engines that were made on it, and an observer that sees only what is committed.

    Args:
        driver: of the engines.
        url: of the database, at the server.
        server: None for SQLite.
        pooler: before the server; only the engines go through it.
    """

    def __init__(self, driver: str, url: str, server: DatabaseServer | None, pooler: PgBouncer | None = None) -> None:
        self.driver = driver
        self.family = FAMILIES[driver]
        self.url = url
        self.server = server
        self._pooler = pooler
        self._engines: list[AsyncEngine] = []
        self._observer = create_async_engine(url, poolclass=NullPool)

    def engine(
        self, *, url: URL | None = None, port: int | None = None, wal: bool = True, **options: Any
    ) -> AsyncEngine:
        """Make an engine; `port` puts a proxy before the server, `url` changes user or database."""
        url = url or self.url
        if port is not None:
            assert self.server is not None
            url = self.server.url(self.driver, port=port, database=self.name)
        elif self._pooler is not None:
            url = make_url(url).set(port=self._pooler.port)
        if self._pooler is not None:
            options["connect_args"] = UNPREPARED[self.driver] | options.get("connect_args", {})
        engine = create_async_engine(url, **options)
        if self.family == "sqlite" and wal:
            event.listen(engine.sync_engine, "connect", _use_wal)
        self._engines.append(engine)
        return engine

    async def create_tables(self) -> None:
        """Make the tables, after removing whatever an earlier test left: a new database would take ten times as long."""
        async with self._observer.connect() as connection:
            await connection.execution_options(isolation_level="AUTOCOMMIT")
            for statement in await self._leftovers(connection):
                await connection.execute(text(statement))
            await connection.run_sync(Base.metadata.create_all)

    async def _leftovers(self, connection: AsyncConnection) -> list[str]:
        if self.family == "postgresql":
            others = "FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
            return [f"SELECT pg_terminate_backend(pid) {others}", "DROP SCHEMA public CASCADE", "CREATE SCHEMA public"]
        if self.family == "mysql":
            name = self.name
            for statement in await _kills(connection):
                try:
                    await connection.execute(text(statement))
                except OperationalError as error:
                    if error.orig is None or error.orig.args[0] != NO_SUCH_THREAD:  # it has just left by itself
                        raise
            return [f"DROP DATABASE {name}", f"CREATE DATABASE {name}", f"USE {name}"]
        return []

    @property
    def port(self) -> int:
        """Where clients of this database connect to."""
        assert self.server is not None
        return self.server.port if self._pooler is None else self._pooler.port

    @property
    def name(self) -> str:
        """What the server calls it."""
        return self.url.rpartition("/")[2].partition("?")[0]

    async def run(self, *statements: str, **parameters: Any) -> None:
        """Commit statements on a connection of its own."""
        async with self._observer.begin() as connection:
            for statement in statements:
                await connection.execute(text(statement), parameters)

    async def rows(self, statement: str, **parameters: Any) -> list[tuple[Any, ...]]:
        """Return what another connection sees."""
        async with self._observer.connect() as connection:
            return [tuple(row) for row in await connection.execute(text(statement), parameters)]

    async def scalar(self, statement: str, **parameters: Any) -> Any:
        return (await self.rows(statement, **parameters))[0][0]

    def outside(self) -> AsyncConnection:
        """Return a connection of nobody's pool, to be entered; its transaction is rolled back unless it commits."""
        return self._observer.connect()

    async def until_waiting(self, pid: int | None = None) -> None:
        """Wait until a session of this database waits for a lock: PostgreSQL's of this pid, or any."""
        # InnoDB renews innodb_trx only if nobody has read it for 0.1 s.
        await until(lambda: self.waiting(pid), pause=0.11)

    async def waiting(self, pid: int | None = None) -> int:
        """Return how many sessions of this database wait for a lock."""
        whose = "" if pid is None else f" AND pid = {pid}"
        rows = await self.rows(
            f"SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'{whose}"
            if self.family == "postgresql"
            else "SELECT 1 FROM information_schema.innodb_trx t JOIN information_schema.processlist p "
            "ON t.trx_mysql_thread_id = p.id WHERE p.db = database() AND t.trx_state = 'LOCK WAIT'"
        )
        return len(rows)

    async def kill(self, session: AsyncSession) -> None:
        """End the server's side of a session, and wait until it has ended."""
        postgresql = self.family == "postgresql"
        number = await session.scalar(text("SELECT pg_backend_pid()" if postgresql else "SELECT connection_id()"))
        if postgresql:
            await self.rows(f"SELECT pg_terminate_backend({number}, 10000)")
            return
        await self.run(f"KILL {number}")

        async def ended() -> bool:
            return not await self.rows(f"SELECT 1 FROM information_schema.processlist WHERE id = {number}")

        await until(ended)

    async def is_idle(self) -> bool:
        """Say whether every other session of this database on the server is."""
        return all(state == "idle" for _, state in await self.sessions())

    async def sessions(self) -> list[tuple[int, str]]:
        """Return (id, state) of every other session of this database on the server."""
        if self.family == "postgresql":
            return await self.rows(
                "SELECT pid, state FROM pg_stat_activity WHERE datname = current_database() "
                "AND pid <> pg_backend_pid() AND backend_type = 'client backend'"
            )
        if self.family == "mysql":
            return await self.rows(
                "SELECT p.id, coalesce(t.trx_state, 'idle') FROM information_schema.processlist p "
                "LEFT JOIN information_schema.innodb_trx t ON t.trx_mysql_thread_id = p.id "
                "WHERE p.db = database() AND p.id <> connection_id()"
            )
        return []

    async def dispose(self) -> None:
        for engine in self._engines:
            await engine.dispose()
        await self._observer.dispose()


async def _kills(connection: AsyncConnection) -> list[str]:
    others = "FROM information_schema.processlist WHERE db = database() AND id <> connection_id()"
    return [f"KILL {row[0]}" for row in await connection.execute(text(f"SELECT id {others}"))]


def _use_wal(dbapi_connection: Any, _record: Any) -> None:
    cursor = dbapi_connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.close()


class Databases:
    """The servers of one test run, started when they are first needed."""

    def __init__(self) -> None:
        self._servers: dict[type[DatabaseServer], DatabaseServer] = {}
        self._names: dict[type[DatabaseServer], str] = {}
        self._pooler: PgBouncer | None = None

    def server(self, driver: str) -> DatabaseServer | None:
        kind = SERVERS.get(driver)
        if kind is None:
            return None
        if kind not in self._servers:
            reason = kind.unavailable()
            if reason is not None:
                pytest.skip(reason)
            server = kind(THROUGH_POOLER if POOLED and kind is PostgreSQL else {})
            server.start()
            self._servers[kind] = server
        return self._servers[kind]

    def make(self, driver: str, folder: Path) -> Database:
        server = self.server(driver)
        if server is None:
            return Database(driver, f"sqlite+aiosqlite:///{folder / 'test.db'}", None)
        # One for all tests, which run one after the other and each make the tables anew.
        name = self._names.setdefault(type(server), "")
        if not name:
            name = self._names[type(server)] = server.create_database()
        return Database(driver, server.url(driver, database=name), server, self._pooler_of(server))

    def _pooler_of(self, server: DatabaseServer) -> PgBouncer | None:
        if not POOLED or not isinstance(server, PostgreSQL):
            return None
        if self._pooler is None:
            if (reason := PgBouncer.unavailable()) is not None:
                pytest.skip(reason)
            self._pooler = PgBouncer(server, size=50).__enter__()
        return self._pooler

    def stop(self) -> None:
        if self._pooler is not None:
            self._pooler.__exit__(None, None, None)
        for server in self._servers.values():
            server.stop()
