"""`scope`: a scope of whichever manager is activated."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqla_uow._api.manager import ActivePlace
from sqla_uow._scope.lookup import locate
from sqla_uow._scope.scope import ScopePlace
from sqla_uow._tasks.frames import current_places
from sqla_uow.errors import NoManagerError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractAsyncContextManager

    from sqla_uow._api.manager import UnitOfWorkManager
    from sqla_uow._scope.scope import Scope
    from sqla_uow.events import Observer

__all__ = ["scope"]


def scope(
    using: str = "default", /, *, position: str | None = None, observers: Sequence[Observer] = ()
) -> AbstractAsyncContextManager[Scope]:
    """Open a scope of the manager that is activated here; see `UnitOfWorkManager.scope`.

    A job that opens its scope so, and not by a manager that its module has made, runs in tests with the manager of the test.

    Args:
        using: the name of a manager.
        position: with replicas, how far the client of this scope has written.
        observers: objects that are told of the calls in this scope.

    Raises:
        NoManagerError: no manager of that name is activated.
    """
    return _activated(using).scope(position=position, observers=observers)


def _activated(using: str) -> UnitOfWorkManager[Any]:
    for place in current_places():
        if isinstance(place, ActivePlace) and place.name == using:
            return place.manager
        if isinstance(place, ScopePlace) and place.name == using:  # of a middleware: nobody has activated it
            return place.scope.manager
    locate(using, "scope()")  # raises, unless a unit is open whose manager nobody has activated
    raise NoManagerError(f"scope() found no manager {using!r}, only a unit of it; use manager.scope()")
