"""The read session of a scope, and how it gives way to the units in it."""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from typing import TYPE_CHECKING, Any

from sqlalchemy.exc import SQLAlchemyError

from sqla_uow._databases.failures import chain
from sqla_uow._log import log
from sqla_uow._scope.told import ToldTransaction
from sqla_uow._session.instances import taint
from sqla_uow._session.session import has_changes, refuse_changes
from sqla_uow._settings.preamble import Preamble
from sqla_uow._tasks.frames import check_loop
from sqla_uow._tasks.shield import shielded
from sqla_uow._transaction.failing import failure_behind
from sqla_uow._transaction.phase import Phase
from sqla_uow._transaction.tainted import Tainted
from sqla_uow._transaction.transaction import Transaction
from sqla_uow._unit.commit import COMMIT_SECONDS
from sqla_uow._unit.ending import close_unused, failure_of, release
from sqla_uow._unit.rollback import roll_back
from sqla_uow._unit.unit import UnitOfWork
from sqla_uow.errors import ConflictError, ReadOnlyError, RollbackOnlyError

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession
    from sqlalchemy.orm import Session

    from sqla_uow._replicas.router import LastWrite
    from sqla_uow._settings.sources import Sources
    from sqla_uow._unit.setup import Setup

__all__ = ["ReadSession"]

_NAME = "the read session of this scope"


class ReadSession:
    """One read-only unit after another: each begins with its first SQL, and gives way to a unit that begins.

    Args:
        setup: of the scope's manager.
        last_write: of the scope's client, where there are replicas.
        loop: of the scope; another one may not use its session.
        sources: what its transactions are told first; None if they are told nothing.

    Attributes:
        tainted: its objects, which later units of the scope refuse.
        transaction: of the open unit; None if no unit is open.
    """

    __slots__ = (
        "_failed",
        "_giving_way",
        "_last_write",
        "_loop",
        "_replaced",
        "_retired",
        "_setup",
        "_sources",
        "_unit",
        "tainted",
        "transaction",
    )

    def __init__(
        self,
        setup: Setup[Any],
        last_write: LastWrite | None,
        loop: asyncio.AbstractEventLoop,
        sources: Sources | None,
    ) -> None:
        self._setup = setup
        self._sources = sources
        self._last_write = last_write
        self._loop = loop
        self.tainted: Tainted = Tainted()
        self.transaction: Transaction | None = None
        self._unit: UnitOfWork[Any] | None = None
        self._giving_way: asyncio.Lock | None = None
        self._failed: Transaction | None = None
        self._retired: tuple[Transaction, ...] = ()
        self._replaced: tuple[Transaction, ...] = ()  # retired ones that hold a connection yet

    def unit(self) -> UnitOfWork[Any]:
        """Return the open read unit; make one if none is open."""
        unit, transaction = self._unit, self.transaction
        check_loop(_NAME, self._loop)
        told = None if self._sources is None else self._sources.ask(_NAME)
        if unit is not None and transaction is not None:
            transaction.owner.check()
            if transaction.preamble is None or transaction.preamble.told == told:
                return unit
            self._replace(transaction)
        kind = Transaction if told is None else ToldTransaction
        transaction = self.transaction = self._setup.read_transaction(kind, _NAME, self._last_write)
        unit = self._unit = UnitOfWork(transaction, self._setup.maker)
        if self._sources is not None and told is not None:
            transaction.preamble = Preamble(self._sources, told, unit)
            if self._replaced:
                transaction.preamble.before = self._end_replaced
        self._setup.counts.readings += 1
        return unit

    def _replace(self, transaction: Transaction) -> None:
        """Let nobody send SQL in it any more, as the settings are others now; its objects stay readable.

        Raises:
            PropagationError: its rows are still being read.
            ReadOnlyError: an object of it was changed.
        """
        _refuse_unsaved(transaction)
        if transaction.stream is not None:
            transaction.stream.check_unread("the settings of its scope have changed")
        self.transaction = self._unit = None
        if transaction.phase.is_open and transaction.connection is not None:
            self._replaced += (transaction,)  # its end has to be awaited, where that can be
        self._retired += (transaction,)
        transaction.seal(Phase.YIELDED)

    async def _end_replaced(self) -> None:
        """End those that were replaced, before another connection is taken.

        Raises:
            ReadOnlyError: an object of them was changed since.
        """
        self.refuse_unsaved()
        await self._let_go_replaced()

    async def _let_go_replaced(self) -> None:
        while self._replaced:
            transaction, self._replaced = self._replaced[0], self._replaced[1:]
            await self._let_go(transaction)
        self._forget_empty()

    def is_unused(self) -> bool:
        """Say whether there is nothing to end."""
        return self.transaction is None and not self._retired

    def conflict_behind(self, error: BaseException) -> ConflictError | None:
        """Return what a transactional function would have raised, had it failed as this has; None if it has not.

        Args:
            error: what came out of the code in the scope.
        """
        transaction = self._failed if self.transaction is None else self.transaction
        failure = None if transaction is None else failure_behind(transaction, list(chain(error)))
        if failure is None:
            return None
        what = failure.kind.value if failure.code is None else f"{failure.kind.value} {failure.code}"
        conflict = ConflictError(
            f"{_NAME} failed with {what}; do all of it again, or read in a @transactional(read_only=True) function, "
            "which is run again by itself",
            reason=failure.kind.value, code=failure.code,
        )  # fmt: skip
        conflict.__cause__ = error
        return conflict

    def refuse_unsaved(self) -> None:
        """Raise if an object of it was changed: nothing would ever write it.

        Raises:
            ReadOnlyError: naming the object and the cures.
        """
        if self.transaction is not None:
            _refuse_unsaved(self.transaction)
        for transaction in self._retired:
            _refuse_unsaved(transaction)

    async def give_way(self) -> None:
        """End the read transaction, so that its connection is free; keep its objects attached and readable."""
        if self.transaction is not None or self._replaced:
            # Once for all units that sibling tasks begin: they do not use the read session.
            self._giving_way = self._giving_way or asyncio.Lock()
            async with self._giving_way:
                await self._give_way()

    async def _give_way(self) -> None:
        if self._replaced:
            await self._end_replaced()
        transaction = self.transaction
        if transaction is None or transaction.phase in (Phase.YIELDED, Phase.ENDED):
            return
        transaction.owner.check()
        if transaction.stream is not None:
            transaction.stream.check_unread("a transactional function was called")
        self.refuse_unsaved()
        await self._let_go(transaction)

    async def _let_go(self, transaction: Transaction) -> None:
        """Commit, so that the connection is free; where that cannot be, close."""
        session = transaction.session
        if session is not None and transaction.connection is not None:
            if transaction.doom.marked is not None or has_changes(session.sync_session):
                await self._close(transaction)
                return
            transaction.seal(Phase.COMMITTING)
            # Shielded: cut off here, it could only be discarded, and SQLAlchemy would log an error for each.
            outcome = await shielded(partial(session.run_sync, _commit, transaction), grace=COMMIT_SECONDS)
            error = await failure_of(outcome.task, transaction)
            if error is not None or outcome.cancelled is not None:
                await self._close(transaction)
                if outcome.cancelled is not None:
                    raise outcome.cancelled
                if error is not None and not isinstance(error, (SQLAlchemyError, TimeoutError, RollbackOnlyError)):
                    raise error
                log(
                    logging.INFO, "the read session could not end its transaction (%s); it is closed", type(error).__name__,
                    manager=self._setup.name, error=error,
                )  # fmt: skip
                return
        transaction.phase = Phase.YIELDED
        transaction.connection = None
        transaction.engine = None
        transaction.give_back_turn()

    async def rest(self) -> None:
        """End the reading before a wait of unknown length; the next use begins a new one.

        Does nothing while another live task uses the read session, unless this task descends from it.

        Raises:
            ReadOnlyError: an object of it was changed: nothing would ever write it.
        """
        if self.transaction is not None and not self.transaction.owner.is_free():
            return
        try:
            self.refuse_unsaved()
        except ReadOnlyError:
            await self.end_all(check=False)  # the change has been told of
            raise
        await self.give_way()
        self.end_yielded()

    def end_yielded(self) -> None:
        """Let the next use begin a new unit, if the open one has given way.

        A child task may have begun a new one already, beside a unit.  The unit that gave way holds only its objects.  They
        stay attached, so that a change of one is seen and refused: a change of a detached object would be lost silently.
        """
        transaction = self.transaction
        if transaction is not None and transaction.phase is Phase.YIELDED:
            self._unit = self.transaction = None
            self._retired += (transaction,)
            self._forget_empty()

    def _forget_empty(self) -> None:
        """Forget those whose objects nobody has any more: the scope may last long."""
        candidates, self._retired = self._retired, ()
        for one in candidates:
            if one in self._replaced or (one.session is not None and _has_objects(one.session)):
                self._retired += (one,)
            else:
                one.session = None

    async def end_all(self, *, check: bool) -> None:
        """Close it, with all units that gave way.

        Args:
            check: raise if an object of them was changed.

        Raises:
            ReadOnlyError: one was.
        """
        try:
            if check:
                self.refuse_unsaved()
        finally:
            try:
                await self._let_go_replaced()
            finally:
                retired, self._retired = self._retired, ()
                for transaction in retired:
                    close_unused(transaction)
                    release(transaction)
                if self.transaction is not None:
                    await self.end()

    async def end(self) -> None:
        """Close the open unit; its objects are detached, and refused by later units of the scope."""
        if self._giving_way is None:
            await self._end()
            return
        # Not while a child task's unit has it give way: that unit may be using the connection by now.
        async with self._giving_way:
            await self._end()

    async def _end(self) -> None:
        transaction = self.transaction
        if transaction is not None:
            await self._close(transaction)

    async def _close(self, transaction: Transaction) -> None:
        if transaction is self.transaction:
            self.transaction = self._unit = None
        self._retired = tuple(one for one in self._retired if one is not transaction)
        if transaction.phase is Phase.ENDED:
            return
        if transaction.final is None and transaction.doom.marked is not None:
            self._failed = transaction
        if transaction.session is not None:
            taint(transaction, transaction.session.sync_session, self.tainted, "read")
        ended = await roll_back(transaction, None)
        if ended.error is not None:  # cancelled meanwhile
            raise ended.error


def _refuse_unsaved(transaction: Transaction) -> None:
    if transaction.session is not None:
        refuse_changes(transaction.session.sync_session, transaction)


def _has_objects(session: AsyncSession) -> bool:
    return bool(len(session.sync_session.identity_map)) or has_changes(session.sync_session)


def _commit(session: Session, transaction: Transaction) -> None:
    """Commit, not roll back: a rollback expires the objects, and reading them would need the connection."""
    transaction.end_here(Phase.COMMITTING)
    if transaction.stream is not None:
        transaction.stream.end()
    session.commit()
