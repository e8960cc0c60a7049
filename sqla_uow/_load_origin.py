"""Why the ORM sends a SELECT: a lazy load, an expired attribute, a refresh, a key, or a statement of the user.

A session is told which statement to send and not why, but the frames that call it know.  SQLAlchemy's loaders have the same
names in 2.0.58 and 2.1.9, and carry the flag by which its own ``raiseload`` spares what was asked for.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy.orm import PassiveFlag

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

    from sqlalchemy.orm import InstanceState, Mapper, MapperProperty

__all__ = ["UNASKED", "Cause", "Origin", "origin_of"]


class Cause(Enum):
    """Why a SELECT is sent."""

    RELATIONSHIP = "an attribute was used that was never loaded: a relationship"
    COLUMN = "likewise: a deferred column"
    EXPIRED = "an attribute was used that had been loaded, and was expired"
    REFRESH = "refresh()"
    KEY = "get()"
    SELECT = "a statement of the user"


UNASKED = Cause.RELATIONSHIP, Cause.COLUMN, Cause.EXPIRED
"""An attribute was used, and its value was not there."""


class Origin(NamedTuple):
    """What is loaded, and why.

    Attributes:
        cause: why.
        mapper: of the object.
        names: of its attributes, where they are what is loaded.
        path: how SQLAlchemy came to the attribute, from the first entity of the user's statement: entity and property in
            turn; empty where no loader option can help.
    """

    cause: Cause
    mapper: Mapper[Any] | None
    names: tuple[str, ...] = ()
    path: tuple[Any, ...] = ()


def origin_of(frame: FrameType | None) -> Origin | None:
    """Return why a SELECT is sent; None if it serves one that was asked for, as selectinload() does, or a cascade.

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
                return None  # of a statement whose rows are being fetched: selectin, subquery, immediate, polymorphic
        elif not module.startswith(("sqla_uow", "sqlalchemy")):
            break
        frame = frame.f_back
    return None


def _unloaded(frame: FrameType) -> Origin | None:
    """Read the frame of a strategy: what loads an attribute that is not there."""
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
    return Origin(Cause.EXPIRED, frame.f_locals["self"].mapper, (caller.f_locals["key"],))


def _refresh(frame: FrameType) -> Origin:
    state = frame.f_locals["state"]
    names = tuple(frame.f_locals["attribute_names"] or ())
    related = [name for name in names if name in state.mapper.relationships]
    path = _path(state, state.mapper.attrs[related[0]]) if related else ()
    return Origin(Cause.REFRESH, state.mapper, tuple(related or names), path)


def _path(state: InstanceState[Any], loaded: MapperProperty[Any]) -> tuple[Any, ...]:
    # An object that was not loaded but made has come by no path.
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
