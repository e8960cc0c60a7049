"""ORM statements on versioned models: an UPDATE gives each row a new version, and memory follows."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from sqlalchemy import inspect, select, tuple_, update
from sqlalchemy.engine.result import null_result
from sqlalchemy.orm.attributes import set_committed_value

from sqla_uow._session.session import UnitSession
from sqla_uow._versions.bulk_statement import (
    count_by_itself,
    count_by_join,
    counting_beside,
    limit_of,
    only_rows,
    select_keys,
    unchanged,
)
from sqla_uow._versions.expectations import versions_of
from sqla_uow._versions.mapping import attribute_of, check_type, kind_of
from sqla_uow._versions.reading import seen, set_seen
from sqla_uow._versions.rows import counting, find_rows, key_columns, read_versions, stale_version, version_table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from sqlalchemy import Table, Update
    from sqlalchemy.orm import InstanceState, Mapper, ORMExecuteState

    from sqla_uow._databases.system import System
    from sqla_uow._transaction.transaction import Transaction
    from sqla_uow._versions.expectations import Versions
    from sqla_uow._versions.kinds import VersionKind
    from sqla_uow._versions.mapping import VersionMixin

__all__ = ["next_version"]

_Found: TypeAlias = "Mapping[InstanceState[Any], Any]"
_Key: TypeAlias = tuple[Any, ...]
_Row: TypeAlias = tuple[_Key, dict[str, Any]]


def next_version(model: type[VersionMixin], /) -> dict[str, Any]:
    """Return what an upsert has to set, by the column's name, so that the row gets a new version.

    ::

        insert(Order).values(...).on_conflict_do_update(index_elements=["id"], set_={"name": ..., **next_version(Order)})

    MariaDB: ``on_duplicate_key_update(name=..., **next_version(Order))``.  It is empty for `VersionedByXmin`.

    Args:
        model: a model with a version mixin.

    Returns:
        The column's name, and an expression for the next version.

    Raises:
        TypeError: the model has no version.
    """
    mapper: Mapper[Any] | None = inspect(model, raiseerr=False)
    kind = None if mapper is None else kind_of(mapper)
    column = None if mapper is None else mapper.version_id_col
    if kind is None or column is None:
        raise TypeError(f"next_version() got {model.__name__}, which has no version; give the model a mixin")
    return {} if kind.bumped is None else {column.name: kind.bumped(column)}


class _Bulk:
    """One ORM UPDATE of a versioned model, while it is being changed and executed."""

    def __init__(
        self,
        session: UnitSession,
        mapper: Mapper[Any],
        run: Callable[..., Any],
        statement: Update,
        options: dict[str, Any],
    ) -> None:
        kind = kind_of(mapper)
        assert kind is not None
        assert session.transaction_of_unit is not None
        self.session = session
        self.transaction: Transaction = session.transaction_of_unit
        self.mapper = mapper
        self.statement: Any = statement
        self._run = run
        self._options = options
        given: Any = options.get("execution_options") or {}
        self.settings: dict[str, Any] = {**self.statement.get_execution_options(), **given}
        self.kind: VersionKind = kind
        self.attribute = attribute_of(mapper)
        self.versions: Versions = versions_of(self.transaction)

    @property
    def system(self) -> System:
        return self.transaction.database.system

    def run(self, params: Any) -> Any:
        """Execute the statement, with the changes made to it."""
        return self._run(self.statement, params, **self._options)

    def affected(self) -> list[InstanceState[Any]]:
        """Return the objects in memory whose versions the statement might change."""
        states = [state for state in self.session.identity_map.all_states() if state.mapper.isa(self.mapper)]
        return [state for state in states if seen(state) is not None or state in self.versions.expectations]

    def put_into_memory(self, now: _Found, *, seen: _Found, before: _Found) -> None:
        """Set the versions in memory to those of the rows, as if they had been loaded.

        An object that was stale before the statement stays stale: it was read before somebody else's change.

        Args:
            now: the versions of the rows.
            seen: the versions in memory before the statement.
            before: the versions of the rows before the statement.
        """
        for state, version in now.items():
            if seen[state] is not None:
                set_seen(state, version if before[state] == seen[state] else seen[state])
            if before[state] is not None and version != before[state]:
                self.versions.move_on(state, version)

    def read(self, states: Iterable[InstanceState[Any]], *, lock: bool = False) -> _Found:
        """Return the versions of the rows, None for a row that is gone."""
        keys = {state: state.key[1] for state in states if state.key is not None}
        found = read_versions(self.session.connection(), self.mapper, list(keys.values()), lock=lock)
        return {state: found.get(key) for state, key in keys.items()}

    def prepare(self) -> list[InstanceState[Any]]:
        """Flush, check expected versions, and keep the versions in memory in case a savepoint is rolled back."""
        self.session._autoflush()
        self.versions.check_before_bulk(self.session, self.mapper)
        states = self.affected()
        for state in states:
            self.versions.save(self.session, state)
        return states


def execute(session: UnitSession, run: Any, statement: Any, params: Any, options: dict[str, Any]) -> Any:
    """Execute an INSERT, UPDATE or DELETE that was given to a unit's session; an ORM UPDATE is changed.

    Args:
        session: the unit's.
        run: executes the statement that comes out of this.
        statement: as the body wrote it.
        params: with it; a list is an UPDATE by primary key.
        options: SQLAlchemy's own, passed on.
    """
    if session.transaction_of_unit is None or _versioned(statement) is None:
        return run(statement, params, **options)
    if session.dispatch.do_orm_execute:
        if options.get("_parent_execute_state") is not None:  # from a listener; we come after all of them
            return run(statement, params, **options)
        # After the user's listeners: they see the statement as it was written, and may add criteria.
        options = {**options, "_add_event": partial(_execute_behind_listeners, run)}
        return run(statement, params, **options)
    return _execute_now(session, run, statement, params, options)


def _execute_behind_listeners(run: Callable[..., Any], state: ORMExecuteState) -> Any:
    options = {
        "execution_options": state.execution_options,
        "bind_arguments": state.bind_arguments,
        "_parent_execute_state": state,
    }
    assert isinstance(state.session, UnitSession)
    return _execute_now(state.session, run, state.statement, state.parameters, options)


def _execute_now(session: UnitSession, run: Any, statement: Any, params: Any, options: dict[str, Any]) -> Any:
    mapper = _versioned(statement)
    if mapper is None:
        return run(statement, params, **options)
    bulk = _Bulk(session, mapper, run, statement, options)
    if statement.is_insert:
        # An upsert, or a REPLACE.
        writes = statement._post_values_clause is not None or statement._prefixes
        return _execute(bulk, bulk.prepare() if writes else [], lambda: bulk.run(params))
    if statement.is_delete:
        bulk.versions.check_before_bulk(session, mapper)
        return run(statement, params, **options)
    strategy = bulk.settings.get("dml_strategy", "auto")
    if strategy == "core_only":
        return bulk.run(params)
    _refuse_version(bulk, params)
    if isinstance(params, list) and strategy in ("auto", "bulk"):
        return _by_key(bulk, cast("list[dict[str, Any]]", params))
    return _where(bulk, params)


UnitSession.on_dml = staticmethod(execute)


def _versioned(statement: Any) -> Mapper[Any] | None:
    """Return the mapper of the versioned model that an ORM statement writes, None for other statements."""
    subject = statement._propagate_attrs.get("plugin_subject")
    if subject is None or "parententity" not in statement.table._annotations:
        return None
    mapper: Mapper[Any] = subject.mapper
    return mapper if mapper.version_id_col is not None and kind_of(mapper) is not None else None


def _refuse_version(bulk: _Bulk, params: Any) -> None:
    statement, column = bulk.statement, bulk.mapper.version_id_col
    assert column is not None
    ordered = getattr(statement, "_ordered_values", None)  # SQLAlchemy 2.0
    keys: list[Any] = [key for key, _ in ordered or ()]
    keys += list(statement._values or ()) + (list(cast("dict[str, Any]", params)) if isinstance(params, dict) else [])
    names = (bulk.attribute, "version")
    if any(key in names if isinstance(key, str) else column.shares_lineage(key) for key in keys):
        raise TypeError(
            f"an UPDATE of {bulk.mapper.class_.__name__} sets its version, which is counted by itself; leave it out, or "
            "compare with it in where()"
        )


# -- UPDATE ... WHERE


def _where(bulk: _Bulk, params: Any) -> Any:
    states = bulk.prepare()
    mapper = bulk.mapper
    if mapper.local_table is version_table(mapper):  # an alias of it too
        bulk.statement = count_by_itself(bulk.statement, mapper)
        return _execute(bulk, states, lambda: bulk.run(params))
    if bulk.statement._propagate_attrs["plugin_subject"].is_aliased_class:
        return bulk.run(params)  # SQLAlchemy cannot UPDATE two tables under aliases, and raises
    if bulk.system.updates_two_tables:
        _take_limit(bulk, params)
        bulk.statement = count_by_join(bulk.statement, mapper)
        result = _execute(bulk, states, lambda: bulk.run(params))
        result.context._rowcount = result.context.rowcount // 2  # MariaDB counts the rows of both tables
        return result
    beside = counting_beside(bulk.statement, mapper)
    if bulk.system.writes_in_with:
        # One statement, or a row that begins to match in between would not be counted.  It takes its rows from those that were
        # counted, so it locks the parents first, as a flush does: in another order the two could deadlock.
        counted = beside.returning(*key_columns(mapper)).cte("counted")
        bulk.statement = only_rows(bulk.statement, mapper, select(*counted.columns))
        return _execute(bulk, states, lambda: bulk.run(params))
    return _execute(bulk, states, lambda: _execute_both(bulk, beside, params))


def _execute_both(bulk: _Bulk, beside: Any, params: Any) -> Any:
    """Count in the parent's table first: afterwards other rows might match.  On SQLite nobody else writes meanwhile."""
    bulk.session.connection().execute(beside, params or {})
    return bulk.run(params)


def _take_limit(bulk: _Bulk, params: Any) -> None:
    """Choose the rows of an UPDATE ... LIMIT first: MariaDB does not allow LIMIT with two tables."""
    connection = bulk.session.connection()
    limit, bulk.statement = limit_of(bulk.statement, connection.dialect.name)
    if limit is not None:
        chosen = select_keys(bulk.statement, bulk.mapper).limit(limit).with_for_update()
        keys = [tuple(row) for row in connection.execute(chosen, params or {})]
        bulk.statement = only_rows(bulk.statement, bulk.mapper, keys)


def _execute(bulk: _Bulk, states: list[InstanceState[Any]], run: Callable[[], Any]) -> Any:
    """Execute, and bring the versions in memory up to date; that takes two more statements if there are any.

    Which rows match is read from the database and never evaluated in Python: collations, types and limits decide it.
    """
    if not states:
        return run()
    before = {state: seen(state) for state in states}
    locked = bulk.read(states, lock=True)
    result = run()
    bulk.put_into_memory(bulk.read(states), seen=before, before=locked)
    return result


# -- a list by primary key


def _by_key(bulk: _Bulk, params: list[dict[str, Any]]) -> Any:
    """Lock all rows by one SELECT; compare those that come with a version, and count those that come without."""
    states = {state.key[1]: state for state in bulk.prepare() if state.key is not None}
    rows, result = _rows(bulk, params), None
    if not rows:
        return null_result()  # as SQLAlchemy does for a model without a version
    while rows:
        several, rows = _once_each(rows)
        found = find_rows(bulk.session.connection(), bulk.mapper, [key for key, _ in several], lock=True)
        for key, row in several:
            _compare(bulk, key, row, None if key not in found else found[key][-1])
        _leave_parents(bulk, several)
        before = {states[key]: version for key, version in found.values() if key in states}
        noted = {state: seen(state) for state in before}
        result = _run_rows(bulk, [row for _, row in several])
        bulk.put_into_memory(bulk.read(before), seen=noted, before=before)
    return result


def _leave_parents(bulk: _Bulk, rows: Sequence[_Row]) -> None:
    """If a row sets nothing in the version's table, change only the version there.

    SQLAlchemy writes that table because of the version, and applies the ``onupdate`` of its columns.
    """
    mapper, table = bulk.mapper, version_table(bulk.mapper)
    names = {column: mapper.get_property_by_column(column).key for column in table.columns}
    stamped = [column for column in table.columns if column.onupdate is not None]
    if mapper.local_table is table or not stamped:
        return
    keys = key_columns(mapper)
    set_there = {name for column, name in names.items() if column not in keys} - {bulk.attribute}
    silent = {key: row for key, row in rows if not set_there & row.keys()}
    if silent:
        chosen = select(*keys, *stamped).where(tuple_(*keys).in_(silent))
        for found in bulk.session.connection().execute(chosen):
            values = zip(stamped, found[len(keys) :], strict=True)
            silent[tuple(found[: len(keys)])].update({names[column]: value for column, value in values})


def _once_each(rows: Sequence[_Row]) -> tuple[list[_Row], list[_Row]]:
    """Return the rows before the first repeated key, and the rest, which must be compared with the versions made by then."""
    keys: set[_Key] = set()
    for index, (key, _) in enumerate(rows):
        if key in keys:
            return list(rows[:index]), list(rows[index:])
        keys.add(key)
    return list(rows), []


def _run_rows(bulk: _Bulk, rows: list[dict[str, Any]]) -> Any:
    if bulk.kind.following is not None:
        return bulk.run(rows)
    # SQLAlchemy would write xmin too.  The rows are locked and compared by now, so each can be an UPDATE of its own.
    mapper, statement = bulk.mapper, bulk.statement
    names = [mapper.get_property_by_column(column).key for column in mapper.primary_key]
    for row in rows:
        values = {name: value for name, value in row.items() if name not in (*names, bulk.attribute)}
        key = [row[name] for name in names]
        if len(mapper.tables) > 1:
            _write_tables(bulk, key, values)
        else:
            where = [getattr(mapper.class_, name) == value for name, value in zip(names, key, strict=True)]
            bulk.statement = statement.where(*where).values(values)
            bulk.run(None)
    bulk.statement = statement
    return null_result()


def _write_tables(bulk: _Bulk, key: Sequence[Any], values: Mapping[str, Any]) -> None:
    """Write a row of joined inheritance with xmin: a write to the version's table makes the version."""
    mapper = bulk.mapper
    for table in cast("Sequence[Table]", mapper.tables):
        here: dict[Any, Any] = {}
        for column in table.columns:
            name = mapper.get_property_by_column(column).key
            if name in values and not column.primary_key:
                here[column] = values[name]
        if not here and table is version_table(mapper):
            here = {**unchanged(table), **counting(mapper)}
        if here:
            is_key = [own == value for own, value in zip(key_columns(mapper, table), key, strict=True)]
            bulk.session.connection().execute(update(table).where(*is_key).values(here))
    instance = bulk.session.identity_map.get(mapper.identity_key_from_primary_key(tuple(key)))
    if instance is not None and bulk.settings.get("synchronize_session", "auto") not in (False, None):
        for name in values.keys() & inspect(instance).dict.keys() - inspect(instance).committed_state.keys():
            set_committed_value(instance, name, values[name])


def _rows(bulk: _Bulk, params: list[dict[str, Any]]) -> list[_Row]:
    """Return each row's key, and a copy of the row that has the version under its mapped name."""
    names = [bulk.mapper.get_property_by_column(column).key for column in bulk.mapper.primary_key]
    column = bulk.mapper.version_id_col
    assert column is not None
    # The column's name too: SQLAlchemy ignores a name that is not an attribute, so the version would not be compared.
    synonyms = ["version"] + [column.name] * (not bulk.mapper.has_property(column.name))
    rows = [dict(given) for given in params]
    for row in rows:
        for name in synonyms:
            if name in row:
                row[bulk.attribute] = row.pop(name)
    return [(tuple(row.get(name) for name in names), row) for row in rows]


def _compare(bulk: _Bulk, key: _Key, row: dict[str, Any], found: Any) -> None:
    """Raise if a row is at another version than the list says; if the list says none, put the version in."""
    if bulk.attribute in row:
        check_type(bulk.mapper, row[bulk.attribute])
        if found != row[bulk.attribute]:
            raise stale_version(bulk.mapper.class_, key, row[bulk.attribute], found)
        return
    if found is None and None not in key and bulk.statement.whereclause is None:
        raise stale_version(bulk.mapper.class_, key, None, None)
    row[bulk.attribute] = bulk.kind.first() if found is None else found
