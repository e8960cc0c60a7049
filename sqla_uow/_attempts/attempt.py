"""One run of a transactional body: a unit of its own, and what its end becomes."""

from __future__ import annotations

import asyncio
import logging
import sys
from typing import TYPE_CHECKING, Generic

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm.exc import StaleDataError
from typing_extensions import TypeVar

from sqla_uow._attempts.observers import idle_of
from sqla_uow._databases.failures import Failure, Kind, chain, classify
from sqla_uow._log import record
from sqla_uow._retry.predicates import ask
from sqla_uow._scope.lookup import last_write_of
from sqla_uow._scope.places import UnitPlace
from sqla_uow._tasks.frames import pop, push
from sqla_uow._unit.commit import commit, prepare
from sqla_uow._unit.rollback import Ended, roll_back
from sqla_uow._unit.unit import UnitOfWork
from sqla_uow.errors import (
    AfterCommitError,
    AmbiguousCommitError,
    PropagationError,
    RollbackOnlyError,
    StaleVersionError,
    TransactionTimeoutError,
    UnitOfWorkError,
)
from sqla_uow.typing import Status

if TYPE_CHECKING:
    from types import FrameType, TracebackType

    from sqla_uow._attempts.call import Attempts
    from sqla_uow._retry.controller import Gate, Slot
    from sqla_uow._transaction.transaction import Transaction
    from sqla_uow._unit.verify import Witness
    from sqla_uow._versions.expectations import Versions

__all__ = ["Attempt"]

S = TypeVar("S", bound=AsyncSession, default=AsyncSession)


_CONTENDED = (Kind.CONFLICT, Kind.LOCK_TIMEOUT, Kind.STALE, Kind.CHOSEN)


class Attempt(Generic[S]):
    """One run of the body in a unit of its own."""

    __slots__ = ("_attempts", "_place", "_slot", "_timeout", "_witness", "unit")

    def __init__(self, attempts: Attempts[S]) -> None:
        self._attempts = attempts
        self._place: UnitPlace | None = None
        self._slot: Slot | None = None
        self._timeout: asyncio.Timeout | None = None
        self._witness: Witness | None = None
        self.unit: UnitOfWork[S] | None = None

    async def __aenter__(self) -> UnitOfWork[S]:
        attempts, options = self._attempts, self._attempts.options
        if self.unit is not None:
            raise PropagationError(f"a unit of {options.who} was entered twice; a unit is used once, begin a new one")
        counts = attempts.setup.counts
        if attempts.attempt == 1:
            counts.begun += 1
        else:
            counts.reruns += 1
        try:
            if attempts.reading is not None:
                await attempts.reading.give_way()
            if attempts.gate is not None:
                self._slot = attempts.gate.try_enter() or await self._turn(attempts.gate)
            if attempts.observers:
                attempts.begins()
            return await self._begin()
        except BaseException as error:
            if self._slot is not None:
                self._slot.free(committed=False)
            attempts.over(Status.ROLLED_BACK, error)
            raise

    async def _turn(self, gate: Gate) -> Slot:
        """Wait until this attempt may run.

        Raises:
            TransactionTimeoutError: the deadline passed first.
        """
        attempts, slot = self._attempts, None
        try:
            slot = await gate.enter(attempts.deadline, again=attempts.attempt > 1)
        finally:
            if slot is None and attempts.reading is not None:
                await attempts.reading.end_what_gave_way()
        if slot is None:
            raise attempts.timed_out("its turn to run did not come")
        return slot

    async def _begin(self) -> UnitOfWork[S]:
        attempts, options = self._attempts, self._attempts.options
        setup = attempts.setup
        transaction = setup.transaction(
            options.who,
            isolation=attempts.isolation,
            read_only=options.read_only,
            deadline=attempts.deadline,
            clock=attempts.policy.clock,
            tainted=attempts.tainted,
            enclosing=attempts.enclosing,
            times=attempts.times if attempts.observers else None,
            last_write=None if setup.replicas is None else last_write_of(setup),
        )
        if attempts.observers:
            transaction.idle = idle_of(attempts)
        is_last = attempts.attempt > attempts.retries
        if not is_last:
            transaction.on_rollback = attempts.remember
        if self._slot is not None and attempts.gate is not None:
            transaction.slot = self._slot
            transaction.lock_wait = None if is_last else attempts.lock_wait(attempts.gate)
        unit = self.unit = UnitOfWork(transaction, attempt=attempts.attempt, is_last_attempt=is_last)
        if setup.verifier is not None and not transaction.read_only:
            self._witness = setup.verifier.witness()
        self._place = UnitPlace(setup, unit)
        push(self._place)
        if attempts.deadline is not None:
            # Its own timer, so that the deadline also ends what is no SQL.
            self._timeout = asyncio.timeout(attempts.deadline - attempts.policy.clock())
            await self._timeout.__aenter__()
        return unit

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        unit, place, attempts = self.unit, self._place, self._attempts
        if unit is None or place is None:
            raise PropagationError(f"a unit of {attempts.options.who} was left before it was entered")
        if place.closed:
            raise PropagationError(
                f"a unit of {attempts.options.who} was left twice; use each unit in one 'async with'"
            )
        final, outcome = True, error
        try:
            ended = await self._end(unit, place, error)
            outcome = ended.error
            if ended.error is None:
                return error is None
            try:
                final = not await self._retry(unit, ended, sys._getframe(1))
            except BaseException as raised:
                if (
                    raised.__context__ is None and raised is not ended.error
                ):  # of a predicate: say what it was asked about
                    raised.__context__ = ended.error
                outcome = raised
                raise
            if not final:
                return True
            if ended.error is error:
                return False
            raise ended.error
        finally:
            try:
                if final and attempts.reading is not None:
                    await attempts.reading.end_what_gave_way()
            finally:
                if final:
                    attempts.over(unit.status, outcome, finished=error is None)

    async def _end(self, unit: UnitOfWork[S], place: UnitPlace, error: BaseException | None) -> Ended:
        """Commit or roll back, whatever happens; never raises."""
        transaction, scope = unit._transaction, self._attempts.scope
        if transaction.idle is not None:
            transaction.idle.ends()
        mark = transaction.damage.mark
        quiet = error is None and mark is not None and mark.quiet
        witness = self._witness
        if error is None and not quiet:
            try:
                await prepare(unit, scope.refuse_unsaved if scope is not None else None)
                if witness is not None and transaction.wrote:
                    await witness.get_ready(transaction)
            except BaseException as raised:
                error = raised
        if self._timeout is not None:
            error = await self._disarm(self._timeout, error)
        pop(place)
        place.empty()
        if error is None and not quiet:
            ended = await commit(unit, witness)
        else:
            if isinstance(error, GeneratorExit) and transaction.wrote:
                self._tell_of_generator()
            ended = await roll_back(unit, error)
        if witness is not None:
            witness.settle(unit.status)
        return ended

    def _tell_of_generator(self) -> None:
        """Tell of a consumer that left an ``async for``: it may believe in what it wrote between two items."""
        who = self._attempts.options.who
        record(
            logging.WARNING, "%s was left because the async generator around it was closed; what was written in it is rolled "
            "back, also by who took its items: let them begin the unit, or pass a list", who, function=who,
        )  # fmt: skip

    async def _disarm(self, timeout: asyncio.Timeout, error: BaseException | None) -> BaseException | None:
        """Stop the timer: COMMIT is not cut off by it.  Turn its cancellation into our error."""
        try:
            await timeout.__aexit__(type(error) if error is not None else None, error, None)
            if timeout.expired() and error is None:
                await asyncio.sleep(0)  # its cancellation is on the way; take it here, not in the middle of COMMIT
        except TimeoutError:
            return self._timed_out(error)
        except asyncio.CancelledError as cancelled:
            return self._timed_out(cancelled)
        # Cancelled by somebody else as well: asyncio leaves the task to them, and so do we.
        if not timeout.expired() or isinstance(error, asyncio.CancelledError):
            return error
        return self._timed_out(error)

    def _timed_out(self, error: BaseException | None) -> TransactionTimeoutError:
        timed_out = self._attempts.timed_out("the deadline passed")
        timed_out.__cause__ = error
        return timed_out

    async def _retry(self, unit: UnitOfWork[S], ended: Ended, frame: FrameType) -> bool:
        """Wait for the next attempt if there is one; raise what a failure becomes if there is none."""
        error = ended.error
        assert error is not None
        if not isinstance(error, Exception) or isinstance(error, (AmbiguousCommitError, AfterCommitError)):
            return False
        attempts = self._attempts
        if isinstance(error, TransactionTimeoutError):
            return False
        if attempts.deadline is not None and _is_timeout(error) and attempts.policy.clock() >= attempts.deadline:
            raise self._timed_out(error)
        failure = ended.failure if ended.failure and ended.failure.retryable else self._failure(unit, error)
        if self._slot is not None and failure is not None and failure.kind in _CONTENDED:
            self._slot.conflicted()
        versions = unit._transaction.versions
        if versions is not None and versions.expectations:
            await self._check_expectations(versions, failure, error)
        if failure is None:
            return False
        try:
            await attempts.go_on(failure, error, frame, is_last=unit.is_last_attempt)
        except StaleVersionError as gave_up:
            named = failure.error
            if not isinstance(named, StaleVersionError):
                await self._name(gave_up, versions)
                raise
            named.attempts, named.elapsed = gave_up.attempts, gave_up.elapsed
            if named is error:
                return False
            raise named from error
        return True

    async def _name(self, gave_up: StaleVersionError, versions: Versions | None) -> None:
        """Say of which row it is, as far as that can be found."""
        if versions is not None and (stale := await self._find_stale(versions)) is not None:
            gave_up.model, gave_up.key = stale.model, stale.key
            gave_up.expected, gave_up.found = stale.expected, stale.found

    async def _check_expectations(self, versions: Versions, failure: Failure | None, error: Exception) -> None:
        """Raise where a client's version is stale: running the body again cannot make it fresh.

        Under snapshot isolation the database reports the same race as a conflict (40001; MariaDB 1020), so then the
        versions are read afresh.
        """
        attempts = self._attempts
        if isinstance(error, StaleVersionError):
            error.attempts, error.elapsed = attempts.attempt, attempts.elapsed
            raise error
        surely = any(isinstance(link, StaleDataError) for link in chain(error))
        if not surely and (failure is None or failure.kind not in (Kind.CONFLICT, Kind.LOCK_TIMEOUT)):
            return
        stale = await self._find_stale(versions)
        if stale is None and surely:
            stale = versions.stale(attempts.options.who)
        if stale is not None:
            stale.attempts, stale.elapsed = attempts.attempt, attempts.elapsed
            raise stale from error

    async def _find_stale(self, versions: Versions) -> StaleVersionError | None:
        """Look which row has changed, in a unit of its own; None where none has, or where it cannot be looked at."""
        attempts = self._attempts
        left = None if attempts.deadline is None else max(0.001, attempts.deadline - attempts.policy.clock())
        stale: StaleVersionError | None = None
        try:
            async with attempts.beside(left) as unit:
                stale = await unit.session.run_sync(lambda session: versions.find_stale(session.connection()))
        except (SQLAlchemyError, OSError, UnitOfWorkError) as trouble:
            record(
                logging.WARNING, "the versions of %s could not be read (%s)", attempts.options.who, type(trouble).__name__,
                function=attempts.options.who, manager=attempts.setup.name, error=trouble,
            )  # fmt: skip
        return stale

    def _failure(self, unit: UnitOfWork[S], error: Exception) -> Failure | None:
        """Find the retryable failure of this unit's own connection, flush or COMMIT behind `error`."""
        transaction, options = unit._transaction, self._attempts.options
        chained = list(chain(error))
        failure = transaction.failure_behind(chained)
        if failure is not None:
            return failure
        if self._was_chosen(transaction, error, {id(link) for link in chained}):
            return Failure(Kind.CHOSEN, None, error)
        if options.retry_on is not None and ask(options.retry_on, f"retry_on of {options.who}", error):
            return Failure(Kind.CHOSEN, None, error)
        return None

    def _was_chosen(self, transaction: Transaction, error: Exception, links: set[int]) -> bool:
        """Say whether a joined call has said to retry what this unit ends with."""
        chosen, mark = transaction.chosen, transaction.damage.mark
        if chosen is None or id(chosen) in links:
            return chosen is not None
        # The outer function has swallowed it; what dooms the unit may be what it came from.
        return (
            isinstance(error, RollbackOnlyError)
            and mark is not None
            and any(one is mark.cause for one in chain(chosen))
        )


def _is_timeout(error: Exception) -> bool:
    """Say whether the server ended a statement for its time, or nothing answered in time."""
    failure = classify(error)
    return isinstance(error, TimeoutError) if failure is None else failure.kind is Kind.SERVER_TIMEOUT
