"""MariaDB's schema: its lock, its limits, its triggers, and what stands for DDL in transactions."""

from __future__ import annotations

import hashlib
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

from alembic.ddl.base import AddColumn
from alembic.util import CommandError
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from sqla_uow._alembic.schema import (
    PREFIX,
    Found,
    Lock,
    Patience,
    Schema,
    Trigger,
    column_in,
    literally,
    on_own_session,
    qualified,
)
from sqla_uow._databases.failures import code_of

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from alembic.operations import Operations
    from sqlalchemy import Column
    from sqlalchemy.engine import Connection, Engine


__all__ = ["MariaDBSchema"]

_LONGEST_NAME = 64  # of a lock
_A_DAY = 86_400  # s
_NOT_SUPPORTED = {1845, 1846}  # ALGORITHM=INSTANT, without and with a reason
# Where names of tables keep their case, two may differ by it alone; information_schema compares without.
_OF_TABLE = text(
    "SELECT trigger_name, action_statement FROM information_schema.triggers "  # noqa: S608  # our own words
    "WHERE event_object_schema = coalesce(:schema, database()) AND event_object_table = :table "
    f"AND left(trigger_name, {len(PREFIX)}) = '{PREFIX}' "
    "AND (@@lower_case_table_names <> 0 OR BINARY event_object_table = :table)"
)
_TAKEN = text(
    "SELECT count(*) FROM information_schema.triggers "
    "WHERE trigger_schema = coalesce(:schema, database()) AND trigger_name = :name"
)


class MariaDBSchema(Schema):
    """MariaDB's, and MySQL's: each DDL statement is a transaction of its own."""

    waits: ClassVar[bool] = True
    tells_triggers: ClassVar[bool] = True
    replaces_triggers: ClassVar[bool] = True

    def lock(self, connection: Connection) -> AbstractContextManager[Lock]:
        """Return a named lock's."""
        return on_own_session(connection, MariaDBLock)

    @contextmanager
    def limit(self, connection: Connection, patience: Patience) -> Generator[None]:
        """Set lock_wait_timeout for the session: each DDL statement is a transaction of its own."""
        before = connection.execute(text("SELECT @@SESSION.lock_wait_timeout")).scalar_one()
        connection.execute(text(f"SET SESSION lock_wait_timeout = {_whole_seconds(patience)}"))
        try:
            yield
        finally:
            if not connection.invalidated:
                connection.execute(text(f"SET SESSION lock_wait_timeout = {int(before)}"))

    @contextmanager
    def script_limit(self, operations: Operations, patience: Patience) -> Generator[None]:
        """Set lock_wait_timeout, and leave it to the server again."""
        operations.execute(f"SET SESSION lock_wait_timeout = {_whole_seconds(patience)}")
        yield
        operations.execute("SET SESSION lock_wait_timeout = DEFAULT")

    @contextmanager
    def keep(self, impl: Any, table: str, schema: str | None, found: Sequence[Found]) -> Generator[None]:
        """Lock the table, so that no write comes between; a trigger that is dropped here is made again if the rest fails."""
        if not found:
            yield
            return
        impl.connection.execute(literally(f"LOCK TABLES {qualified(impl.dialect, table, schema)} WRITE"))
        try:
            yield
        except BaseException:
            left = {one.name for one in self.triggers_of(impl.connection, table, schema)}
            for one in found:
                if one.name not in left:
                    trigger = Trigger(table, one.column, schema, given=one.name)
                    for statement in self.create(trigger):
                        impl.connection.execute(literally(statement))
            raise
        finally:
            impl.connection.execute(text("UNLOCK TABLES"))

    def add_column(self, operations: Operations, table: str, column: Column[Any], schema: str | None) -> None:
        """Add a column in the table's description alone.

        Without the clause MariaDB chooses: where it cannot do so, as with ROW_FORMAT=COMPRESSED, it copies the table.

        Raises:
            CommandError: MariaDB would have to rewrite the table.
        """
        schemas: Any = operations.schema_obj
        schemas.table(table, column, schema=schema)  # a column is rendered as its table's
        statement = str(AddColumn(table, column, schema).compile(dialect=self.dialect))
        try:
            operations.migration_context.impl.execute(literally(f"{statement}, ALGORITHM=INSTANT"))
        except DBAPIError as error:
            if error.orig is None or code_of(error.orig) not in _NOT_SUPPORTED:
                raise
            raise CommandError(
                f"MariaDB would have to rewrite table {table!r}; use op.add_column() while nobody uses the table, or "
                "change its ROW_FORMAT"
            ) from error

    def create(self, trigger: Trigger) -> list[str]:
        """Return one statement."""
        quote = self.dialect.identifier_preparer.quote
        table, name = trigger.qualified(self.dialect, trigger.table), trigger.qualified(self.dialect, trigger.name)
        column = quote(trigger.column)
        counting = f"SET NEW.{column} = OLD.{column} + 1"
        return [f"CREATE OR REPLACE TRIGGER {name} BEFORE UPDATE ON {table} FOR EACH ROW {counting}"]

    def triggers_of(self, connection: Connection, table: str, schema: str | None) -> list[Found]:
        """Return the version triggers that are on a table."""
        rows = connection.execute(_OF_TABLE, {"schema": schema, "table": table}).all()
        return [Found(name, column, table, schema) for name, sql in rows if (column := column_in(sql)) is not None]

    def is_taken(self, connection: Connection, name: str, schema: str | None) -> bool:
        """Say whether a trigger of another table has this name."""
        return bool(connection.scalar(_TAKEN, {"name": name, "schema": schema}))


def _whole_seconds(patience: Patience) -> int:
    return max(1, round(patience.lock_timeout))  # 0 would be an error at once, whoever uses the table


class MariaDBLock:
    """A named lock of a session."""

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
