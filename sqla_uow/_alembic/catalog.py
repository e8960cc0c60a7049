"""The version triggers of a database, found by their table: it can be renamed or moved, and they keep their names."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy import text

from sqla_uow._alembic.triggers import PREFIX, qualified
from sqla_uow._databases.driver_state import family_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy import TextClause
    from sqlalchemy.engine import Connection

__all__ = ["PARENT", "Found", "children_of", "is_taken", "is_used", "triggers_of"]

_NAME = r'(?:"((?:[^"]|"")+)"|`((?:[^`]|``)+)`|(\w+))'
_COLUMN = re.compile(rf"SET NEW\.{_NAME} = OLD|NEW\.{_NAME} := OLD|AS parent SET {_NAME} =|WHEN NEW\.{_NAME} <=")

PARENT = (
    "pg_catalog.pg_constraint reference JOIN pg_catalog.pg_constraint own ON own.conrelid = reference.conrelid "
    "AND own.contype = 'p' AND own.conkey @> reference.conkey AND own.conkey <@ reference.conkey"
)
"""In PostgreSQL, with ``reference.contype = 'f'``: a child's table refers to its parent's by its primary key."""

_POSTGRESQL = f"""
SELECT tgname, prosrc, pg_class.relname, there.nspname, tgfoid,
    quote_ident(its.nspname) || '.' || quote_ident(proname), (tgtype & 2) = 0
FROM pg_catalog.pg_trigger
JOIN pg_catalog.pg_class ON pg_class.oid = tgrelid JOIN pg_catalog.pg_namespace there ON there.oid = relnamespace
JOIN pg_catalog.pg_proc ON pg_proc.oid = tgfoid JOIN pg_catalog.pg_namespace its ON its.oid = pronamespace
WHERE NOT tgisinternal AND left(tgname, {len(PREFIX)}) = '{PREFIX}'
AND coalesce(to_jsonb(pg_trigger) ->> 'tgparentid', '0') = '0'
"""  # noqa: S608  # our own words.  A partition's copy has a parent, and lives with it; before PostgreSQL 13 it is internal
_THIS = "to_regclass(CAST(:table AS text))"
_OF_TABLE = text(f"{_POSTGRESQL} AND tgrelid = {_THIS}")
_OF_CHILDREN = text(
    f"{_POSTGRESQL} AND (tgtype & 2) = 0 AND EXISTS (SELECT FROM {PARENT} WHERE reference.conrelid = tgrelid "
    f"AND reference.contype = 'f' AND reference.confrelid = {_THIS})"
)
_USED = text("SELECT count(*) FROM pg_catalog.pg_trigger WHERE tgfoid = :function")
_TAKEN = text(
    "SELECT count(*) FROM pg_catalog.pg_trigger JOIN pg_catalog.pg_proc ON pg_proc.oid = tgfoid "
    "JOIN pg_catalog.pg_namespace ON pg_namespace.oid = pronamespace "
    "WHERE proname = :name AND nspname = coalesce(CAST(:schema AS text), current_schema())"
)
# Where names of tables keep their case, two may differ by it alone; information_schema compares without.
_OF_TABLE_MARIADB = text(
    "SELECT trigger_name, action_statement FROM information_schema.triggers "  # noqa: S608  # our own words
    "WHERE event_object_schema = coalesce(:schema, database()) AND event_object_table = :table "
    f"AND left(trigger_name, {len(PREFIX)}) = '{PREFIX}' "
    "AND (@@lower_case_table_names <> 0 OR BINARY event_object_table = :table)"
)
_TAKEN_MARIADB = text(
    "SELECT count(*) FROM information_schema.triggers "
    "WHERE trigger_schema = coalesce(:schema, database()) AND trigger_name = :name"
)


class Found(NamedTuple):
    """A version trigger as it is in the database.

    Attributes:
        name: its own, of the day on which it was made.
        column: in which it counts.
        table: that it is on, as that is called now.
        schema: the table's.
        function: on PostgreSQL, its function's id and how it is written in SQL.
        of_child: whether `column` is in the parent's table.
    """

    name: str
    column: str
    table: str
    schema: str | None
    function: tuple[int, str] | None = None
    of_child: bool = False


def triggers_of(connection: Connection, table: str, schema: str | None) -> list[Found]:
    """Return the version triggers that are on a table; none where there is no such table."""
    family = family_of(connection.dialect)
    if family == "postgresql":
        return _postgresql(connection, _OF_TABLE, table, schema)
    if family == "mysql":
        rows = connection.execute(_OF_TABLE_MARIADB, {"schema": schema, "table": table}).all()
    else:
        which = f"substr(name, 1, {len(PREFIX)}) = '{PREFIX}' AND lower(tbl_name) = lower(:table)"
        rows = connection.execute(_master(connection, schema, "name, sql", which), {"table": table}).all()
    return [Found(name, column, table, schema) for name, sql in rows if (column := _column(sql)) is not None]


def children_of(connection: Connection, table: str, schema: str | None) -> list[Found]:
    """Return those on other tables that count in this one's rows, which only PostgreSQL has."""
    if family_of(connection.dialect) != "postgresql":
        return []
    return _postgresql(connection, _OF_CHILDREN, table, schema)


def is_taken(connection: Connection, name: str, schema: str | None) -> bool:
    """Say whether a trigger of another table has this name, or on PostgreSQL its function."""
    family = family_of(connection.dialect)
    if family == "sqlite":
        statement = _master(connection, schema, "count(*)", "lower(name) = lower(:name)")
        return bool(connection.scalar(statement, {"name": name}))
    taken = _TAKEN if family == "postgresql" else _TAKEN_MARIADB
    return bool(connection.scalar(taken, {"name": name, "schema": schema}))


def is_used(connection: Connection, function: int) -> bool:
    """Say whether a trigger calls this function of PostgreSQL's."""
    return bool(connection.scalar(_USED, {"function": function}))


def _postgresql(connection: Connection, statement: Any, table: str, schema: str | None) -> list[Found]:
    rows: Sequence[Any] = connection.execute(statement, {"table": qualified(connection.dialect, table, schema)}).all()
    return [
        Found(name, column, table, schema, (int(number), function), bool(of_child))
        for name, source, table, schema, number, function, of_child in rows
        if (column := _column(source)) is not None
    ]


def _master(connection: Connection, schema: str | None, what: str, which: str) -> TextClause:
    master = qualified(connection.dialect, "sqlite_master", schema).replace(":", "\\:")
    return text(f"SELECT {what} FROM {master} WHERE type = 'trigger' AND {which}")  # noqa: S608  # quoted


def _column(source: str) -> str | None:
    """Return the column in which a trigger of this source counts, None where it is none of ours."""
    found = _COLUMN.search(source)
    if found is None:
        return None
    return next(name for name in found.groups() if name is not None).replace('""', '"').replace("``", "`")
