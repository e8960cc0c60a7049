"""What can be found in a context: an activated manager, and a unit that is open."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from greenlet import getcurrent

from sqla_uow._tasks.frames import Place
from sqla_uow._transaction.committing import being_committed
from sqla_uow.errors import NoUnitError

if TYPE_CHECKING:
    from sqla_uow._transaction.transaction import Transaction
    from sqla_uow._unit.setup import Setup
    from sqla_uow._unit.unit import UnitOfWork

__all__ = ["ManagerPlace", "UnitPlace", "refuse_in_commit"]


class ManagerPlace(Place):
    """A manager is known here; nothing is open."""

    __slots__ = ("name", "setup")

    def __init__(self, setup: Setup[Any]) -> None:
        super().__init__(setup)
        self.setup: Setup[Any] = setup
        self.name: str = setup.name

    def open_unit(self) -> UnitOfWork[Any] | None:
        """Return the unit that a transactional call would join here."""
        return None

    def unit(self) -> UnitOfWork[Any]:
        """Return the unit whose session is the current one; raise if no unit is open."""
        refuse_in_commit()
        raise NoUnitError(
            f"no unit of work is open for manager {self.name!r}; call this inside a @transactional function, "
            "'async with manager.begin()', or a scope"
        )


def refuse_in_commit() -> None:
    """Say so where it is an event of the session's own COMMIT that looks for a unit: its place is closed by then.

    Raises:
        NoUnitError: it is.
    """
    transaction = being_committed.get(getcurrent()) if being_committed else None
    if transaction is not None:
        raise NoUnitError(
            f"{transaction.name} is being committed, so it is not looked up any more: in an event of COMMIT use the session that the "
            "event is given, and register hooks in the function, or in before_flush"
        )


class UnitPlace(ManagerPlace):
    """A unit is open here, until its end empties the place."""

    __slots__ = ("_transaction", "_unit")

    def __init__(self, setup: Setup[Any], unit: UnitOfWork[Any], transaction: Transaction) -> None:
        # All that ManagerPlace sets, without a call for each unit.
        self.key: object = setup
        self.setup: Setup[Any] = setup
        self.name: str = setup.name
        self.closed: bool = False
        self._unit: UnitOfWork[Any] | None = unit
        self._transaction: Transaction | None = transaction

    def empty(self) -> None:
        """Keep neither unit nor connection alive by the contexts that copied this place."""
        self._unit = self._transaction = None

    def open_unit(self) -> UnitOfWork[Any] | None:
        return None if self.closed else self._unit

    def open_transaction(self) -> Transaction | None:
        """Return the transaction of the unit that is open here."""
        return None if self.closed else self._transaction

    def unit(self) -> UnitOfWork[Any]:
        unit, transaction = self._unit, self._transaction
        if unit is None or transaction is None or self.closed:
            raise NoUnitError(
                "the unit of work that was open here has ended; in a task that outlives it, or a background task, "
                "call a @transactional function, which opens its own"
            )
        transaction.owner.check()
        return unit
