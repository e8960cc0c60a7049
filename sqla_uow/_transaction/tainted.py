"""ORM objects that no later unit may take over: those of a failed attempt, and those of the scope's read session."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypeAlias
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from sqlalchemy.orm import InstanceState

__all__ = ["Reason", "Tainted"]

Reason: TypeAlias = Literal["attempt", "read"]


class Tainted:
    """The ORM objects that may not be attached to a unit, with the reasons."""

    __slots__ = ("_reasons",)

    def __init__(self) -> None:
        # Made with the first: most have none.
        self._reasons: WeakKeyDictionary[InstanceState[Any], Reason] | None = None

    def get(self, state: InstanceState[Any]) -> Reason | None:
        """Return why an object may not be attached, None if it may."""
        return None if self._reasons is None else self._reasons.get(state)

    def add(self, state: InstanceState[Any], reason: Reason) -> None:
        if self._reasons is None:
            self._reasons = WeakKeyDictionary()
        self._reasons[state] = reason

    def copy(self) -> Tainted:
        copied = Tainted()
        copied._reasons = None if self._reasons is None else self._reasons.copy()
        return copied
