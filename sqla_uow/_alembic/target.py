"""What has to be true of a table before its version column or trigger is made or removed."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from alembic.util import CommandError
from sqlalchemy import Column, Integer, inspect
from sqlalchemy.exc import NoSuchTableError

from sqla_uow._alembic.databases import schema_of
from sqla_uow._versions.kinds import INTEGER, TIMESTAMP, UUID, VersionKind
from sqla_uow._versions.mapping import INFO_KEY

if TYPE_CHECKING:
    from sqlalchemy.engine import Inspector

__all__ = ["Target", "kind_named", "version_column"]

logger = logging.getLogger("sqla_uow")

_KINDS: dict[str, VersionKind] = {kind.name: kind for kind in (INTEGER, UUID, TIMESTAMP)}


def kind_named(name: object) -> VersionKind:
    """Return a kind of version column by its name.

    Raises:
        CommandError: there is none of that name.
    """
    if name not in _KINDS:
        raise CommandError(f"a version column has no kind {name!r}; use one of {', '.join(map(repr, _KINDS))}")
    return _KINDS[str(name)]


def version_column(name: str, kind: VersionKind) -> Column[Any]:
    """Return the column as a migration adds it: NOT NULL, with one constant default, so that no row is written."""
    return Column(name, kind.type_(), nullable=False, server_default=kind.server_default, info={INFO_KEY: kind.name})


class Target:
    """A table as it is in the database now.

    Args:
        impl: Alembic's, of the dialect, with a connection.
        table: its name.
        schema: that it is in.

    Raises:
        CommandError: there is no such table, or it is a view.
    """

    def __init__(self, impl: Any, table: str, schema: str | None) -> None:
        self._impl = impl
        self._inspector: Inspector = inspect(impl.connection)  # a new one: what it has seen, it remembers
        self.table = table
        self.schema = schema
        try:
            self._columns: dict[str, Any] = {c["name"]: c for c in self._inspector.get_columns(table, schema=schema)}
        except NoSuchTableError:
            raise CommandError(f"there is no table {table!r}{self._where()}; create it first") from None
        if not self._inspector.has_table(table, schema=schema) or self._is_view():
            raise CommandError(f"{table!r} is a view{self._where()}, which has no rows of its own; name its table")

    def _where(self) -> str:
        return f" in schema {self.schema!r}" if self.schema else ""

    def _is_view(self) -> bool:
        return self.table in schema_of(self._impl.connection).views(self._inspector, self.schema)

    def primary_key(self) -> list[str]:
        """Return the primary key's columns.

        Raises:
            CommandError: it has none.
        """
        key = self._inspector.get_pk_constraint(self.table, schema=self.schema)["constrained_columns"]
        if not key:
            raise CommandError(
                f"table {self.table!r} has no primary key, so its rows cannot be versioned; add one first"
            )
        return list(key)

    def has(self, column: Column[Any]) -> bool:
        """Say whether the column is there already, as on MariaDB after a migration that failed half-way.

        Raises:
            CommandError: it is there, and of another type or nullable.
        """
        found = self._columns.get(column.name)
        if found is None:
            return False
        reflected: Column[Any] = Column(found["name"], found["type"], nullable=found["nullable"])
        if self._impl.compare_type(reflected, column):
            raise CommandError(
                f"table {self.table!r} already has a column {column.name!r}, of type {found['type']}; rename it, or name "
                "another one in column_name"
            )
        if found["nullable"]:
            raise CommandError(
                f"table {self.table!r} already has a column {column.name!r}, which is nullable; make it NOT NULL, or name "
                "another one in column_name"
            )
        logger.info("table %r already has its version column %r", self.table, column.name)
        return True

    def has_column(self, column_name: str) -> bool:
        """Say whether it has a column of this name."""
        return column_name in self._columns

    def check_present(self, column_name: str) -> None:
        """Refuse to go on without the column.

        Raises:
            CommandError: the table does not have it.
        """
        if column_name not in self._columns:
            raise CommandError(f"table {self.table!r} has no column {column_name!r}; name the right one in column_name")

    def check_renamed(self, old: str, new: str) -> bool:
        """Say whether a column has its new name already, as on MariaDB after a migration that failed half-way.

        Raises:
            CommandError: the table has both, or neither.
        """
        if new in self._columns and old not in self._columns:
            logger.info("table %r already has its version column as %r", self.table, new)
            return True
        self.check_present(old)
        if new in self._columns:
            raise CommandError(
                f"table {self.table!r} already has a column {new!r}; drop it first, or take another name"
            )
        return False

    def check_integer(self, column_name: str) -> None:
        """Refuse to count with anything but an integer.

        Raises:
            CommandError: the table has no such column, or it is of another type.
        """
        self.check_present(column_name)
        found = self._columns[column_name]["type"]
        if not isinstance(found, Integer):
            raise CommandError(
                f"column {column_name!r} of table {self.table!r} is of type {found}, and a trigger counts with integers "
                "only; leave the trigger out, or use an integer version"
            )
