"""What SQLAlchemy's events tell of versioned objects and their sessions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import event, inspect
from sqlalchemy.orm import object_session
from sqlalchemy.orm.attributes import flag_modified
from sqlalchemy.orm.exc import StaleDataError

from sqla_uow._session.instances import describe
from sqla_uow._session.session import UnitSession
from sqla_uow._transaction.transaction import transaction_of
from sqla_uow._versions.expectations import Versions, versions_of
from sqla_uow._versions.mapping import INFO_KEY, VersionMixin, attribute_of, kind_of
from sqla_uow._versions.reading import seen, settle
from sqla_uow._versions.rows import stale_version, version_table
from sqla_uow.errors import StaleVersionError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from sqlalchemy.engine import Connection
    from sqlalchemy.orm import InstanceState, Mapper, Session, SessionTransaction

__all__: list[str] = []


@event.listens_for(VersionMixin, "before_update", propagate=True)
def _before_update(mapper: Mapper[Any], connection: Connection, instance: object) -> None:
    versions = _writing(mapper, connection, instance)
    state: InstanceState[Any] = inspect(instance)
    if versions is not None and state in versions.touched:
        versions.touched.discard(state)
        _make_update(mapper, state, instance)


def _writing(mapper: Mapper[Any], connection: Connection, instance: object) -> Versions | None:
    """Tell the unit's versions what a flush is about to write; None if the session does not belong to a unit.

    Raises:
        TypeError: SQLAlchemy would not check how many rows were found, and only warn.
    """
    session = object_session(instance)
    transaction = transaction_of(session)
    if session is None or transaction is None:
        return None
    dialect = connection.dialect
    if not dialect.supports_sane_rowcount:
        name = f"{dialect.name}+{dialect.driver}"
        raise TypeError(
            f"the version of {describe(instance)} cannot be checked, as the dialect {name} says that its driver does not count "
            "rows; set engine.dialect.supports_sane_rowcount = True if it does, as psycopg 3 does, or use "
            "another driver"
        )
    versions = versions_of(transaction)
    state: InstanceState[Any] = inspect(instance)
    version = state.dict.get(attribute_of(mapper))
    if version is None or "info" in state.__dict__:
        version = settle(session, state)
    versions.writing(session, state, version)
    return versions


def _make_update(mapper: Mapper[Any], state: InstanceState[Any], instance: object) -> None:
    """Make the flush send an UPDATE for an object without any change.

    A key that is flagged as modified but has no old value is not set, so only the version is.  If the key is really changed, there
    is an UPDATE anyway.  If the database makes the version, something must be set: another column, to its own value.
    """
    kind, table = kind_of(mapper), version_table(mapper)
    keys = [mapper.get_property_by_column(column).key for column in mapper.primary_key]
    if any(key in state.committed_state and state.committed_state[key] != state.dict.get(key) for key in keys):
        return  # if it were flagged, the key would lose its old value, by which the row is found
    attribute = mapper.get_property_by_column(mapper.primary_key[0]).key
    if kind is not None and kind.following is None:
        plain = [column for column in table.columns if not (column.primary_key or column.system)]
        if not plain:
            raise TypeError(
                f"{describe(instance)} has no column except its key, so nothing can be written to change xmin"
            )
        attribute = mapper.get_property_by_column(plain[0]).key
    if attribute not in state.dict:
        getattr(instance, attribute)  # in a flush, where SQL is allowed
    flag_modified(instance, attribute)


@event.listens_for(VersionMixin, "refresh_flush", propagate=True)
def _written(instance: VersionMixin, _flush: Any, names: Collection[str]) -> None:
    """The unit itself has written the row: expect the new version from now on."""
    transaction = transaction_of(object_session(instance))
    if transaction is not None and isinstance(transaction.versions, Versions) and transaction.versions.expectations:
        state: InstanceState[Any] = inspect(instance)
        if attribute_of(state.mapper) in names:
            transaction.versions.move_on(state, state.dict[attribute_of(state.mapper)])


@event.listens_for(VersionMixin, "before_delete", propagate=True)
def _before_delete(mapper: Mapper[Any], connection: Connection, instance: object) -> None:
    if _writing(mapper, connection, instance) is not None and not connection.dialect.supports_sane_multi_rowcount:
        event.listen(connection, "after_execute", _check_deleted)


def _check_deleted(
    _connection: Connection, statement: Any, _many: Any, _parameters: Any, options: Any, result: Any
) -> None:
    """Check that a flush's DELETE of one row has found it.

    With a driver that cannot count the rows of a batch (asyncpg), SQLAlchemy 2.1.9 deletes versioned rows one by one, and ignores
    the counts if there were two rows or more.
    """
    if not getattr(statement, "is_delete", False) or "compiled_cache" not in options:
        return
    versioned = [column for column in statement.table.columns if INFO_KEY in column.info]
    if versioned and result.rowcount == 0:
        raise StaleDataError(
            f"a DELETE on table {statement.table.name!r} found no row of that version; read the object again"
        )


def _merge(session: Session, state: InstanceState[Any], merge: Callable[[], Any]) -> Any:
    """Merge; if the versions differ, say which two.

    Raises:
        StaleVersionError: the row, or the object of this session, is at another version.
    """
    mapper = state.mapper
    if not issubclass(state.class_, VersionMixin):
        return merge()
    key, attribute = _key_of(state), attribute_of(mapper)
    there = session.identity_map.get(key)
    if there is not None and attribute not in inspect(there).dict and attribute in state.dict:
        getattr(there, attribute)  # expired: SQLAlchemy would not compare, but assign
    try:
        return merge()
    except StaleVersionError:  # of an object that was merged with this one, by a cascade
        raise
    except StaleDataError as error:
        there = session.identity_map.get(key)
        found = None if there is None else seen(inspect(there))
        raise stale_version(state.class_, key[1], state.dict.get(attribute), found) from error


def _key_of(state: InstanceState[Any]) -> Any:
    return state.mapper.identity_key_from_instance(state.obj()) if state.key is None else state.key


UnitSession.on_merge = staticmethod(_merge)


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
    versions.roll_back_savepoint(savepoint)


@event.listens_for(UnitSession, "after_transaction_end")
def _transaction_ended(session: UnitSession, ended: SessionTransaction) -> None:
    transaction = session.transaction_of_unit
    if ended.nested and transaction is not None and isinstance(transaction.versions, Versions):
        transaction.versions.end_savepoint(session, ended)
