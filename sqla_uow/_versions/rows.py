"""Reads and locks the versions of rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import and_, or_, select

from sqla_uow._versions.mapping import kind_of
from sqla_uow.errors import StaleVersionError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy import Column, Select, Table
    from sqlalchemy.engine import Connection
    from sqlalchemy.orm import Mapper

__all__ = ["counting", "find_rows", "key_columns", "read_versions", "stale_version", "version_table"]

_AT_ONCE = 5_000
"""Keys in one statement: a driver takes at most 32,767 parameters."""


def version_table(mapper: Mapper[Any]) -> Table:
    """Return the table of the version column; in joined inheritance, a parent's table."""
    column = mapper.version_id_col
    assert column is not None
    table: Table = column.table
    return table


def key_columns(mapper: Mapper[Any], table: Any = None) -> list[Column[Any]]:
    """Return the columns of a table that make up the identity, in its order.

    Args:
        mapper: of the model.
        table: the version's by default.
    """
    table = version_table(mapper) if table is None else table
    properties = [mapper.get_property_by_column(column) for column in mapper.primary_key]
    columns = [next((column for column in each.columns if column.table is table), None) for each in properties]
    found = [column for column in columns if column is not None]
    # A child's key may have another name than its parent's, but has the same order.
    return found if len(found) == len(columns) else list(table.primary_key)


def counting(mapper: Mapper[Any]) -> dict[Any, Any]:
    """Return what an UPDATE of the version's table has to set to give a row a new version."""
    kind, column, key = kind_of(mapper), mapper.version_id_col, key_columns(mapper)[0]
    assert kind is not None
    assert column is not None
    # xmin changes by itself if the row is written at all.
    return {key: key} if kind.bumped is None else {column: kind.bumped(column)}


def read_versions(
    connection: Connection, mapper: Mapper[Any], keys: Sequence[tuple[Any, ...]], *, lock: bool = False
) -> dict[tuple[Any, ...], Any]:
    """Return the versions of rows by key, without rows that do not exist.

    Args:
        connection: of the unit, or another.
        mapper: of the rows.
        keys: identities.
        lock: keep others from changing them until the transaction ends, in the order of the keys.
    """
    found: dict[tuple[Any, ...], Any] = {}
    for start in range(0, len(keys), _AT_ONCE):
        rows = connection.execute(_select_versions(mapper, keys[start : start + _AT_ONCE], lock=lock))
        found.update({tuple(row[:-1]): row[-1] for row in rows})
    return found


def find_rows(
    connection: Connection, mapper: Mapper[Any], keys: Sequence[tuple[Any, ...]], *, lock: bool = False
) -> dict[tuple[Any, ...], tuple[tuple[Any, ...], Any]]:
    """Read the versions of rows by keys as a user writes them, each with the key that is in the row.

    With some collations 'ABC' finds the row 'abc', and "1" may find the row 1.
    """
    read = read_versions(connection, mapper, keys, lock=lock)
    found = {key: (key, read[key]) for key in keys if key in read}
    others = [key for key in keys if key not in read] if len(read) > len(found) else []
    for key in others:
        for row in read_versions(connection, mapper, [key], lock=lock).items():
            found[key] = row
    return found


def _select_versions(mapper: Mapper[Any], keys: Sequence[tuple[Any, ...]], *, lock: bool) -> Select[Any]:
    columns = key_columns(mapper)
    assert mapper.version_id_col is not None
    statement = select(*columns, mapper.version_id_col)
    if len(columns) == 1:
        statement = statement.where(columns[0].in_([key[0] for key in keys]))
    else:
        pairs = [and_(*(column == value for column, value in zip(columns, key, strict=True))) for key in keys]
        statement = statement.where(or_(*pairs))
    # key_share: on PostgreSQL, an insert of a row that refers to this one must not wait for us.
    return statement.order_by(*columns).with_for_update(key_share=True) if lock else statement


def stale_version(model: type[Any], key: tuple[Any, ...], expected: Any, found: Any) -> StaleVersionError:
    """Return the error for a row that is not at the expected version; it is gone if `found` is None."""
    name = f"{model.__name__}({', '.join(map(repr, key))})"
    fact = "is gone" if found is None else f"is at version {found!r}"
    where = "it was to be written" if expected is None else f"{expected!r} was expected"
    return StaleVersionError(
        f"{name} {fact} where {where}; read it again, and let the client decide",
        model=model,
        key=key,
        expected=expected,
        found=found,
    )
