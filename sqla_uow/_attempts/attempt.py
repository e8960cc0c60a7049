"""One run of a transactional body: a unit of its own, and its end."""

from __future__ import annotations

import asyncio
import logging
import sys
from functools import partial
from typing import TYPE_CHECKING, Generic

from sqlalchemy.ext.asyncio import AsyncSession
from typing_extensions import TypeVar

from sqla_uow._attempts.call import Call
from sqla_uow._attempts.observers import idle_of, tell_attempt, tell_outcome
from sqla_uow._attempts.retry_or_raise import member_of, retry_or_raise, timed_out
from sqla_uow._log import log
from sqla_uow._retry.turn import Turn
from sqla_uow._scope.lookup import last_write_of
from sqla_uow._scope.places import UnitPlace
from sqla_uow._settings.preamble import Preamble
from sqla_uow._tasks.frames import pop, push
from sqla_uow._transaction.times import Times
from sqla_uow._transaction.transaction import Transaction
from sqla_uow._unit.commit import commit, prepare
from sqla_uow._unit.options import LateName, block_options
from sqla_uow._unit.rollback import roll_back
from sqla_uow._unit.unit import UnitOfWork
from sqla_uow.errors import PropagationError, RollbackOnlyError
from sqla_uow.typing import Status

if TYPE_CHECKING:
    from types import TracebackType

    from sqla_uow._retry.groups import Groups
    from sqla_uow._unit.ending import Ended
    from sqla_uow._unit.verify import Verification

__all__ = ["Attempt"]

S = TypeVar("S", bound=AsyncSession, default=AsyncSession)


class Attempt(Generic[S]):
    """The next run of a call's body, in a unit of its own.

    Args:
        call: which has one more: `Call.more`.
    """

    __slots__ = ("_call", "_place", "_timeout", "_transaction", "_turn", "_verification", "unit")

    def __init__(self, call: Call[S]) -> None:
        call.more = False
        call.attempt += 1
        if call.attempt == 1 and call.retries:
            _count_in(call)
        self._call = call
        self._place: UnitPlace | None = None
        self._timeout: asyncio.Timeout | None = None
        self._transaction: Transaction | None = None
        self._turn: Turn | None = None
        self._verification: Verification | None = None
        self.unit: UnitOfWork[S] | None = None

    async def __aenter__(self) -> UnitOfWork[S]:
        call = self._call
        if self.unit is not None:
            raise PropagationError(
                f"a unit of {call.options.who} was entered twice; a unit is used once, begin a new one"
            )
        counts = call.setup.counts
        if call.attempt == 1:
            counts.begun += 1
        else:
            counts.reruns += 1
        try:
            if call.reading is not None:
                await call.reading.give_way()
            if call.groups is not None and call.groups.hot:
                await self._take_turn(call.groups)
            if call.observers:
                call.times = Times(call.policy.clock)
                tell_attempt(call)
            return await self._begin()
        except BaseException as error:
            if self._turn is not None:
                self._turn.free(committed=False)
            _finish(call, Status.ROLLED_BACK, error)
            raise

    async def _take_turn(self, groups: Groups) -> None:
        """Wait until this attempt may run; a request does so when it sends SQL, as it does not know its route yet.

        Raises:
            TransactionTimeoutError: the deadline passed first.
        """
        call, came = self._call, False
        left = call.retries + 1 - call.attempt
        turn = self._turn = Turn(groups, partial(member_of, call, groups), call.attempt, left, call.policy.rng)
        if isinstance(call.options.who, LateName):
            return
        try:
            until = None
            if call.deadline is not None:
                until = asyncio.get_running_loop().time() + call.deadline - call.policy.clock()
            came = await turn.take(until)
        finally:
            if not came and call.reading is not None:
                call.reading.end_yielded()
        if not came:
            raise timed_out(call, "its turn to run did not come")

    async def _begin(self) -> UnitOfWork[S]:
        call = self._call
        setup, options = call.setup, call.options
        deadline, clock = call.deadline, call.policy.clock
        transaction = self._transaction = Transaction(
            options.who,
            setup.database,
            isolation=call.isolation,
            read_only=options.read_only,
            deadline=deadline,
            clock=clock,
        )
        transaction.tainted = call.tainted
        transaction.enclosing = call.enclosing
        if call.observers:
            transaction.times = call.times
            transaction.idle = idle_of(call)
        if setup.replicas is not None:
            transaction.last_write = last_write_of(setup)
            if options.read_only:
                transaction.replicas = setup.replicas
        is_last = call.attempt > call.retries
        if not is_last:
            transaction.on_rollback = call.remember
        if self._turn is not None:
            transaction.turn = self._turn
            transaction.lock_wait = self._turn.lock_wait
        unit = self.unit = UnitOfWork(transaction, setup.maker, attempt=call.attempt, is_last_attempt=is_last)
        if call.sources is not None:
            transaction.preamble = Preamble(call.sources, call.sources.ask(options.who), unit)
        if setup.verifier is not None and not options.read_only:
            self._verification = setup.verifier.verification()
        self._place = UnitPlace(setup, unit, transaction)
        push(self._place)
        if deadline is not None:
            # Its own timer, so that the deadline also ends work that is not SQL.
            self._timeout = asyncio.timeout(deadline - clock())
            await self._timeout.__aenter__()
        return unit

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        unit, transaction = self.unit, self._transaction
        place, call = self._place, self._call
        if unit is None or transaction is None or place is None:
            raise PropagationError(f"a unit of {call.options.who} was left before it was entered")
        if place.closed:
            raise PropagationError(f"a unit of {call.options.who} was left twice; use each unit in one 'async with'")
        final, outcome = True, error
        try:
            ended = await self._end(unit, transaction, place, error)
            outcome = ended.error
            if ended.error is None:
                return error is None
            try:
                final = not await retry_or_raise(
                    call, transaction, ended, sys._getframe(1), is_last=unit.is_last_attempt, beside=_beside
                )
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
                if final and call.reading is not None:
                    call.reading.end_yielded()
            finally:
                if final:
                    _finish(call, unit.status, outcome, finished=error is None)

    async def _end(
        self, unit: UnitOfWork[S], transaction: Transaction, place: UnitPlace, error: BaseException | None
    ) -> Ended:
        """Commit or roll back, whatever happens; never raises."""
        scope, verification = self._call.scope, self._verification
        if transaction.idle is not None:
            transaction.idle.ends()
        mark = transaction.doom.marked
        quiet = error is None and mark is not None and mark.quiet
        if error is None and not quiet:
            try:
                await prepare(transaction, scope.reading.refuse_unsaved if scope is not None else None)
                if verification is not None and transaction.wrote:
                    await verification.get_ready(transaction)
            except BaseException as raised:
                error = raised
        if self._timeout is not None:
            error = await self._disarm(self._timeout, error)
        pop(place)
        place.empty()
        if error is None and not quiet:
            ended = await commit(transaction, unit, verification)
        else:
            if isinstance(error, GeneratorExit) and transaction.wrote:
                self._tell_of_generator()
            ended = await roll_back(transaction, error)
        if verification is not None:
            verification.conclude(unit.status)
        return ended

    def _tell_of_generator(self) -> None:
        """Tell of a consumer that left an ``async for``: it may believe in what it wrote between two items."""
        who = self._call.options.who
        log(
            logging.WARNING, "%s was left because the async generator around it was closed; what was written in it is rolled "
            "back, also what the code that took its items wrote; let that code begin the unit, or pass a list",
            who, function=who,
        )  # fmt: skip

    async def _disarm(self, timeout: asyncio.Timeout, error: BaseException | None) -> BaseException | None:
        """Stop the timer: COMMIT is not cut off by it.  Turn its cancellation into our error."""
        try:
            await timeout.__aexit__(type(error) if error is not None else None, error, None)
            if timeout.expired() and error is None:
                await asyncio.sleep(0)  # its cancellation is on the way; take it here, not in the middle of COMMIT
        except TimeoutError:
            return timed_out(self._call, "the deadline passed", error)
        except asyncio.CancelledError as cancelled:
            return timed_out(self._call, "the deadline passed", cancelled)
        # Somebody else has cancelled as well: asyncio leaves the task to them, and so do we.
        if not timeout.expired() or isinstance(error, asyncio.CancelledError):
            return error
        return timed_out(self._call, "the deadline passed", error)


def _count_in(call: Call[S]) -> None:
    """Let a call that may be run again earn its part of the budget, and take turns with those that it conflicts with."""
    setup = call.setup
    setup.budget.earn()
    # Whoever is in a unit holds a connection and locks, so it never waits for a turn; its outermost call did.
    if not call.enclosing and not call.options.read_only and call.policy.contention == "auto":
        call.groups = setup.groups.here()


def _beside(call: Call[S], timeout: float | None) -> Attempt[S]:
    """Return a unit that only reads, beside the one of a call.

    Args:
        call: which has failed.
        timeout: seconds; None is the manager's.
    """
    options = block_options(
        who="begin()", isolation=None, read_only=True, propagation="requires_new", retries=0, timeout=timeout
    )
    return Attempt(Call(call.setup, options.telling(call.options.settings)))


def _finish(call: Call[S], status: Status, error: BaseException | None, *, finished: bool = False) -> None:
    """Count and tell what became of a call.

    Args:
        call: has no more attempts.
        status: of its last unit.
        error: what it ends with.
        finished: the body came to its end.
    """
    doomed = False
    if status is Status.COMMITTED:
        call.setup.counts.committed += 1
    else:
        refused = error is None or isinstance(error, RollbackOnlyError)
        doomed = finished and refused and status is Status.ROLLED_BACK
        call.setup.counts.failed(status, error, gave_up=call.given_up is not None, doomed=doomed)
    if call.observers:
        tell_outcome(call, status, error, doomed=doomed)
