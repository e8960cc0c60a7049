"""Of which moment a version in memory is: of the one at which the object's data were read, or it could hide a change.

A version that goes with its data is in memory with them.  Two things part them: data that are expired, so that only the
version they had is still worth something; and a version that is read later than the data, as that of a child whose parent's
table was read first.  Either is noted in ``state.info``, which goes with an object into another session.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import Column, event, inspect, select
from sqlalchemy.orm.attributes import set_committed_value
from sqlalchemy.orm.base import LoaderCallableStatus

from sqla_uow._session import UnitSession
from sqla_uow._version_mapping import VersionMixin, attribute_of
from sqla_uow._version_rows import stale_version
from sqla_uow.errors import StaleVersionError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

    from sqlalchemy.orm import InstanceState, Mapper, Session

__all__ = ["seen", "set_seen", "settle"]

_SEEN = "sqla_uow.version_seen"
"""In ``state.info``: the version of data that were expired, or None where the version in memory is later than the data."""


def seen(state: InstanceState[Any]) -> Any:
    """Return the version that an object's data had when they were read, None if nothing tells."""
    version = state.dict.get(attribute_of(state.mapper))
    return _noted(state) if version is None else version


def set_seen(state: InstanceState[Any], version: Any) -> None:
    """Put a version into memory as a loaded one; of data that are expired it stays a note."""
    instance = state.obj()
    if instance is None:
        return
    if attribute_of(state.mapper) in state.dict or _noted(state) is None:
        set_committed_value(instance, attribute_of(state.mapper), version)
    else:
        state.info[_SEEN] = version


def _noted(state: InstanceState[Any]) -> Any:
    return state.info.get(_SEEN) if "info" in state.__dict__ else None


# -- what parts a version from its data


def _forget(state: InstanceState[Any], names: Collection[str] | None) -> None:
    """Note the version of data that are about to be expired.

    Args:
        state: of any object.
        names: of what is expired; all with None.
    """
    if not issubclass(state.class_, VersionMixin) or state.key is None:
        return
    attribute = attribute_of(state.mapper)
    version = state.dict.get(attribute)
    if version is None or (names is not None and attribute not in names):
        return
    # That a version is later than its data, stays true of what is left of them.
    if not ("info" in state.__dict__ and state.info.get(_SEEN, version) is None):
        state.info[_SEEN] = version


def _widen(session: Session, instance: object, names: Iterable[str]) -> Iterable[str] | None:
    """Return what to refresh instead of these names: the version stands for all of the row, so all with it."""
    names = list(names)
    if not isinstance(instance, VersionMixin) or not {attribute_of(inspect(instance).mapper), "version"} & {*names}:
        return names
    session._autoflush()
    return names if inspect(instance).committed_state else None


UnitSession.on_expire = staticmethod(_forget)
UnitSession.on_refresh = staticmethod(_widen)


@event.listens_for(VersionMixin, "refresh", propagate=True)
def _refreshed(instance: VersionMixin, context: Any, names: Collection[str] | None) -> None:
    """Compare what was read now with what is in memory from before."""
    if context is None:  # an UPDATE that SQLAlchemy has evaluated in Python
        return
    state: InstanceState[Any] = inspect(instance)
    attribute = attribute_of(state.mapper)
    if names is None:
        if "info" in state.__dict__:
            state.info.pop(_SEEN, None)
        return
    if attribute not in names or context.session._flushing:
        return
    if not any(key in state.dict and key not in names for key, _ in _data(state.mapper)):
        if "info" in state.__dict__:
            state.info.pop(_SEEN, None)
        return
    noted = _noted(state)
    if noted is None:
        state.info[_SEEN] = None
    else:
        state.dict[attribute] = noted
        del state.info[_SEEN]


def _data(mapper: Mapper[Any]) -> Iterator[tuple[str, Column[Any]]]:
    """Yield the attributes that a row's change may have changed."""
    for each in mapper.column_attrs:
        column = each.columns[0]
        constant = column in mapper.primary_key or column is mapper.version_id_col or column is mapper.polymorphic_on
        if isinstance(column, Column) and not constant:
            yield each.key, column


# -- before an object is written


def settle(session: Session, state: InstanceState[Any]) -> Any:
    """Return the version that an object about to be written is compared with, and put it into memory.

    Raises:
        StaleVersionError: nothing tells the version of its data, and the row has other data by now, or is gone.
    """
    attribute = attribute_of(state.mapper)
    version = state.dict.get(attribute)
    if "info" in state.__dict__ and _SEEN in state.info:
        noted = state.info.pop(_SEEN)
        if version is None and noted is not None:
            version = noted
            set_committed_value(state.obj(), attribute, version)
        elif noted is None:
            version = None
    if version is None and state.key is not None:
        version = _compare_data(session, state)
    return version


def _compare_data(session: Session, state: InstanceState[Any]) -> Any:
    """Return the row's version, if the row has the data that are in memory, and hold its lock."""
    mapper, instance = state.mapper, state.obj()
    assert state.key is not None
    assert instance is not None
    read = {key: _as_read(state, key) for key, _ in _data(mapper)}
    read = {key: value for key, value in read.items() if value is not LoaderCallableStatus.NO_VALUE}
    columns = [getattr(mapper.class_, key) for key in read]
    version = getattr(mapper.class_, attribute_of(mapper))
    keys = zip(mapper.primary_key, state.key[1], strict=True)
    chosen = select(version, *columns).where(*(column == value for column, value in keys)).with_for_update()
    row = session.execute(chosen).first()
    if row is None:
        raise stale_version(mapper.class_, state.key[1], None, None)
    types = dict(_data(mapper))
    for (key, value), found in zip(read.items(), row[1:], strict=True):
        if not types[key].type.compare_values(value, found):
            name = f"{mapper.class_.__name__}({', '.join(map(repr, state.key[1]))})"
            raise StaleVersionError(
                f"{name} is at version {row[0]!r}, and its {key} is not what was read before; read it again",
                model=mapper.class_,
                key=state.key[1],
                found=row[0],
            )
    set_committed_value(instance, attribute_of(mapper), row[0])
    return row[0]


def _as_read(state: InstanceState[Any], key: str) -> Any:
    """Return an attribute as it was loaded, before it was changed."""
    loaded: Any = state.dict.get(key, LoaderCallableStatus.NO_VALUE)
    return state.committed_state.get(key, loaded)
