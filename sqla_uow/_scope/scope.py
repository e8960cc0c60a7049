"""Scopes: a request, a job, a test."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from sqla_uow._replicas.position import to_text
from sqla_uow._scope.places import ManagerPlace, UnitPlace, refuse_in_commit
from sqla_uow._scope.read_session import ReadSession
from sqla_uow._tasks.frames import current_places, pop, push, running_task
from sqla_uow.errors import NoUnitError, PropagationError

if TYPE_CHECKING:
    from types import TracebackType

    from sqla_uow._api.manager import UnitOfWorkManager
    from sqla_uow._replicas.router import LastWrite
    from sqla_uow._settings.sources import Sources
    from sqla_uow._unit.setup import Setup
    from sqla_uow._unit.unit import UnitOfWork
    from sqla_uow.errors import ConflictError
    from sqla_uow.events import Observer

__all__ = ["Scope", "ScopeContext", "ScopePlace"]


class Scope:
    """A request, a job or a test: outside any unit, `current_session()` is its read session.

    The read session is a read-only unit that begins with its first SQL.  Before an outermost transactional function
    begins, the read session gives way: its transaction ends, so that the task never holds two connections, and its
    objects stay readable.  Its first use after that function begins a new one.

    `UnitOfWorkManager.scope` and the middleware make scopes; do not make one by hand.
    """

    def __init__(
        self,
        manager: UnitOfWorkManager[Any],
        setup: Setup[Any],
        last_write: LastWrite | None,
        observers: tuple[Observer, ...],
        sources: Sources | None,
    ) -> None:
        self.manager: UnitOfWorkManager[Any] = manager
        self.setup: Setup[Any] = setup
        self.observers: tuple[Observer, ...] = observers
        self.sources: Sources | None = sources
        self.last_write: LastWrite | None = last_write
        self.place: ScopePlace | None = None
        self._loop = asyncio.get_running_loop()
        self.reading: ReadSession = ReadSession(setup, last_write, self._loop, sources)

    def is_of_this_loop(self) -> bool:
        """Say whether the running event loop is the scope's; another loop may not use its read session."""
        task = running_task()
        return task is not None and task.get_loop() is self._loop

    @property
    def position(self) -> str | None:
        """How far a replica must be to show what was written here; None where the manager has no replicas.

        It is made of digits, points and minus signs, so it fits into a cookie or a message; it is "" if nothing was
        written.  Pass it to the scope in which the same client goes on: ``manager.scope(position=...)``.
        """
        return None if self.last_write is None else to_text(self.last_write.position)

    def conflict_behind(self, error: BaseException) -> ConflictError | None:
        """Return what a transactional function would raise if it failed as the read session did; None if that did not.

        With it a read that met an outage or a conflict can be answered as a write is.

        Args:
            error: the exception that left the code in the scope.
        """
        return self.reading.conflict_behind(error)

    def open_unit(self) -> UnitOfWork[Any] | None:
        """Return the unit, of any manager, that was begun here inside this scope and is open; None if there is none.

        It does not see units of other tasks that were started here.
        """
        for place in current_places():
            if place is self.place:
                break
            if isinstance(place, UnitPlace) and (unit := place.open_unit()) is not None:
                return unit
        return None

    async def rest(self) -> None:
        """End the read session before a wait of unknown length; its next use begins a new one.

        It does nothing while another live task uses the read session, unless this task descends from it.

        Raises:
            ReadOnlyError: an object of the read session was changed, and nothing would ever write the change.
        """
        await self.reading.rest()

    async def close(self) -> None:
        """End the scope before its block ends; code that still looks for a unit in it gets `NoUnitError`.

        Use it if the rest of the block must not read any more, as when the response of a web request begins.
        Transactional functions still work, each with a unit of its own.  Closing it again does nothing.

        Raises:
            ReadOnlyError: an object of the read session was changed, and nothing would ever write the change.  The
                scope is closed all the same.
        """
        if self.place is not None:  # else its block has ended, and a task that it left behind goes on
            self.place.closed = True
        if not self.reading.is_unused():
            await self.reading.end_all(check=True)


class ScopePlace(ManagerPlace):
    """A scope is open here."""

    __slots__ = ("scope",)

    def __init__(self, scope: Scope) -> None:
        super().__init__(scope.setup)
        self.scope: Scope = scope

    def unit(self) -> UnitOfWork[Any]:
        if self.closed:
            raise NoUnitError(
                "the scope that was open here has ended; in a task that outlives it, or a background task, "
                "call a @transactional function, which opens its own unit"
            )
        refuse_in_commit()
        return self.scope.reading.unit()


class ScopeContext:
    """``async with manager.scope()``."""

    __slots__ = ("_last_write", "_manager", "_observers", "_place", "_setup", "_sources")

    def __init__(
        self,
        manager: UnitOfWorkManager[Any],
        setup: Setup[Any],
        last_write: LastWrite | None,
        observers: tuple[Observer, ...],
        sources: Sources | None,
    ) -> None:
        self._manager = manager
        self._setup = setup
        self._observers = observers
        self._sources = sources
        self._last_write = last_write
        self._place: ScopePlace | None = None

    async def __aenter__(self) -> Scope:
        if self._place is not None:
            raise PropagationError("a scope was entered twice; a scope is used once, call scope() again")
        scope = Scope(self._manager, self._setup, self._last_write, self._observers, self._sources)
        self._place = scope.place = ScopePlace(scope)
        push(self._place)
        return scope

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._place is not None
        scope = self._place.scope
        scope.place = None
        pop(self._place)
        if not scope.reading.is_unused():
            await scope.reading.end_all(check=error is None)
