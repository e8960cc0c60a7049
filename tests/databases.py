"""One fresh database for each test, on a server that the test run owns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event, text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from tests.models import Base
from tests.servers import MariaDB, PostgreSQL
from tests.servers.server import Server

DRIVERS = ("sqlite", "asyncpg", "psycopg", "asyncmy", "aiomysql")
MODULES = {"sqlite": "aiosqlite"} | {name: name for name in DRIVERS[1:]}
SERVERS: dict[str, type[Server]] = {
    "asyncpg": PostgreSQL,
    "psycopg": PostgreSQL,
    "asyncmy": MariaDB,
    "aiomysql": MariaDB,
}
FAMILIES = {"sqlite": "sqlite", "asyncpg": "postgresql", "psycopg": "postgresql", "asyncmy": "mysql", "aiomysql": "mysql"}


class Database:
    """A database, the engines that were made on it, and an observer that sees only what is committed."""

    def __init__(self, driver: str, url: str, server: Server | None) -> None:
        self.driver = driver
        self.family = FAMILIES[driver]
        self.url = url
        self.server = server
        self._engines: list[AsyncEngine] = []
        self._observer = create_async_engine(url, poolclass=NullPool)

    def engine(self, *, port: int | None = None, wal: bool = True, **options: Any) -> AsyncEngine:
        """Make an engine; `port` puts a proxy before the server."""
        url = self.url
        if port is not None:
            assert self.server is not None
            url = self.server.url(self.driver, port=port, database=url.rpartition("/")[2].partition("?")[0])
        engine = create_async_engine(url, **options)
        if self.family == "sqlite" and wal:
            event.listen(engine.sync_engine, "connect", _use_wal)
        self._engines.append(engine)
        return engine

    async def create_tables(self) -> None:
        engine = self.engine()
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        await engine.dispose()

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
        if self.server is not None:
            self.server.drop_database(self.url.rpartition("/")[2].partition("?")[0])


def _use_wal(dbapi_connection: Any, _record: Any) -> None:
    cursor = dbapi_connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.close()


class Databases:
    """The servers of one test run, started when they are first needed."""

    def __init__(self) -> None:
        self._servers: dict[type[Server], Server] = {}

    def server(self, driver: str) -> Server | None:
        kind = SERVERS.get(driver)
        if kind is None:
            return None
        if kind not in self._servers:
            reason = kind.unavailable()
            if reason is not None:
                pytest.skip(reason)
            server = kind()
            server.start()
            self._servers[kind] = server
        return self._servers[kind]

    def make(self, driver: str, folder: Path) -> Database:
        server = self.server(driver)
        if server is None:
            return Database(driver, f"sqlite+aiosqlite:///{folder / 'test.db'}", None)
        return Database(driver, server.url(driver, database=server.create_database()), server)

    def stop(self) -> None:
        for server in self._servers.values():
            server.stop()
