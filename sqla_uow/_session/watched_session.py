"""Units whose lazy loads are counted or refused: ``lazy_loads="warn"`` and ``"raise"`` of a manager.

They have session classes of their own, so that other units pay nothing.
"""

from __future__ import annotations

import sys
import warnings
from inspect import CO_VARARGS
from typing import TYPE_CHECKING, Any

from greenlet import getcurrent

from sqla_uow._session.load_advice import NO_WAITING, code_line_of, refusal, repeated
from sqla_uow._session.load_origin import NEVER_LOADED, UNASKED, Cause, Origin, origin_of
from sqla_uow._session.session import UnitSession
from sqla_uow.errors import NPlusOneWarning

if TYPE_CHECKING:
    from types import FrameType

    from sqlalchemy.orm import Session

    from sqla_uow.typing import LazyLoads

__all__ = ["watching"]

REPEATS = 10
"""How often one unit may send the same SELECT without a warning."""


class WatchedSession(UnitSession):
    """Counts the SELECTs of a unit."""

    refuses_lazy_loads = False
    _counts: dict[object, int] | None = None

    def _execute_internal(self, statement: Any, params: Any = None, **options: Any) -> Any:
        origin = None
        # A statement that a do_orm_execute listener goes on with comes here a second time.
        if getattr(statement, "is_select", False) and options.get("_parent_execute_state") is None:
            origin = self._origin(statement)
        if origin is None or self._flushing or self.transaction_of_unit is None:
            return super()._execute_internal(statement, params, **options)
        if self.refuses_lazy_loads and origin.cause in NEVER_LOADED:
            raise refusal(origin, f"{self.transaction_of_unit.name} refuses lazy loads")
        if origin.cause in UNASKED and not getattr(getcurrent(), "__sqlalchemy_greenlet_provider__", False):
            raise refusal(origin, NO_WAITING)  # before SQLAlchemy makes a coroutine that nobody awaits
        result = super()._execute_internal(statement, params, **options)
        self._count(origin, statement)
        return result

    def _origin(self, statement: Any) -> Origin | None:
        # The caller of execute() and the like: the ORM, for a load of its own, or the user, maybe in another greenlet.
        frame = sys._getframe(2).f_back
        while frame is not None and not _is_orm(frame) and self._was_given_to(frame):
            frame = frame.f_back  # an execute() of the user's session class, or a tracer's wrapper of it
        if frame is not None and _is_orm(frame):
            return origin_of(frame)
        return Origin(Cause.SELECT, statement._propagate_attrs.get("plugin_subject"))

    def _was_given_to(self, frame: FrameType) -> bool:
        code = frame.f_code
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & CO_VARARGS)]
        values = [frame.f_locals.get(name) for name in names]
        return any(value is self or (type(value) is tuple and any(one is self for one in value)) for value in values)

    def _count(self, origin: Origin, statement: Any) -> None:
        # A load of the ORM is identified by what it loads, a statement by the key of its compiled form.
        key: object = origin[:3]
        if origin.cause is Cause.SELECT:
            compiled = statement._generate_cache_key()
            if compiled is None:  # such a statement is never the same
                return
            key = compiled.key
        if self._counts is None:
            self._counts = {}
        times = self._counts[key] = self._counts.get(key, 0) + 1
        if times == REPEATS + 1:
            self._warn(origin, times)

    def _warn(self, origin: Origin, times: int) -> None:
        assert self.transaction_of_unit is not None
        place = code_line_of(sys._getframe(1))
        message = repeated(origin, times, self.transaction_of_unit.name, place)
        if place is None:
            warnings.warn(message, NPlusOneWarning, stacklevel=2)
        else:
            warnings.warn_explicit(message, NPlusOneWarning, *place)


def _is_orm(frame: FrameType) -> bool:
    module: str = frame.f_globals.get("__name__", "")
    return module.startswith(("sqlalchemy.orm", "sqla_uow."))


class RefusingSession(WatchedSession):
    """Refuses lazy loads, too."""

    refuses_lazy_loads = True


_WATCHING: dict[LazyLoads, type[UnitSession]] = {"warn": WatchedSession, "raise": RefusingSession}
_classes: dict[tuple[type[Session], LazyLoads], type[Session]] = {}


def watching(unit_class: type[Session], lazy_loads: LazyLoads) -> type[Session]:
    """Return a unit's session class that treats lazy loads like this; one class for each pair."""
    if lazy_loads == "allow":
        return unit_class
    key = unit_class, lazy_loads
    if key not in _classes:
        _classes[key] = type(f"{lazy_loads.title()}{unit_class.__name__}", (_WATCHING[lazy_loads], unit_class), {})
    return _classes[key]
