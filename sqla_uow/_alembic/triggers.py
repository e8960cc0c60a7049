"""The SQL of version triggers: they count what is written past the ORM."""

from __future__ import annotations

import hashlib
from itertools import count
from typing import TYPE_CHECKING, NamedTuple

from sqlalchemy import text

from sqla_uow._databases.driver_state import family_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from sqlalchemy import TextClause
    from sqlalchemy.engine import Dialect

__all__ = ["PREFIX", "Trigger", "literally", "names", "qualified"]

PREFIX = "sqla_uow_version_"
"""Of the names of our triggers."""
_LONGEST_NAME = 63  # PostgreSQL's; MariaDB has 64


class Trigger(NamedTuple):
    """The trigger of one table's integer version.

    Whatever an UPDATE says, the version rises: a condition ``NEW = OLD`` would let a lower value through, with which a
    client of long ago agrees.  PostgreSQL and MariaDB count before the row is written, SQLite has to write it again.
    """

    table: str
    column: str
    schema: str | None
    key: Sequence[str] = ()
    """The primary key's columns; SQLite's rowid where it is not known, in a script."""

    given: str = ""
    """Its name; that of its table's today where it is empty."""

    @property
    def name(self) -> str:
        """Return the trigger's name, and that of its function on PostgreSQL."""
        return self.given or next(names(self.table))

    def create(self, dialect: Dialect) -> list[str]:
        """Return the statements that make it, anew where there is one already."""
        quote = dialect.identifier_preparer.quote
        table, name, column = self.qualified(dialect, self.table), quote(self.name), quote(self.column)
        family = family_of(dialect)
        if family == "postgresql":
            function = self.qualified(dialect, self.name)
            body = f"$body$ BEGIN NEW.{column} := OLD.{column} + 1; RETURN NEW; END $body$"
            return [
                f"CREATE OR REPLACE FUNCTION {function}() RETURNS trigger LANGUAGE plpgsql AS {body}",
                f"DROP TRIGGER IF EXISTS {name} ON {table}",
                f"CREATE TRIGGER {name} BEFORE UPDATE ON {table} FOR EACH ROW EXECUTE FUNCTION {function}()",
            ]
        if family == "mysql":
            trigger = self.qualified(dialect, self.name)
            counting = f"SET NEW.{column} = OLD.{column} + 1"
            return [f"CREATE OR REPLACE TRIGGER {trigger} BEFORE UPDATE ON {table} FOR EACH ROW {counting}"]
        keys = [quote(column) for column in self.key] or ["rowid"]
        row = " AND ".join(f"{key} = NEW.{key}" for key in keys)
        counting = f"UPDATE {quote(self.table)} SET {column} = OLD.{column} + 1 WHERE {row}"  # noqa: S608  # names, quoted
        return [
            *self.drop(dialect),
            f"CREATE TRIGGER {self.qualified(dialect, self.name)} AFTER UPDATE ON {quote(self.table)} FOR EACH ROW WHEN NEW.{column} <= OLD.{column} BEGIN {counting}; END",
        ]

    def drop(self, dialect: Dialect) -> list[str]:
        """Return the statements that remove it, where it is there."""
        name = self.qualified(dialect, self.name)
        if family_of(dialect) != "postgresql":
            return [f"DROP TRIGGER IF EXISTS {name}"]
        table, quote = self.qualified(dialect, self.table), dialect.identifier_preparer.quote
        return [f"DROP TRIGGER IF EXISTS {quote(self.name)} ON {table}", f"DROP FUNCTION IF EXISTS {name}()"]

    def qualified(self, dialect: Dialect, name: str) -> str:
        """Return a name in the table's schema."""
        return qualified(dialect, name, self.schema)


def names(table: str) -> Iterator[str]:
    """Return names for a table's trigger: its own, and others in case a table that had its name before has that one."""
    for number in count(1):
        name = PREFIX + table if number == 1 else f"{PREFIX}{table}_{number}"
        yield name if len(name) <= _LONGEST_NAME else name[:46] + "_" + hashlib.sha256(name.encode()).hexdigest()[:16]


def qualified(dialect: Dialect, name: str, schema: str | None) -> str:
    """Return a name as it is written in SQL, in a schema."""
    prepare = dialect.identifier_preparer
    return f"{prepare.quote_schema(schema)}.{prepare.quote(name)}" if schema else prepare.quote(name)


def literally(statement: str) -> TextClause:
    """Return a statement in which no name and no ``:=`` is a parameter."""
    return text(statement.replace(":", "\\:"))
