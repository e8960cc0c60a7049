"""One runner of migrations at a time: a lock of the database's that dies with its holder."""

from __future__ import annotations

import asyncio
import hashlib
import sqlite3
import time
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from alembic.util import CommandError
from sqlalchemy import text
from sqlalchemy.engine import Engine
from sqlalchemy.util import await_only

from sqla_uow._databases.database import recognised
from sqla_uow._databases.distributed import CockroachDB
from sqla_uow._databases.driver_state import family_of

if TYPE_CHECKING:
    from collections.abc import Generator

    from sqlalchemy.engine import Connection

__all__ = ["migration_lock", "sleep"]

_KEY = int.from_bytes(hashlib.sha256(b"sqla_uow.migration_lock").digest()[:8], "big", signed=True)
_LONGEST_NAME = 64  # of a lock, in MariaDB
_A_DAY = 86_400  # s
_POLL = 0.1  # s
# It is idle while the migrations run.  Before PostgreSQL 14 there is no such setting, and no row.
_STAY_IDLE = text("SELECT set_config(name, '0', false) FROM pg_settings WHERE name = 'idle_session_timeout'")


class _Lock(Protocol):
    """A database's way to have one holder of a name."""

    def try_acquire(self) -> bool:
        """Take it if it is free; never wait."""
        ...

    def release(self) -> bool:
        """Give it back; say whether it was still held."""
        ...


@contextmanager
def migration_lock(connection: Connection, *, timeout: float = 60.0) -> Generator[None]:
    """Let one runner at a time run migrations on this database; the others wait, and then find nothing to do.

    Begin it before Alembic reads which revision the database is at: around ``context.begin_transaction()``.  The lock is an
    advisory lock (`GET_LOCK` on MariaDB, an exclusive transaction on ``<database file>.migration-lock`` on SQLite) on
    a connection of its own, outside the pool and outside every transaction: it survives ``autocommit_block()``, and the
    database frees it when its holder dies.  It is asked for again and again, never waited for in the database, where
    ``CREATE INDEX CONCURRENTLY`` of its holder would wait for the one that waits.

    Args:
        connection: that the migrations will run on; it is not used itself.
        timeout: seconds to wait for another runner.

    Raises:
        TimeoutError: another runner held it for longer.
        CommandError: the connection is in a transaction; PostgreSQL is reached through a transaction-mode pooler, which keeps no session to hold a lock; or the
            lock was lost while the migrations ran.
    """
    if connection.in_transaction():
        raise CommandError(
            "migration_lock() was begun inside a transaction of the connection, which would commit after the lock is free; "
            "begin it first, around context.begin_transaction()"
        )
    with _lock_of(connection) as lock:
        _acquire(lock, connection, timeout)
        try:
            yield
        except BaseException:
            _give_up(lock)
            raise
        if not _give_up(lock):
            raise CommandError(
                "the migration lock was lost before the migrations ended, so another runner may have run beside this one; "
                "compare the schema with its revision"
            )


def sleep(connection: Connection, seconds: float) -> None:
    """Wait without holding up the event loop, where the driver has one."""
    if connection.dialect.is_async:
        await_only(asyncio.sleep(seconds))
    else:
        time.sleep(seconds)


def _acquire(lock: _Lock, connection: Connection, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while not lock.try_acquire():
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError(
                f"another runner has held the migration lock of {_name(connection)!r} for all of {timeout:g} s; wait for "
                "it to end, or give migration_lock() a longer timeout"
            )
        sleep(connection, min(_POLL, left))


def _give_up(lock: _Lock) -> bool:
    try:
        return lock.release()
    except Exception:  # its connection is gone, and the lock with it
        return False


def _name(connection: Connection) -> str:
    return Path(connection.engine.url.database or ":memory:").name


def _lock_of(connection: Connection) -> AbstractContextManager[_Lock]:
    family = family_of(connection.dialect)
    if isinstance(recognised(connection), CockroachDB):
        raise CommandError(
            "CockroachDB gives an advisory lock to everybody who asks, so migration_lock() would exclude nobody; run the "
            "migrations from one process"
        )
    if family == "sqlite":
        return _sqlite(connection)
    if family in ("postgresql", "mysql"):
        return _server(connection, _PostgreSQL if family == "postgresql" else _MariaDB)
    raise CommandError(
        f"migration_lock() knows PostgreSQL, MariaDB and SQLite, not {family}; run the migrations from one process"
    )


# ---- PostgreSQL and MariaDB


@contextmanager
def _server(connection: Connection, kind: type[_PostgreSQL | _MariaDB]) -> Generator[_Lock]:
    # A pool of its own: the engine's may have room for one connection, and closing into it would keep the lock.
    engine = connection.engine
    own = Engine(engine.pool.recreate(), engine.dialect, engine.url)
    try:
        with own.connect() as held:
            yield kind(held.execution_options(isolation_level="AUTOCOMMIT"), own)
    finally:
        own.dispose()  # whatever happened, the session ends here


class _PostgreSQL:
    def __init__(self, connection: Connection, engine: Engine) -> None:
        self._connection = connection
        connection.execute(_STAY_IDLE)
        self._refuse_pooler(engine)

    def try_acquire(self) -> bool:
        return bool(self._connection.scalar(text("SELECT pg_try_advisory_lock(:key)"), {"key": _KEY}))

    def release(self) -> bool:
        return bool(self._connection.scalar(text("SELECT pg_advisory_unlock(:key)"), {"key": _KEY}))

    def _refuse_pooler(self, engine: Engine) -> None:
        """Refuse a pooler that gives a session away between two statements; one that keeps it does no harm."""
        before = self._process()
        if before == self._told():
            return
        # Through a pooler.  While another connection is in a transaction, does it have our session, or have we another?
        with engine.connect() as other, other.begin():
            its = other.scalar(text("SELECT pg_backend_pid()"))
            if its == before or self._process() != before:
                raise CommandError(
                    "the migration lock needs a session of its own, but PostgreSQL is reached through a pooler in "
                    "transaction mode; give the migrations a URL that leads to PostgreSQL itself"
                )

    def _process(self) -> int:
        return int(self._connection.execute(text("SELECT pg_backend_pid()")).scalar_one())

    def _told(self) -> int | None:
        """Return the process that the driver was told of when it connected: a pooler makes one up."""
        driver: Any = self._connection.connection.driver_connection
        if hasattr(driver, "get_server_pid"):  # asyncpg
            return int(driver.get_server_pid())
        info = getattr(driver, "info", None)  # psycopg, psycopg2
        return getattr(info, "backend_pid", None)


class _MariaDB:
    def __init__(self, connection: Connection, engine: Engine) -> None:
        self._connection = connection
        # One name space for all databases of a server.
        name = f"sqla_uow.migration_lock.{engine.url.database}"
        self._name = name if len(name) <= _LONGEST_NAME else hashlib.sha256(name.encode()).hexdigest()
        connection.execute(text(f"SET SESSION wait_timeout = {_A_DAY}"))  # it is idle while the migrations run

    def try_acquire(self) -> bool:
        return bool(self._connection.scalar(text("SELECT GET_LOCK(:name, 0)"), {"name": self._name}))

    def release(self) -> bool:
        return bool(self._connection.scalar(text("SELECT RELEASE_LOCK(:name)"), {"name": self._name}))


# ---- SQLite


@contextmanager
def _sqlite(connection: Connection) -> Generator[_Lock]:
    file = _file(connection)
    lock = _SQLite(file) if file else _Nobody()
    try:
        yield lock
    finally:
        lock.close()


def _file(connection: Connection) -> str:
    """Return the database's file; empty where it is in memory, and nobody else's."""
    cursor = connection.connection.cursor()  # past SQLAlchemy, which would begin a transaction
    try:
        cursor.execute("PRAGMA database_list")
        return next(str(row[2]) for row in cursor.fetchall() if row[1] == "main")
    finally:
        cursor.close()


class _SQLite:
    def __init__(self, file: str) -> None:
        self._path = Path(f"{file}.migration-lock")
        self._connection = sqlite3.connect(self._path, timeout=0, isolation_level=None)
        self._file = self._path.stat().st_ino

    def try_acquire(self) -> bool:
        try:
            self._connection.execute("BEGIN EXCLUSIVE")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY:
                raise
            return False
        return True

    def release(self) -> bool:
        # Another runner locks another file if somebody has removed this one.
        held = self._connection.in_transaction and self._path.exists() and self._path.stat().st_ino == self._file
        self._connection.rollback()
        return held

    def close(self) -> None:
        self._connection.close()


class _Nobody:
    """The lock of a database in memory, which no other process sees."""

    def try_acquire(self) -> bool:
        return True

    def release(self) -> bool:
        return True

    def close(self) -> None:
        pass
