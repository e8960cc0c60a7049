"""What can be found in a context: an activated manager, and a unit that is open."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqla_uow._tasks import Place
from sqla_uow.errors import NoUnitError

if TYPE_CHECKING:
    from sqla_uow._manager import UnitOfWorkManager
    from sqla_uow._unit import UnitOfWork

__all__ = ["ManagerPlace", "UnitPlace"]


class ManagerPlace(Place):
    """A manager is known here; nothing is open."""

    __slots__ = ("manager", "name")

    def __init__(self, manager: UnitOfWorkManager[Any]) -> None:
        super().__init__(manager)
        self.manager: UnitOfWorkManager[Any] = manager
        self.name: str = manager._name

    def open_unit(self) -> UnitOfWork[Any] | None:
        """Return the unit that a transactional call would join here."""
        return None

    def unit(self) -> UnitOfWork[Any]:
        """Return the unit whose session is the current one, or raise why there is none."""
        raise NoUnitError(
            f"no unit of work is open for manager {self.name!r}; call this inside a @transactional function, "
            "'async with manager.begin()', or a scope"
        )


class UnitPlace(ManagerPlace):
    """A unit is open here, until its end empties the place."""

    __slots__ = ("_unit",)

    def __init__(self, manager: UnitOfWorkManager[Any], unit: UnitOfWork[Any]) -> None:
        super().__init__(manager)
        self._unit: UnitOfWork[Any] | None = unit

    def empty(self) -> None:
        """Keep neither unit nor connection alive by the contexts that copied this place."""
        self._unit = None

    def open_unit(self) -> UnitOfWork[Any] | None:
        return None if self.closed else self._unit

    def unit(self) -> UnitOfWork[Any]:
        unit = self._unit
        if unit is None or self.closed:
            raise NoUnitError(
                "the unit of work that was open here has ended; in a task that outlives it, or a background task, "
                "call a @transactional function, which opens its own"
            )
        unit._transaction.owner.check()
        return unit
