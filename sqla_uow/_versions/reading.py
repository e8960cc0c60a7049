"""Of which moment a version in memory is: of the one at which the object's data were read, or it could hide a change.

A version that goes with its data is in memory with them.  Two things part them: data that are expired, so that only the
version they had is still worth something; and a version that is read later than the data, as that of a child whose parent's
table was read first.  Either is noted in ``state.info``, which goes with an object into another session.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Any

from sqlalchemy import Column, event, inspect, select
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.orm.attributes import set_committed_value
from sqlalchemy.orm.base import LoaderCallableStatus

from sqla_uow._session.session import UnitSession
from sqla_uow._versions.mapping import VersionMixin, attribute_of
from sqla_uow._versions.rows import stale_version
from sqla_uow.errors import StaleVersionError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

    from sqlalchemy.orm import InstanceState, Mapper, Session

__all__ = ["bring_back", "seen", "set_seen", "settle"]

_SEEN = "sqla_uow.version_seen"
"""In ``state.info``: the version of data that were expired, or why there is none."""
_KNOWN = "sqla_uow.version_known"
"""In ``state.info``: the attributes that were expired with it; the body may still know what they were."""


class _Untold(Enum):
    """Why nothing tells the version of an object's data."""

    LATER = "the version in memory is later than the data, which can be compared themselves"
    LOST = "such data are expired"


def seen(state: InstanceState[Any]) -> Any:
    """Return the version that an object's data had when they were read, None if nothing tells."""
    noted = _noted(state)
    if isinstance(noted, _Untold):
        return None
    version = state.dict.get(attribute_of(state.mapper))
    return noted if version is None else version


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
    known = {key for key, _ in _data(state.mapper) if key in state.dict and (names is None or key in names)}
    if "info" not in state.__dict__ or _SEEN not in state.info:
        if version is not None and names is not None and attribute not in names:
            return  # it stays with what else is left
        if version is None and not known:
            return
        state.info[_SEEN] = _Untold.LOST if version is None else version
    elif state.info[_SEEN] is _Untold.LATER:
        if known:
            state.info[_SEEN] = _Untold.LOST
    elif version is not None and state.info[_SEEN] is not _Untold.LOST:
        state.info[_SEEN] = version  # read whole since the last time
        state.info.pop(_KNOWN, None)
    state.info[_KNOWN] = known | state.info.get(_KNOWN, set())


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
        # All was read, except what a load_only() left out: that is still in memory as it was (SQLAlchemy 2.0.58, 2.1.9).
        before = bool(state.callables) and any(key in state.dict for key in state.callables)
        noted = None
    elif attribute not in names or context.session._flushing:
        return
    else:
        noted = _noted(state)
        read = {key for key in names if key in state.dict}
        before = any(key in state.dict and key not in read for key, _ in _data(state.mapper))
        before = before or (noted is not None and not state.info.get(_KNOWN, read) <= read)
    if before and (noted is None or isinstance(noted, _Untold)):
        state.info[_SEEN] = noted or _Untold.LATER
        return
    if before:
        state.dict[attribute] = noted
    if "info" in state.__dict__:
        _drop_note(state)


@event.listens_for(VersionMixin, "expire", propagate=True)
def _expired(instance: VersionMixin, names: Collection[str] | None) -> None:
    """Take note that a savepoint's rollback has expired data whose version nothing tells.

    Where something does, it is noted by now, or brought back behind this.
    """
    state: InstanceState[Any] = inspect(instance)
    if names is not None or state.key is None or not isinstance(state.session, UnitSession):
        return
    if isinstance(state.info.setdefault(_SEEN, _Untold.LOST), _Untold):
        state.info[_SEEN] = _Untold.LOST
        state.info[_KNOWN] = {key for key, _ in _data(state.mapper)}


def bring_back(instance: object, version: Any) -> None:
    """Put a version of before into memory, where the data are expired by a savepoint's rollback."""
    state: InstanceState[Any] = inspect(instance)
    set_committed_value(instance, attribute_of(state.mapper), version)
    if "info" in state.__dict__:
        _drop_note(state)


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
        sqlalchemy.exc.InvalidRequestError: nor are there any data that could be compared.
    """
    attribute = attribute_of(state.mapper)
    version = state.dict.get(attribute)
    if "info" in state.__dict__ and _SEEN in state.info:
        noted = state.info[_SEEN]
        if noted is _Untold.LOST:
            raise _unread(state)
        if noted is _Untold.LATER:
            version = None
        elif version is None:
            version = noted
            set_committed_value(state.obj(), attribute, version)
    if version is None and state.key is not None:
        version = _compare_data(session, state)
    if "info" in state.__dict__:
        _drop_note(state)
    return version


def _drop_note(state: InstanceState[Any]) -> None:
    for name in (_SEEN, _KNOWN):
        state.info.pop(name, None)


def _unread(state: InstanceState[Any]) -> InvalidRequestError:
    assert state.key is not None
    return InvalidRequestError(
        f"{_name(state)} is to be written, and nothing tells at which version its data were read; refresh() it first, "
        "or write it by an update()"
    )


def _name(state: InstanceState[Any]) -> str:
    assert state.key is not None
    return f"{state.class_.__name__}({', '.join(map(repr, state.key[1]))})"


def _compare_data(session: Session, state: InstanceState[Any]) -> Any:
    """Return the row's version, if the row has the data that are in memory, and hold its lock."""
    mapper, instance = state.mapper, state.obj()
    assert state.key is not None
    assert instance is not None
    read = {key: _as_read(state, key) for key, _ in _data(mapper)}
    read = {key: value for key, value in read.items() if value is not LoaderCallableStatus.NO_VALUE}
    if not read:
        raise _unread(state)
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
            raise StaleVersionError(
                f"{_name(state)} is at version {row[0]!r}, and its {key} is not what was read before; read it again",
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
