"""Three ways to give the rows of an ORM UPDATE new versions: in the UPDATE itself, by a join (MariaDB), by another UPDATE.

Nothing public tells which rows an UPDATE changes and what it sets.  The private names of statements that are read here are the
same in SQLAlchemy 2.0.58 and 2.1.9, except `_ordered_values`; the tests of each form run on both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import ColumnElement, Update, select, tuple_, update
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.elements import Grouping
from sqlalchemy.util import immutabledict

from sqla_uow._versions.mapping import attribute_of, kind_of
from sqla_uow._versions.rows import counting, key_columns, version_table

if TYPE_CHECKING:
    from sqlalchemy import Select, Table
    from sqlalchemy.orm import Mapper
    from sqlalchemy.sql.compiler import SQLCompiler

__all__ = ["count_by_itself", "count_by_join", "counting_beside", "limit_of", "only_rows", "select_keys", "unchanged"]


class _Given(Grouping[bool]):
    """A condition that ``synchronize_session="evaluate"`` takes for true: it is ours, and true for each row of the statement.

    The name by which it is visited says so.
    """

    __visit_name__ = "true"
    inherit_cache = True


@compiles(_Given)
def _compile_given(given: _Given, compiler: SQLCompiler, **options: Any) -> str:
    return f"({compiler.process(given.element, **options)})"


class _Beside(Update):
    """An UPDATE in a CTE of another UPDATE."""

    inherit_cache = True


# What the compiler of SQLAlchemy 2.0.58 and 2.1.9 keeps of the last UPDATE.
_OF_ONE_UPDATE = ("postfetch", "insert_prefetch", "update_prefetch", "implicit_returning", "_get_bind_name_for_col")


@compiles(_Beside)
def _compile_beside(beside: _Beside, compiler: SQLCompiler, **options: Any) -> str:
    """Compile, but keep what the compiler knows of the outer UPDATE: the columns that Python fills in, and what is returned."""
    state: dict[str, Any] = compiler.__dict__
    kept = {name: state[name] for name in _OF_ONE_UPDATE if name in state}
    text = compiler.visit_update(beside, **options)
    state.update(kept)
    return text


def count_by_itself(statement: Any, mapper: Mapper[Any]) -> Any:
    """Return an UPDATE that sets the version as well; the version is in the table of the UPDATE."""
    kind = kind_of(mapper)
    assert kind is not None
    if kind.bumped is None:
        return statement
    version = getattr(statement._propagate_attrs["plugin_subject"].entity, attribute_of(mapper))
    return _with_values(statement, {version: kind.bumped(version)})


def count_by_join(statement: Any, mapper: Mapper[Any]) -> Any:
    """Return an UPDATE for MariaDB that also sets the version in a parent's table.

    The parent has an alias; else the user's subqueries on that table would be correlated with it.
    """
    kind, table = kind_of(mapper), version_table(mapper)
    assert kind is not None
    assert mapper.version_id_col is not None
    parent: Any = table.alias()
    pairs = zip(key_columns(mapper, mapper.local_table), key_columns(mapper), strict=True)
    joined = [_Given(own == parent.c[key.key]) for own, key in pairs]
    joined += [
        _Given(condition) for condition in _links(mapper, _tables(statement.table, _criteria(statement, mapper)))
    ]
    statement = statement.where(*joined)
    if kind.bumped is None:
        return statement
    version = parent.c[mapper.version_id_col.key]
    return _with_values(statement, {version: kind.bumped(version), **unchanged(table, parent)})


def counting_beside(statement: Any, mapper: Mapper[Any]) -> Update:
    """Return the UPDATE of the parent's table that gives the rows of a statement new versions."""
    table = version_table(mapper)
    matching = select_keys(statement, mapper).correlate(None)
    values = {**unchanged(table), **counting(mapper)}
    return _Beside(table).where(tuple_(*key_columns(mapper)).in_(matching)).values(values)


def select_keys(statement: Any, mapper: Mapper[Any]) -> Select[Any]:
    """Return a SELECT of the keys of the rows that a statement changes."""
    criteria = _criteria(statement, mapper)
    rows: Any = mapper.local_table
    if _links(mapper, _tables(rows, criteria)):
        for each in mapper.iterate_to_root():
            if each.inherits is not None and each.inherit_condition is not None:
                rows = rows.join(each.inherits.local_table, each.inherit_condition)
    return select(*key_columns(mapper, mapper.local_table)).select_from(rows).where(*criteria)


def only_rows(statement: Any, mapper: Mapper[Any], keys: Any) -> Any:
    """Return the statement, limited to the rows with these keys."""
    return statement.where(_Given(tuple_(*key_columns(mapper, mapper.local_table)).in_(keys)))


def limit_of(statement: Any, name: str) -> tuple[int | None, Any]:
    """Return the LIMIT of an UPDATE for MariaDB, and the statement without it.

    Args:
        statement: as the body wrote it.
        name: of the dialect.
    """
    key = f"{name}_limit"
    limit = statement.dialect_kwargs.get(key)
    return limit, statement if limit is None else statement.with_dialect_options(**{key: None})


def _criteria(statement: Any, mapper: Mapper[Any]) -> list[Any]:
    """Return what chooses the rows: the WHERE, what ``with_loader_criteria()`` adds, and the class of a single table."""
    options: dict[Any, list[Any]] = {}
    for option in statement._with_options:
        if getattr(option, "_is_criteria_option", False):
            option.get_global_criteria(options)
    of_mapper = options.get(("additional_entity_criteria", mapper), [])
    chosen = [each for each in of_mapper if each.include_aliases or each.entity is mapper]
    criteria = [*statement._where_criteria, *(each._resolve_where_criteria(mapper) for each in chosen)]
    single: Any = mapper._single_table_criterion
    return criteria if single is None else [*criteria, single]


def _tables(own: Any, criteria: list[Any]) -> set[Any]:
    """Return the tables that a WHERE names outside its subqueries, except the statement's own."""
    return {table for each in criteria for table in each._from_objects} - {own}


def _links(mapper: Mapper[Any], wanted: set[Any]) -> list[ColumnElement[bool]]:
    """Return the conditions that join a model's table with its parents', if one of the parents is wanted.

    SQLAlchemy does not join them here, so a WHERE on a parent's column would choose all rows or none.
    """
    levels = [each for each in mapper.iterate_to_root() if each.inherits is not None]
    parents = {each.inherits.local_table for each in levels if each.inherits is not None} - {mapper.local_table}
    conditions = [each.inherit_condition for each in levels if each.inherit_condition is not None]
    return conditions if parents & wanted else []


def unchanged(table: Table, named: Any = None) -> dict[Any, Any]:
    """Return values that keep a parent's ``onupdate`` columns as they are, as only its version is to change."""
    columns = (table if named is None else named).c
    named = [columns[column.key] for column in table.columns if column.onupdate is not None]
    return {column: column for column in named}


def _with_values(statement: Any, values: dict[Any, Any]) -> Any:
    if not (getattr(statement, "_maintain_values_ordering", False) or getattr(statement, "_ordered_values", None)):
        return statement.values(values)
    statement = statement._generate()  # values() after ordered_values() is refused
    added = update(statement._propagate_attrs["plugin_subject"].entity).values(values)._values
    assert added is not None
    if getattr(statement, "_ordered_values", None):  # SQLAlchemy 2.0
        statement._ordered_values = [*statement._ordered_values, *added.items()]
    else:
        statement._values = immutabledict({**statement._values, **added})
    return statement
