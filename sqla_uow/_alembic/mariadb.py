"""What MariaDB needs where others have DDL in transactions, and what keeps it from writing a whole table anew."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from alembic.ddl.base import AddColumn
from alembic.util import CommandError
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from sqla_uow._alembic.catalog import Found, triggers_of
from sqla_uow._alembic.triggers import Trigger, literally, qualified
from sqla_uow._databases.driver_state import family_of
from sqla_uow._databases.failures import code_of

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from alembic.operations import Operations
    from sqlalchemy import Column

__all__ = ["add_instantly", "locked"]

_NOT_SUPPORTED = {1845, 1846}  # ALGORITHM=INSTANT, without and with a reason


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
def locked(impl: Any, table: str, schema: str | None, found: Sequence[Found]) -> Generator[None]:
    """Keep a table for us while its triggers and a column of it are changed, so that no write comes between; MariaDB.

    Elsewhere the transaction does that.  A trigger that is dropped here is made again if the rest fails.
    """
    if family_of(impl.dialect) != "mysql" or not found:
        yield
        return
    impl.connection.execute(literally(f"LOCK TABLES {qualified(impl.dialect, table, schema)} WRITE"))
    try:
        yield
    except BaseException:
        left = {one.name for one in triggers_of(impl.connection, table, schema)}
        for one in found:
            if one.name not in left:
                trigger = Trigger(table, one.column, schema, given=one.name)
                for statement in trigger.create(impl.dialect):
                    impl.connection.execute(literally(statement))
        raise
    finally:
        impl.connection.execute(text("UNLOCK TABLES"))
