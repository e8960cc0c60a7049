"""What MariaDB needs where others have DDL in transactions, and what keeps it from writing a whole table anew."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from alembic.ddl.base import AddColumn
from alembic.util import CommandError
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from sqla_uow._alembic_triggers import Trigger, literally
from sqla_uow._classify import code_of
from sqla_uow._servers import family_of

if TYPE_CHECKING:
    from collections.abc import Generator

    from alembic.operations import Operations
    from sqlalchemy import Column

__all__ = ["add_instantly", "keeping_trigger"]

_NOT_SUPPORTED = {1845, 1846}  # ALGORITHM=INSTANT, without and with a reason
_COUNT = text(
    "SELECT count(*) FROM information_schema.triggers WHERE trigger_schema = coalesce(:schema, database()) AND trigger_name = :name"
)


def add_instantly(operations: Operations, table: str, column: Column[Any], schema: str | None) -> None:
    """Add a column in the table's description alone.

    Without the clause MariaDB chooses: where it cannot do so, as with ROW_FORMAT=COMPRESSED, it copies the table.

    Raises:
        CommandError: the table would have to be written anew.
    """
    schemas: Any = operations.schema_obj
    schemas.table(table, column, schema=schema)  # a column is rendered as its table's
    context = operations.migration_context
    statement = str(AddColumn(table, column, schema).compile(dialect=context.dialect))
    try:
        context.impl.execute(literally(f"{statement}, ALGORITHM=INSTANT"))
    except DBAPIError as error:
        if error.orig is None or code_of(error.orig) not in _NOT_SUPPORTED:
            raise
        raise CommandError(
            f"MariaDB would have to write table {table!r} anew; use op.add_column() while nobody uses the table, or change "
            "its ROW_FORMAT"
        ) from error


@contextmanager
def keeping_trigger(operations: Operations, trigger: Trigger) -> Generator[None]:
    """Make the trigger that is dropped here again if the column is not; elsewhere a savepoint does that.

    The table stays locked from the one to the other, so that no write goes uncounted between.
    """
    context = operations.migration_context
    if context.as_sql or family_of(context.dialect) != "mysql":
        yield
        return
    connection = operations.get_bind()
    found = connection.scalar(_COUNT, {"schema": trigger.schema, "name": trigger.name})
    if not found:
        yield
        return
    connection.execute(literally(f"LOCK TABLES {trigger.qualified(context.dialect, trigger.table)} WRITE"))
    try:
        yield
    except BaseException:
        for statement in trigger.create(context.dialect):
            connection.execute(literally(statement))
        raise
    finally:
        connection.execute(text("UNLOCK TABLES"))
