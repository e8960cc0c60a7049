"""What one unit knows about versions: those that a client expects, objects to be touched, and what savepoints bring back."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy import and_, event, inspect, or_, select
from sqlalchemy.orm import Mapper, object_session
from sqlalchemy.orm.attributes import flag_modified, set_committed_value
from sqlalchemy.orm.exc import StaleDataError

from sqla_uow._session import UnitSession
from sqla_uow._transaction import describe
from sqla_uow._version_mapping import INFO_KEY, VersionMixin, attribute_of, kind_of
from sqla_uow.errors import StaleVersionError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from sqlalchemy import Column, Select, Table
    from sqlalchemy.engine import Connection
    from sqlalchemy.ext.asyncio import AsyncEngine
    from sqlalchemy.orm import InstanceState, Session, SessionTransaction

    from sqla_uow._transaction import Transaction

__all__ = [
    "Expectation",
    "Versions",
    "key_columns",
    "read_versions",
    "stale_version",
    "transaction_of",
    "version_table",
    "versions_of",
]


class Expectation:
    """A version that a client has seen, and the unit's work stands on.

    Attributes:
        state: of the object.
        instance: kept, because the session's references are weak.
        expected: what the client said.
        now: that, moved on by the unit's own changes.
        checked: the database has compared it, and holds the row's lock for us.
    """

    __slots__ = ("checked", "expected", "instance", "now", "state")

    def __init__(self, instance: object, version: Any) -> None:
        self.instance = instance
        self.state: InstanceState[Any] = inspect(instance)
        self.expected = version
        self.now = version
        self.checked = False

    @property
    def key(self) -> tuple[Any, ...]:
        assert self.state.key is not None
        return self.state.key[1]

    def compare(self, found: Any) -> None:
        """Raise if the row is at another version than expected, or gone, which is None.

        Raises:
            StaleVersionError: with both versions.
        """
        if found != self.now:
            raise self.stale(found)

    def stale(self, found: Any) -> StaleVersionError:
        """Return the error for a version that was found instead."""
        return stale_version(type(self.instance), self.key, self.expected, found)


def stale_version(model: type[Any], key: tuple[Any, ...], expected: Any, found: Any) -> StaleVersionError:
    """Return the error for a row that is at another version than expected, or gone, which is None."""
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


class _Saved(NamedTuple):
    """A version as it was before a savepoint's first change of it; with the object, as the session's are weak."""

    instance: object
    version: Any
    now: Any
    checked: bool


class Versions:
    """The versions of one unit."""

    __slots__ = ("_saved", "_undone", "expectations", "touched")

    def __init__(self) -> None:
        self.expectations: dict[InstanceState[Any], Expectation] = {}
        self.touched: set[InstanceState[Any]] = set()
        self._saved: dict[SessionTransaction, dict[InstanceState[Any], _Saved]] = {}
        self._undone: set[SessionTransaction] = set()

    def expect(self, instance: object, version: Any) -> Expectation:
        """Remember what is expected of an object from now on; what was expected before still is."""
        expectation = Expectation(instance, version)
        return self.expectations.setdefault(expectation.state, expectation)

    # -- around the flush

    def writing(self, session: Session, mapper: Mapper[Any], state: InstanceState[Any]) -> None:
        """Compare once more, before SQL is made of an object: it may have been refreshed since."""
        expectation = self.expectations.get(state)
        if expectation is not None:
            expectation.compare(getattr(expectation.instance, attribute_of(mapper)))
        self.save(session, state)

    def flushed(self) -> None:
        """Move on the expectations that the unit's own flush has met."""
        for state, expectation in self.expectations.items():
            if state.deleted:
                expectation.checked = True
                continue
            now = state.dict.get(attribute_of(state.mapper), expectation.now)
            if now != expectation.now:
                expectation.now = now
                expectation.checked = True

    def check_unwritten(self, session: Session) -> None:
        """Compare in the database, under its lock, what the body has not written.

        Raises:
            StaleVersionError: a row was changed or deleted since the client saw it.
        """
        self._compare_in_database(session, [each for each in self.expectations.values() if not each.checked])

    def check_before_bulk(self, session: Session, mapper: Mapper[Any]) -> None:
        """Compare before a statement whose WHERE says nothing about versions; the locks last until the unit's end."""
        unchecked = [each for each in self.expectations.values() if not each.checked and each.state.mapper.isa(mapper)]
        self._compare_in_database(session, unchecked)
        for expectation in unchecked:
            expectation.checked = True

    def _compare_in_database(self, session: Session, expectations: Sequence[Expectation]) -> None:
        for mapper, group in _by_mapper(expectations):
            found = read_versions(session.connection(), mapper, [each.key for each in group], lock=True)
            for expectation in group:
                expectation.compare(found.get(expectation.key))

    # -- around savepoints

    def save(self, session: Session, state: InstanceState[Any]) -> None:
        """Keep an object's version for the innermost savepoint's rollback, which expires all that changed in it."""
        savepoint = session.get_nested_transaction()
        if savepoint is None:
            return
        saved = self._saved.setdefault(savepoint, {})
        attribute = attribute_of(state.mapper)
        if state not in saved and attribute in state.dict:
            expectation = self.expectations.get(state)
            now, checked = (None, False) if expectation is None else (expectation.now, expectation.checked)
            saved[state] = _Saved(state.obj(), state.dict[attribute], now, checked)

    def undo(self, savepoint: SessionTransaction) -> None:
        """Take note that a savepoint is being rolled back."""
        self._undone.add(savepoint)

    def leave(self, session: Session, savepoint: SessionTransaction) -> None:
        """Bring back the versions of a savepoint that was rolled back; hand those of a released one to the next."""
        saved = self._saved.pop(savepoint, {})
        if savepoint in self._undone:
            self._undone.discard(savepoint)
            for state, before in saved.items():
                self._restore(session, state, before)
            return
        outer = savepoint.parent
        while outer is not None and not outer.nested:
            outer = outer.parent
        if outer is not None and saved:
            self._saved[outer] = saved | self._saved.get(outer, {})

    def _restore(self, session: Session, state: InstanceState[Any], before: _Saved) -> None:
        if state.key is None or state.session is not session:
            return
        set_committed_value(before.instance, attribute_of(state.mapper), before.version)
        expectation = self.expectations.get(state)
        if expectation is not None and before.now is not None:
            expectation.now, expectation.checked = before.now, before.checked

    # -- after the end

    async def find_stale(self, engine: AsyncEngine) -> StaleVersionError | None:
        """Read the expected versions afresh, after the rollback, and return the error for one that has changed."""
        async with engine.connect() as connection:
            return await connection.run_sync(self._find_stale)

    def _find_stale(self, connection: Connection) -> StaleVersionError | None:
        for mapper, group in _by_mapper(self.expectations.values()):
            found = read_versions(connection, mapper, [each.key for each in group])
            for expectation in group:
                if found.get(expectation.key) != expectation.expected:
                    return expectation.stale(found.get(expectation.key))
        return None

    def stale(self, who: str) -> StaleVersionError:
        """Return the error for a write that found another version, where no row tells which one any more."""
        one = next(iter(self.expectations.values())) if len(self.expectations) == 1 else None
        return StaleVersionError(
            f"{who} wrote a row that was changed since it was read, in a unit that expects a version; read it again, and let "
            "the client decide",
            model=None if one is None else type(one.instance),
            key=None if one is None else one.key,
            expected=None if one is None else one.expected,
        )


def _by_mapper(expectations: Iterable[Expectation]) -> list[tuple[Mapper[Any], list[Expectation]]]:
    # By the version's table, so that one statement asks for all classes of an inheritance.
    ordered = sorted(expectations, key=lambda each: str(version_table(each.state.mapper)))
    groups = groupby(ordered, key=lambda each: version_table(each.state.mapper))
    return [(members[0].state.mapper, members) for members in (list(group) for _, group in groups)]


# -- reading versions


def version_table(mapper: Mapper[Any]) -> Table:
    """Return the table that the version stands in; in joined inheritance, a parent's."""
    column = mapper.version_id_col
    assert column is not None
    table: Table = column.table
    return table


def key_columns(mapper: Mapper[Any], table: Any = None) -> list[Column[Any]]:
    """Return the columns of a table, the version's by default, that make up the identity, in its order."""
    table = version_table(mapper) if table is None else table
    properties = [mapper.get_property_by_column(column) for column in mapper.primary_key]
    columns = [next((column for column in each.columns if column.table is table), None) for each in properties]
    found = [column for column in columns if column is not None]
    # A child's key may go by another name than its parent's; it stands in the same order.
    return found if len(found) == len(columns) else list(table.primary_key)


def read_versions(
    connection: Connection, mapper: Mapper[Any], keys: Sequence[tuple[Any, ...]], *, lock: bool = False
) -> dict[tuple[Any, ...], Any]:
    """Read the versions of rows; one that does not exist is missing.

    Args:
        connection: of the unit, or another.
        mapper: of the rows.
        keys: identities.
        lock: keep others from changing them until the transaction ends, in the order of the keys.
    """
    if not keys:
        return {}
    rows = connection.execute(_select_versions(mapper, keys, lock=lock)).all()
    return {tuple(row[:-1]): row[-1] for row in rows}


def _select_versions(mapper: Mapper[Any], keys: Sequence[tuple[Any, ...]], *, lock: bool) -> Select[Any]:
    columns = key_columns(mapper)
    assert mapper.version_id_col is not None
    statement = select(*columns, mapper.version_id_col)
    if len(columns) == 1:
        statement = statement.where(columns[0].in_([key[0] for key in keys]))
    else:
        pairs = [and_(*(column == value for column, value in zip(columns, key, strict=True))) for key in keys]
        statement = statement.where(or_(*pairs))
    # key_share: on PostgreSQL a foreign key to the row must not wait for us.
    return statement.order_by(*columns).with_for_update(key_share=True) if lock else statement


# -- the events


def transaction_of(session: Session | None) -> Transaction | None:
    """Return the unit's transaction behind a session, None for a session of nobody's unit."""
    transaction: Transaction | None = getattr(session, "transaction_of_unit", None)
    return transaction


def versions_of(transaction: Transaction) -> Versions:
    """Return the unit's versions, from now on there."""
    if transaction.versions is None:
        transaction.versions = Versions()
    return transaction.versions


@event.listens_for(VersionMixin, "before_update", propagate=True)
def _before_update(mapper: Mapper[Any], _connection: Connection, instance: object) -> None:
    session = object_session(instance)
    transaction = transaction_of(session)
    if session is None or transaction is None:
        return
    state: InstanceState[Any] = inspect(instance)
    versions = versions_of(transaction)
    versions.writing(session, mapper, state)
    if state in versions.touched:
        versions.touched.discard(state)
        _make_update(mapper, state, instance)


def _make_update(mapper: Mapper[Any], state: InstanceState[Any], instance: object) -> None:
    """Have the flush send an UPDATE of an object without any change.

    A key that is flagged as modified, but has no old value, is in no SET clause: the version alone is.  Where the
    database makes the version something has to be set, so it is another column to its own value.
    """
    kind, table = kind_of(mapper), version_table(mapper)
    attribute = mapper.get_property_by_column(mapper.primary_key[0]).key
    if kind is not None and kind.following is None:
        plain = [column for column in table.columns if not (column.primary_key or column.system)]
        if not plain:
            raise TypeError(f"{describe(instance)} has no column but its key, so that xmin cannot be made to change")
        attribute = mapper.get_property_by_column(plain[0]).key
    if attribute not in state.dict:
        getattr(instance, attribute)  # in a flush, where SQL is allowed
    flag_modified(instance, attribute)


@event.listens_for(VersionMixin, "before_delete", propagate=True)
def _before_delete(mapper: Mapper[Any], connection: Connection, instance: object) -> None:
    session = object_session(instance)
    transaction = transaction_of(session)
    if session is None or transaction is None:
        return
    versions_of(transaction).writing(session, mapper, inspect(instance))
    if not connection.dialect.supports_sane_multi_rowcount:
        event.listen(connection, "after_execute", _check_deleted)


def _check_deleted(
    _connection: Connection, statement: Any, _many: Any, _parameters: Any, options: Any, result: Any
) -> None:
    """Compare the count of a flush's DELETE of one row.

    SQLAlchemy 2.1.9 deletes versioned rows one by one where a driver counts no batches (asyncpg), and then drops the sum
    of the counts if there were two rows or more.
    """
    if not getattr(statement, "is_delete", False) or "compiled_cache" not in options:
        return
    versioned = [column for column in statement.table.columns if INFO_KEY in column.info]
    if versioned and result.rowcount == 0:
        raise StaleDataError(
            f"a DELETE on table {statement.table.name!r} found no row of that version; read the object again"
        )


@event.listens_for(UnitSession, "after_rollback")
def _rolled_back(session: UnitSession) -> None:
    savepoint = session.get_nested_transaction()
    transaction = session.transaction_of_unit
    if savepoint is None or transaction is None:
        return
    changed = [instance for instance in session.dirty if isinstance(instance, VersionMixin)]
    if transaction.versions is None and not changed:
        return
    versions = versions_of(transaction)
    for instance in changed:  # not flushed yet; its version is expired with the change
        versions.save(session, inspect(instance))
    versions.undo(savepoint)


@event.listens_for(UnitSession, "after_transaction_end")
def _transaction_ended(session: UnitSession, ended: SessionTransaction) -> None:
    transaction = session.transaction_of_unit
    if ended.nested and transaction is not None and transaction.versions is not None:
        transaction.versions.leave(session, ended)
