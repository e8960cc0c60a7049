"""Where a manager, its unit and its scope are found in this context."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from sqla_uow._scope.places import ManagerPlace, UnitPlace
from sqla_uow._scope.scope import ScopePlace
from sqla_uow._tasks.frames import current_places
from sqla_uow.errors import NoManagerError

if TYPE_CHECKING:
    from sqla_uow._replicas.router import LastWrite
    from sqla_uow._scope.scope import Scope
    from sqla_uow._transaction.transaction import Transaction
    from sqla_uow._unit.setup import Setup
    from sqla_uow._unit.unit import UnitOfWork

__all__ = ["innermost", "last_write_of", "locate", "surroundings"]


def innermost(using: object) -> ManagerPlace | None:
    """Return the innermost place of a manager, by its name or its setup."""
    place: Any  # only ManagerPlaces are pushed; to assert it at each call would cost as much as finding the first
    for place in current_places():
        if place.name == using or place.setup is using:
            return cast("ManagerPlace", place)
    return None


def locate(using: str | Setup[Any], who: str) -> tuple[Setup[Any], UnitOfWork[Any] | None]:
    """Return the setup of the manager that `using` names in this context, and the unit that a call of it would join.

    Raises:
        NoManagerError: none is activated under that name.
    """
    place = innermost(using)
    if place is not None:
        return place.setup, place.open_unit()
    if isinstance(using, str):
        raise NoManagerError(
            f"{who} found no manager {using!r}; activate one with 'with manager.activate():', or run it behind a middleware"
        )
    return using, None


def surroundings(setup: Setup[Any]) -> tuple[Scope | None, bool, tuple[Transaction, ...]]:
    """Return what is open around here.

    Returns:
        the innermost scope of this manager, whatever lies between; whether a unit of it lies between; and the
        transactions of every manager.
    """
    scope: Scope | None = None
    inside = False
    transactions: tuple[Transaction, ...] = ()
    for place in current_places():
        if isinstance(place, UnitPlace):
            transaction = place.open_transaction()
            if transaction is not None:
                transactions += (transaction,)
                inside = inside or (scope is None and place.setup is setup)
        elif isinstance(place, ScopePlace) and not place.closed:
            if scope is None and place.setup is setup and place.scope.is_of_this_loop():
                scope = place.scope
            elif place.scope.reading.transaction is not None:
                transactions += (place.scope.reading.transaction,)  # holds a connection, and will not give way to us
    return scope, inside, transactions


def last_write_of(setup: Setup[Any]) -> LastWrite | None:
    """Return what the client of this context has written; None if there are no replicas.

    The client is that of the innermost scope, even if the scope has ended.  Outside all scopes everybody is one client.
    """
    if setup.replicas is None:
        return None
    for place in current_places():
        if isinstance(place, ScopePlace) and place.setup is setup and place.scope.last_write is not None:
            return place.scope.last_write
    return setup.replicas.last_write
