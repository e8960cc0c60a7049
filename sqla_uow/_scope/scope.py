"""Scopes, and their read session."""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from typing import TYPE_CHECKING, Any

from sqlalchemy.exc import SQLAlchemyError

from sqla_uow._databases.failures import chain
from sqla_uow._log import record
from sqla_uow._replicas.position import to_text
from sqla_uow._scope.places import ManagerPlace, UnitPlace, refuse_in_commit
from sqla_uow._session.instances import Tainted, taint
from sqla_uow._session.session import has_changes, refuse_changes
from sqla_uow._tasks.frames import check_loop, current_places, pop, push, running_task
from sqla_uow._tasks.shield import shielded
from sqla_uow._transaction.phase import Phase
from sqla_uow._unit.commit import COMMIT_SECONDS, failure_of
from sqla_uow._unit.rollback import close_unused, release, roll_back
from sqla_uow._unit.unit import UnitOfWork
from sqla_uow.errors import ConflictError, NoUnitError, PropagationError, ReadOnlyError, RollbackOnlyError
from sqla_uow.typing import Status

if TYPE_CHECKING:
    from types import TracebackType

    from sqlalchemy.ext.asyncio import AsyncSession
    from sqlalchemy.orm import Session

    from sqla_uow._api.manager import UnitOfWorkManager
    from sqla_uow._replicas.router import LastWrite
    from sqla_uow._transaction.transaction import Transaction
    from sqla_uow._unit.setup import Setup
    from sqla_uow.events import Observer

__all__ = ["Scope", "ScopeContext", "ScopePlace"]

_READER = "the read session of this scope"


class Scope:
    """A request, a job or a test: outside any unit, `current_session()` is its read session.

    The read session is a read-only unit that begins with its first SQL.  Before an outermost transactional function
    begins, it gives way: its transaction is ended, so that the task never holds two connections, and its objects stay
    readable.  After that function the next use begins a fresh one.

    Made by `UnitOfWorkManager.scope` and by middleware, never by hand.
    """

    def __init__(
        self,
        manager: UnitOfWorkManager[Any],
        setup: Setup[Any],
        last_write: LastWrite | None,
        observers: tuple[Observer, ...],
    ) -> None:
        self.manager: UnitOfWorkManager[Any] = manager
        self.setup: Setup[Any] = setup
        self.observers: tuple[Observer, ...] = observers
        self.last_write: LastWrite | None = last_write
        self.tainted: Tainted = Tainted()
        self.reader: UnitOfWork[Any] | None = None
        self.place: ScopePlace | None = None
        self._loop = asyncio.get_running_loop()
        self._giving_way: asyncio.Lock | None = None
        self._failed: Transaction | None = None
        self._retired: list[UnitOfWork[Any]] = []

    def is_of_this_loop(self) -> bool:
        """Say whether the running event loop is its own: to another one its read session is somebody else's."""
        task = running_task()
        return task is not None and task.get_loop() is self._loop

    def read_unit(self) -> UnitOfWork[Any]:
        """Return the open read unit; make one where there is none."""
        reader = self.reader
        check_loop(_READER, self._loop)
        if reader is None:
            reader = self.reader = UnitOfWork(self.setup.read_transaction(_READER, self.last_write))
            self.setup.counts.readings += 1
        else:
            reader._transaction.owner.check()
        return reader

    @property
    def position(self) -> str | None:
        """How far a replica must be to show what was written here; None where the manager has no replicas.

        Digits, points and minus signs, made for a cookie or a message; "" if nothing was written.  Give it to the scope in
        which the same client goes on: ``manager.scope(position=...)``.
        """
        return None if self.last_write is None else to_text(self.last_write.position)

    def conflict_behind(self, error: BaseException) -> ConflictError | None:
        """Return what a transactional function would have raised, had it failed as the read session has; None if it has not.

        So that a read in an outage, or one that met a conflict, is answered as a write is.

        Args:
            error: what came out of the code in the scope.
        """
        reader = self._failed if self.reader is None else self.reader._transaction
        failure = None if reader is None else reader.failure_behind(list(chain(error)))
        if failure is None:
            return None
        what = failure.kind.value if failure.code is None else f"{failure.kind.value} {failure.code}"
        conflict = ConflictError(
            f"{_READER} failed by {what}; do all of it again, or read in a @transactional(read_only=True) function, which is "
            "run again by itself",
            reason=failure.kind.value, code=failure.code,
        )  # fmt: skip
        conflict.__cause__ = error
        return conflict

    def open_unit(self) -> UnitOfWork[Any] | None:
        """Return the unit, of any manager, that was begun here inside this scope and is still open; None if there is none.

        Other tasks, that were started here, may have units of their own, which are not seen.
        """
        for place in current_places():
            if place is self.place:
                break
            if isinstance(place, UnitPlace) and (unit := place.open_unit()) is not None:
                return unit
        return None

    def refuse_unsaved(self) -> None:
        """Raise if an object of the read session was changed: nothing would ever write it.

        Raises:
            ReadOnlyError: naming the object and the cures.
        """
        if self.reader is not None:
            _refuse_unsaved(self.reader)
        for reader in self._retired:
            _refuse_unsaved(reader)

    async def give_way(self) -> None:
        """End the read transaction, so that its connection is free; keep its objects attached and readable."""
        if self.reader is not None:
            # Once for all units that sibling tasks begin: they do not use the read session.
            self._giving_way = self._giving_way or asyncio.Lock()
            async with self._giving_way:
                await self._give_way()

    async def _give_way(self) -> None:
        reader = self.reader
        if reader is None or reader._transaction.phase in (Phase.YIELDED, Phase.ENDED):
            return
        transaction, session = reader._transaction, reader._session
        transaction.owner.check()
        if transaction.stream is not None:
            transaction.check_no_stream("a transactional function was called")
        self.refuse_unsaved()
        if session is not None and transaction.connection is not None:
            if transaction.damage.mark is not None:
                await self._end_reading()
                return
            transaction.seal(Phase.COMMITTING)
            # Shielded: cut off here, it could only be discarded, and SQLAlchemy would log an error for each.
            outcome = await shielded(partial(session.run_sync, _commit_reading, transaction), grace=COMMIT_SECONDS)
            error = await failure_of(outcome.task, transaction)
            if error is not None or outcome.cancelled is not None:
                await self._end_reading()
                if outcome.cancelled is not None:
                    raise outcome.cancelled
                if error is not None and not isinstance(error, (SQLAlchemyError, TimeoutError, RollbackOnlyError)):
                    raise error
                record(
                    logging.INFO, "the read session could not end its transaction (%s); it is closed", type(error).__name__,
                    manager=self.setup.name, error=error,
                )  # fmt: skip
                return
        transaction.phase = Phase.YIELDED
        transaction.connection = None
        transaction.engine = None
        transaction.give_back_turn()

    async def rest(self) -> None:
        """End the reading before a wait whose end nobody knows; the next use begins afresh.

        Nothing is done while another live task, but an ancestor of this one, uses the read session.

        Raises:
            ReadOnlyError: an object of it was changed: nothing would ever write it.
        """
        reader = self.reader
        if reader is not None and not reader._transaction.owner.is_free():
            return
        try:
            self.refuse_unsaved()
        except ReadOnlyError:
            await self.end_all(check=False)  # the change has been told of
            raise
        await self.give_way()
        await self.end_what_gave_way()

    async def close(self) -> None:
        """End the scope before its block does; whoever still sees it gets `NoUnitError`.

        For where the rest of a block must not read any more: a web request whose response begins.  Transactional
        functions go on to work, each with a unit of its own.  To close it again does nothing.

        Raises:
            ReadOnlyError: an object of the read session was changed: nothing would ever write it.  It is closed all the same.
        """
        if self.place is not None:  # else its block has ended, and a task that it left behind goes on
            self.place.closed = True
        await self.end_all(check=True)

    async def end_all(self, *, check: bool) -> None:
        """Close all read sessions of the scope.

        Args:
            check: raise if an object of them was changed.
        """
        try:
            if check:
                self.refuse_unsaved()
        finally:
            retired, self._retired = self._retired, []
            for reader in retired:
                close_unused(reader)
                release(reader._transaction)
            if self.reader is not None:
                await self.end_reading()

    async def end_what_gave_way(self) -> None:
        """Let the next use begin a fresh read session; not where that was begun already, beside a unit in a child task.

        The one that gave way holds nothing but its objects.  They stay attached, so that a change of one is still seen, and
        is kept by the session that nobody writes: detached, it would be lost without a word.
        """
        reader = self.reader
        if reader is not None and reader._transaction.phase is Phase.YIELDED:
            self.reader = None
            # In a scope that lasts long, those whose objects nobody has any more are let go.
            kept = [one for one in [*self._retired, reader] if one._session is not None and _has_objects(one._session)]
            self._retired = kept

    async def end_reading(self) -> None:
        """Close the read session; its objects are detached, and refused by later units of this scope."""
        if self._giving_way is None:
            await self._end_reading()
            return
        # Not while a child task's unit has it give way: that unit may be using the connection by now.
        async with self._giving_way:
            await self._end_reading()

    async def _end_reading(self) -> None:
        reader, self.reader = self.reader, None
        if reader is None or reader._transaction.phase is Phase.ENDED:
            return
        if reader.status is Status.DOOMED:
            self._failed = reader._transaction
        if reader._session is not None:
            taint(reader._transaction, reader._session.sync_session, self.tainted, "read")
        ended = await roll_back(reader, None)
        if ended.error is not None:  # cancelled meanwhile
            raise ended.error


def _refuse_unsaved(reader: UnitOfWork[Any]) -> None:
    if reader._session is not None:
        refuse_changes(reader._session.sync_session, reader._transaction)


def _has_objects(session: AsyncSession) -> bool:
    return bool(len(session.sync_session.identity_map)) or has_changes(session.sync_session)


def _commit_reading(session: Session, transaction: Transaction) -> None:
    """Commit, not roll back: a rollback expires the objects, and reading them would need the connection."""
    transaction.end_here(Phase.COMMITTING)
    transaction.end_stream()
    session.commit()


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
        return self.scope.read_unit()


class ScopeContext:
    """``async with manager.scope()``."""

    __slots__ = ("_last_write", "_manager", "_observers", "_place", "_setup")

    def __init__(
        self,
        manager: UnitOfWorkManager[Any],
        setup: Setup[Any],
        last_write: LastWrite | None,
        observers: tuple[Observer, ...],
    ) -> None:
        self._manager = manager
        self._setup = setup
        self._observers = observers
        self._last_write = last_write
        self._place: ScopePlace | None = None

    async def __aenter__(self) -> Scope:
        if self._place is not None:
            raise PropagationError("a scope was entered twice; a scope is used once, call scope() again")
        scope = Scope(self._manager, self._setup, self._last_write, self._observers)
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
        if scope.reader is not None or scope._retired:
            await scope.end_all(check=error is None)
