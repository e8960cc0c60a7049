"""ORM statements on versioned models: an UPDATE counts for each row, and versions in memory stay those of the rows.

What an UPDATE is about and sets is in no public place.  The private names of statements that are read here are alike in
SQLAlchemy 2.0.58 and 2.1.9, but for `_ordered_values`, and the tests of each form run on both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias, cast

from sqlalchemy import inspect, select, tuple_, update
from sqlalchemy.orm.attributes import set_committed_value
from sqlalchemy.util import immutabledict

from sqla_uow._session import UnitSession
from sqla_uow._version_mapping import attribute_of, check_type, kind_of
from sqla_uow._version_rows import counting, key_columns, read_versions, stale_version, version_table
from sqla_uow._version_types import INTEGER
from sqla_uow._versions import versions_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from sqlalchemy import Update
    from sqlalchemy.orm import InstanceState, Mapper

    from sqla_uow._transaction import Transaction
    from sqla_uow._version_mapping import VersionMixin
    from sqla_uow._version_types import Kind
    from sqla_uow._versions import Versions

__all__ = ["next_version"]

_Found: TypeAlias = "Mapping[InstanceState[Any], Any]"


def next_version(model: type[VersionMixin], /) -> dict[str, Any]:
    """Return what an upsert has to set so that it counts, by the column's name.

    ::

        insert(Order).values(...).on_conflict_do_update(index_elements=["id"], set_={"name": ..., **next_version(Order)})

    MariaDB: ``on_duplicate_key_update(name=..., **next_version(Order))``.  Empty for `VersionedByXmin`.

    Args:
        model: a model with a version mixin.

    Returns:
        The column's name, and an expression that counts.

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
    """One ORM UPDATE of a versioned model, and how it is executed in the end."""

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
        self.kind: Kind = kind
        self.attribute = attribute_of(mapper)
        self.versions: Versions = versions_of(self.transaction)

    @property
    def family(self) -> str:
        return self.transaction.database.family

    def run(self, params: Any, **settings: Any) -> Any:
        """Execute the statement as it is by now, with other execution options than were given."""
        given: dict[str, Any] = dict(self._options.get("execution_options") or {})
        options = {**self._options, "execution_options": {**given, **settings}} if settings else self._options
        return self._run(self.statement, params, **options)

    def loaded(self) -> list[InstanceState[Any]]:
        """Return the objects in memory that the statement might change."""
        states = self.session.identity_map.all_states()
        return [state for state in states if state.mapper.isa(self.mapper) and self.attribute in state.dict]

    def remember(self, now: _Found, *, seen: _Found, before: _Found) -> None:
        """Put the rows' versions into memory, as loaded ones.

        An object that was stale before the statement stays so: it was read before somebody else's change.

        Args:
            now: the rows' versions.
            seen: those in memory.
            before: the rows', before the statement.
        """
        for state, version in now.items():
            instance = state.obj()
            if instance is not None:
                set_committed_value(instance, self.attribute, version if before[state] == seen[state] else seen[state])

    def read(self, states: Iterable[InstanceState[Any]], *, lock: bool = False) -> _Found:
        """Return the rows' versions, None for one that is gone."""
        keys = {state: state.key[1] for state in states if state.key is not None}
        found = read_versions(self.session.connection(), self.mapper, list(keys.values()), lock=lock)
        return {state: found.get(key) for state, key in keys.items()}

    def refresh(self, states: Sequence[InstanceState[Any]]) -> None:
        """Read objects anew, as the rows are after the statement."""
        keys = [state.key[1] for state in states if state.key is not None]
        if keys:
            chosen = tuple_(*key_columns(self.mapper)).in_(keys)
            anew = select(self.mapper).where(chosen).execution_options(populate_existing=True)
            self.session.execute(anew).all()

    def prepare(self) -> list[InstanceState[Any]]:
        """Flush, check what is expected, and keep the versions in memory for a savepoint's rollback."""
        if self.session.autoflush:
            self.session.flush()
        self.versions.check_before_bulk(self.session, self.mapper)
        states = self.loaded()
        for state in states:
            self.versions.save(self.session, state)
        return states


def execute(session: UnitSession, run: Any, statement: Any, params: Any, options: dict[str, Any]) -> Any:
    """Execute an INSERT, UPDATE or DELETE that was given to a unit's session; only an ORM UPDATE is changed.

    Args:
        session: the unit's.
        run: executes the statement that comes out of this.
        statement: as the body wrote it.
        params: with it; a list is an UPDATE by primary key.
        options: SQLAlchemy's own, handed through.
    """
    mapper = _versioned(statement)
    transaction = session.transaction_of_unit
    if mapper is None or transaction is None or statement.is_insert:
        return run(statement, params, **options)
    if statement.is_delete:
        if transaction.versions is not None:
            transaction.versions.check_before_bulk(session, mapper)
        return run(statement, params, **options)
    bulk = _Bulk(session, mapper, run, statement, options)
    strategy = bulk.settings.get("dml_strategy", "auto")
    if strategy == "core_only":
        return bulk.run(params)
    _refuse_version(bulk, params)
    if isinstance(params, list) and strategy in ("auto", "bulk"):
        return _by_key(bulk, cast("list[dict[str, Any]]", params))
    return _where(bulk, params)


UnitSession.on_dml = staticmethod(execute)


def _versioned(statement: Any) -> Mapper[Any] | None:
    """Return the versioned model that a statement of the ORM is about."""
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
    synchronize = bulk.settings.get("synchronize_session", "auto")
    joined = bulk.mapper.local_table is not version_table(bulk.mapper)
    if not joined or bulk.family == "mysql":
        _count_here(bulk, joined=joined)
        # SQLAlchemy counts in memory by the same expression, if it is `version + 1`.
        counted = bulk.kind is INTEGER and synchronize not in (False, None)
        result = _execute(bulk, [] if counted else states, lambda: bulk.run(params))
        if joined:
            result.context._rowcount = result.context.rowcount // 2  # MariaDB counts the rows of both tables
    elif bulk.family == "postgresql":
        result = _execute_with_cte(bulk, states, params)
    else:
        result = _execute(bulk, states, lambda: _execute_both(bulk, params))
    bulk.versions.flushed()
    return result


def _execute(bulk: _Bulk, states: list[InstanceState[Any]], run: Callable[[], Any], *, refresh: bool = False) -> Any:
    """Execute, and put into memory what became of the versions there: two more statements, if there are any.

    Args:
        bulk: the statement's model and session.
        states: the objects in memory.
        run: executes it.
        refresh: read all of an object that was changed; SQLAlchemy has not.
    """
    if not states:
        return run()
    seen = {state: state.dict[bulk.attribute] for state in states}
    locked = bulk.read(states, lock=True)
    result = run()
    now = bulk.read(states)
    if refresh:
        bulk.refresh([state for state in states if now[state] != locked[state]])
    bulk.remember(now, seen=seen, before=locked)
    return result


def _execute_both(bulk: _Bulk, params: Any) -> Any:
    """Count in the parent's table first: afterwards other rows might match.  Nobody else writes meanwhile (SQLite)."""
    bulk.session.connection().execute(_counting(bulk), params or {})
    return bulk.run(params)


def _execute_with_cte(bulk: _Bulk, states: list[InstanceState[Any]], params: Any) -> Any:
    """Count in the parent's table by the same statement, or a row that begins to match in between would not be counted.

    The rows are looked up in what was counted, so that the parents are locked first, as a flush does: the other way round
    the two deadlock.  SQLAlchemy can neither evaluate that in Python nor have RETURNING, which 'fetch' needs, where a CTE
    is an UPDATE too (2.1.9): what is in memory is read anew.
    """
    mapper = bulk.mapper
    counted = _counting(bulk).returning(*key_columns(mapper)).cte("counted")
    local = tuple_(*key_columns(mapper, mapper.local_table))
    bulk.statement = bulk.statement.where(local.in_(select(*counted.columns)))
    if bulk.settings.get("synchronize_session", "auto") in (False, None):
        return _execute(bulk, states, lambda: bulk.run(params))
    return _execute(bulk, states, lambda: bulk.run(params, synchronize_session=False), refresh=True)


def _count_here(bulk: _Bulk, *, joined: bool) -> None:
    """Have the statement itself set the version; on MariaDB also one in a parent's table, which it may join."""
    if bulk.kind.bumped is None:
        return
    statement, mapper = bulk.statement, bulk.mapper
    entity = statement._propagate_attrs["plugin_subject"].entity
    version = getattr(entity, bulk.attribute)
    values = {version: bulk.kind.bumped(version)}
    if joined:
        statement = statement.where(*_join(mapper))
    ordered = getattr(statement, "_maintain_values_ordering", False) or getattr(statement, "_ordered_values", None)
    if not ordered:
        bulk.statement = statement.values(values)
        return
    bulk.statement = statement = statement._generate()  # values() after ordered_values() is refused
    added = update(entity).values(values)._values
    assert added is not None
    if getattr(statement, "_ordered_values", None):  # SQLAlchemy 2.0
        statement._ordered_values = [*statement._ordered_values, *added.items()]
    else:
        statement._values = immutabledict({**statement._values, **added})


def _join(mapper: Mapper[Any]) -> list[Any]:
    """Return what joins a model's table with that of its version; without it MariaDB would change every row."""
    owner = next(each for each in mapper.iterate_to_root() if each.local_table is version_table(mapper))
    pairs = zip(key_columns(mapper, mapper.local_table), key_columns(mapper), strict=True)
    # As attributes, if they are: SQLAlchemy evaluates those in Python too.
    return [_attribute(mapper, local) == _attribute(owner, counted) for local, counted in pairs]


def _attribute(mapper: Mapper[Any], column: Any) -> Any:
    found = mapper.get_property_by_column(column)
    return getattr(mapper.class_, found.key) if found.columns[0] is column else column


def _counting(bulk: _Bulk) -> Any:
    """Return the UPDATE of the parent's table that counts for the rows the statement is about."""
    mapper, statement = bulk.mapper, bulk.statement
    keys = key_columns(mapper)
    matching = select(*keys).select_from(mapper).options(*statement._with_options)
    if statement.whereclause is not None:
        matching = matching.where(statement.whereclause)
    return update(version_table(mapper)).where(tuple_(*keys).in_(matching.correlate(None))).values(counting(mapper))


# -- a list by primary key


def _by_key(bulk: _Bulk, params: list[dict[str, Any]]) -> Any:
    """Compare rows that come with a version, count those that come without, after one SELECT that locks them all."""
    states = {state.key[1]: state for state in bulk.prepare() if state.key is not None}
    rows = _rows(bulk, params)
    found = read_versions(bulk.session.connection(), bulk.mapper, [key for key, _ in rows], lock=True)
    for key, row in rows:
        _compare(bulk, key, row, found.get(key))
    before = {states[key]: found.get(key) for key, _ in rows if key in states}
    seen = {state: state.dict[bulk.attribute] for state in before}
    result = _run_rows(bulk, [row for _, row in rows])
    bulk.remember(bulk.read(before), seen=seen, before=before)
    bulk.versions.flushed()
    return result


def _run_rows(bulk: _Bulk, rows: list[dict[str, Any]]) -> Any:
    if bulk.kind.following is not None:
        return bulk.run(rows)
    # SQLAlchemy would write xmin too.  The rows are locked and compared, so each is an UPDATE of its own.
    result: Any = None
    statement = bulk.statement
    names = [bulk.mapper.get_property_by_column(column).key for column in bulk.mapper.primary_key]
    for row in rows:
        values = {name: value for name, value in row.items() if name not in (*names, bulk.attribute)}
        where = [getattr(bulk.mapper.class_, name) == row[name] for name in names]
        bulk.statement = statement.where(*where).values(values)
        result = bulk.run(None)
    return result


def _rows(bulk: _Bulk, params: list[dict[str, Any]]) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Return a copy of each row with its key, its version under the name that it is mapped by."""
    names = [bulk.mapper.get_property_by_column(column).key for column in bulk.mapper.primary_key]
    rows = [dict(given) for given in params]
    for row in rows:
        if "version" in row:
            row[bulk.attribute] = row.pop("version")
    return [(tuple(row.get(name) for name in names), row) for row in rows]


def _compare(bulk: _Bulk, key: tuple[Any, ...], row: dict[str, Any], found: Any) -> None:
    """Raise for a row that is at another version than the list says; put the version in where the list says none."""
    if bulk.attribute in row:
        check_type(bulk.mapper, row[bulk.attribute])
        if found != row[bulk.attribute]:
            raise stale_version(bulk.mapper.class_, key, row[bulk.attribute], found)
        return
    if found is None and None not in key and bulk.statement.whereclause is None:
        raise stale_version(bulk.mapper.class_, key, None, None)
    row[bulk.attribute] = bulk.kind.first() if found is None else found
