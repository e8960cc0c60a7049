"""SQLite's schema: its lock, its transactions of DDL, and its triggers."""

from __future__ import annotations

import sqlite3
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from sqlalchemy import text

from sqla_uow._alembic.schema import PREFIX, Found, Lock, Patience, Schema, Trigger, column_in, qualified

if TYPE_CHECKING:
    from collections.abc import Generator

    from sqlalchemy import TextClause
    from sqlalchemy.engine import Connection


__all__ = ["SQLiteSchema"]


class SQLiteSchema(Schema):
    """SQLite's: there is one writer at a time, and no table's own lock."""

    tells_triggers: ClassVar[bool] = True
    renames_in_triggers: ClassVar[bool] = True
    forgets_tables: ClassVar[bool] = True
    copies_tables: ClassVar[bool] = True
    begins_late: ClassVar[bool] = True

    @contextmanager
    def lock(self, connection: Connection) -> Generator[Lock]:
        """Hold the lock of the database's file."""
        file = _file(connection)
        lock = SQLiteLock(file) if file else _Nobody()
        try:
            yield lock
        finally:
            lock.close()

    @contextmanager
    def limit(self, connection: Connection, patience: Patience) -> Generator[None]:
        """Make the statements one transaction: the driver does not begin one before DDL."""
        driver: Any = connection.connection.driver_connection
        if driver.in_transaction:
            with connection.begin_nested():
                yield
            return
        # Not a savepoint: where others write, a transaction that begins by reading may not write any more.
        connection.exec_driver_sql("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            connection.exec_driver_sql("ROLLBACK")
            raise
        connection.exec_driver_sql("COMMIT")

    def create(self, trigger: Trigger) -> list[str]:
        """Return what writes the row again."""
        quote = self.dialect.identifier_preparer.quote
        name, table, column = trigger.qualified(self.dialect, trigger.name), quote(trigger.table), quote(trigger.column)
        keys = [quote(one) for one in trigger.key] or ["rowid"]
        row = " AND ".join(f"{key} = NEW.{key}" for key in keys)
        counting = f"UPDATE {table} SET {column} = OLD.{column} + 1 WHERE {row}"  # noqa: S608  # names, quoted
        return [
            *self.drop(trigger),
            f"CREATE TRIGGER {name} AFTER UPDATE ON {table} FOR EACH ROW WHEN NEW.{column} <= OLD.{column} BEGIN {counting}; END",
        ]

    def triggers_of(self, connection: Connection, table: str, schema: str | None) -> list[Found]:
        """Return the version triggers that are on a table."""
        which = f"substr(name, 1, {len(PREFIX)}) = '{PREFIX}' AND lower(tbl_name) = lower(:table)"
        rows = connection.execute(_master(connection, schema, "name, sql", which), {"table": table}).all()
        return [Found(name, column, table, schema) for name, sql in rows if (column := column_in(sql)) is not None]

    def is_taken(self, connection: Connection, name: str, schema: str | None) -> bool:
        """Say whether a trigger of another table has this name."""
        statement = _master(connection, schema, "count(*)", "lower(name) = lower(:name)")
        return bool(connection.scalar(statement, {"name": name}))


def _master(connection: Connection, schema: str | None, what: str, which: str) -> TextClause:
    master = qualified(connection.dialect, "sqlite_master", schema).replace(":", "\\:")
    return text(f"SELECT {what} FROM {master} WHERE type = 'trigger' AND {which}")  # noqa: S608  # quoted


def _file(connection: Connection) -> str:
    """Return the database's file; empty if it is in memory, where no other process sees it."""
    cursor = connection.connection.cursor()  # past SQLAlchemy, which would begin a transaction
    try:
        cursor.execute("PRAGMA database_list")
        return next(str(row[2]) for row in cursor.fetchall() if row[1] == "main")
    finally:
        cursor.close()


class SQLiteLock:
    """An exclusive transaction on a file beside the database."""

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
