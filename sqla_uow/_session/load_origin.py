"""Why the ORM sends a SELECT: a lazy load, an expired attribute, a refresh, a key, or a statement of the user.

A session is told which statement to send and not why, but the frames that call it know.  SQLAlchemy's loaders have the same
names in 2.0.58 and 2.1.9, and the flag by which its own ``raiseload`` allows what was asked for.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy import Column
from sqlalchemy.orm import PassiveFlag

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

    from sqlalchemy.orm import ColumnProperty, InstanceState, Mapper, MapperProperty

__all__ = ["NEVER_LOADED", "UNASKED", "Cause", "Origin", "origin_of"]


class Cause(Enum):
    """Why a SELECT is sent."""

    RELATIONSHIP = "an attribute was used that was never loaded: a relationship"
    COLUMN = "an attribute was used that was never loaded: a deferred column"
    SUBCLASS = "an attribute was used that was never loaded: a column of a subclass, whose object a statement of its base has loaded"
    EXPIRED = "an attribute was used that had been loaded, and was expired"
    REFRESH = "refresh()"
    KEY = "get()"
    SELECT = "a statement of the user"


NEVER_LOADED = Cause.RELATIONSHIP, Cause.COLUMN, Cause.SUBCLASS
"""An attribute was used that the statement which loaded its object left out."""
UNASKED = *NEVER_LOADED, Cause.EXPIRED
"""An attribute was used, and its value was not there."""


class Origin(NamedTuple):
    """What is loaded, and why.

    Attributes:
        cause: why.
        mapper: of the object.
        names: of the attributes that are loaded, if it is these.
        path: how SQLAlchemy came to the attribute, from the first entity of the user's statement: entity and property in
            turn; empty if no loader option can help.
        base: for a column of a subclass, the class whose statement loaded the object.
    """

    cause: Cause
    mapper: Mapper[Any] | None
    names: tuple[str, ...] = ()
    path: tuple[Any, ...] = ()
    base: Mapper[Any] | None = None


def origin_of(frame: FrameType | None) -> Origin | None:
    """Return why a SELECT is sent; None if it belongs to one that was asked for, as selectinload() does, or to a cascade.

    Args:
        frame: of `Session._execute_internal`, or what called that.
    """
    while frame is not None:
        module: str = frame.f_globals.get("__name__", "")
        if module.startswith("sqlalchemy.orm"):
            name = frame.f_code.co_name
            if name in _READ:
                return _READ[name](frame)
            if name == "invoke" or (module == "sqlalchemy.orm.strategies" and name != "_emit_lazyload"):
                return None  # for a statement whose rows are being fetched: selectin, subquery, immediate, polymorphic
        elif not module.startswith(("sqla_uow", "sqlalchemy")):
            break
        frame = frame.f_back
    return None


def _unloaded(frame: FrameType) -> Origin | None:
    """Read the frame of a loader strategy, which loads an attribute that is not there."""
    called = frame.f_locals
    if called["passive"] & PassiveFlag.NO_RAISE:  # immediateload, refresh(names), cascades, merge, history
        return None
    loaded, state = called["self"].parent_property, called["state"]
    relationship = hasattr(loaded, "direction")
    cause = Cause.RELATIONSHIP if relationship else Cause.COLUMN
    return Origin(cause, state.mapper, (loaded.key,), _path(state, loaded))


def _expired(frame: FrameType) -> Origin:
    caller = frame.f_back
    assert caller is not None  # the attribute
    state, name = frame.f_locals["self"], caller.f_locals["key"]
    asked_for = frame.f_locals["passive"] & PassiveFlag.NO_RAISE  # as above
    made_here = state.runid is None  # it was not loaded by a statement; values that the INSERT has made are expired
    base = None if asked_for or made_here or state.expired else _base_of(state, name)
    if base is None:
        return Origin(Cause.EXPIRED, state.mapper, (name,))
    return Origin(Cause.SUBCLASS, state.mapper, (name,), state.load_path.path[:-1] if state.load_path else (), base)


def _base_of(state: InstanceState[Any], name: str) -> Mapper[Any] | None:
    """Return the base class whose statement has loaded an object without this column of its own class; None for other columns.

    SQLAlchemy marks all columns that a class adds to its base as expired.
    """
    owner: Mapper[Any] = state.mapper
    while owner.inherits is not None and name in owner.inherits.attrs:
        owner = owner.inherits
    left_out: Mapper[Any] | None = None
    while owner.inherits is not None and _is_left_out(state, owner):
        left_out = owner = owner.inherits
    return left_out


def _is_left_out(state: InstanceState[Any], mapper: Mapper[Any]) -> bool:
    assert mapper.inherits is not None
    own = [one.key for one in mapper.column_attrs if one.key not in mapper.inherits.attrs and _is_kept(one)]
    return bool(own) and state.expired_attributes.issuperset(own)


def _is_kept(loaded: ColumnProperty[Any]) -> bool:
    """Say whether an UPDATE leaves the attribute as it is: a flush expires the others, too."""
    column: Any = loaded.columns[0]
    return isinstance(column, Column) and not (loaded.deferred or column.onupdate or column.server_onupdate)


def _refresh(frame: FrameType) -> Origin:
    state = frame.f_locals["state"]
    names = tuple(frame.f_locals["attribute_names"] or ())
    related = [name for name in names if name in state.mapper.relationships]
    path = _path(state, state.mapper.attrs[related[0]]) if related else ()
    return Origin(Cause.REFRESH, state.mapper, tuple(related or names), path)


def _path(state: InstanceState[Any], loaded: MapperProperty[Any]) -> tuple[Any, ...]:
    # An object that was made and not loaded has no path.
    registry: Any = state.load_path or state.mapper._path_registry
    path: tuple[Any, ...] = registry[loaded].path
    return path


def _key(frame: FrameType) -> Origin:
    return Origin(Cause.KEY, frame.f_locals["mapper"])


def _query(_frame: FrameType) -> Origin:
    return Origin(Cause.SELECT, None)


_READ: dict[str, Callable[[FrameType], Origin | None]] = {
    "_load_for_state": _unloaded,
    "_load_expired": _expired,
    "refresh": _refresh,
    "_get_impl": _key,
    "_iter": _query,  # of Query, as in run_sync() and lazy="dynamic"
}
