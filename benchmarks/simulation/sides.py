"""Who is compared: the library's own decorator over simulated sessions, and loops by hand as in `contention_sides`."""

from __future__ import annotations

import asyncio
import itertools
from functools import partial
from typing import TYPE_CHECKING

from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import create_async_engine

from benchmarks.contention_sides import RETRIES, Cell, Side
from benchmarks.simulation.client import PoolTimeoutError, Process, Session
from benchmarks.simulation.server import DatabaseError
from sqla_uow import RetryPolicy, UnitOfWorkManager, current_unit, is_retryable, transactional
from sqla_uow._transaction.reports import connect_failed, operation_failed
from sqla_uow.errors import ConflictError

if TYPE_CHECKING:
    import random
    from collections.abc import Callable
    from typing import Literal

    from benchmarks.simulation.costs import Costs

__all__ = ["SIDES", "Ours"]

UPDATE = "UPDATE account SET balance = balance + 1 WHERE id = 1"
"""What every statement of the sides looks like."""


async def transfer(session: Session, cell: Cell, payer: int, payee: int, *, lock: bool = False) -> None:
    """Do what `contention_sides.body` does in such a cell; with `lock`, what `how-to/hot-rows` says."""
    if lock:
        for key in sorted({payer, payee}):
            await session.lock(key)
    first, second = (payer, -1), (payee, 1)
    if cell.ordered and payer > payee:
        first, second = second, first
    await session.update(*first)
    if cell.pause:
        await asyncio.sleep(cell.pause)
    await session.update(*second)


class Ours(Side):
    """`@transactional(retries=5, isolation="SERIALIZABLE")`: manager, attempts, units, gate and back-off are the real ones.

    Only the session is not: the body sends its statements to the simulated server, and COMMIT is the last thing that
    is done before the unit ends.
    """

    def __init__(
        self,
        process: Process,
        costs: Costs,
        chance: random.Random,
        *,
        contention: Literal["auto", "off"] = "auto",
        retries: int = RETRIES,
        cap: float = 1.0,
    ) -> None:
        clock = asyncio.get_running_loop().time
        policy = RetryPolicy(cap=cap, contention=contention, clock=clock, rng=chance.uniform)
        # Nothing is ever sent to it; SQLite's driver is there wherever the tests run.
        self.manager = UnitOfWorkManager(create_async_engine("sqlite+aiosqlite://"))
        self._process, self._costs = process, costs

        async def call(cell: Cell, payer: int, payee: int) -> None:
            self.runs += 1
            unit = current_unit(self.manager)
            session = Session(process, costs, "SERIALIZABLE", unit._transaction.lock_wait)  # noqa: SLF001
            unit.before_commit(self._telling, session.commit)
            try:
                await self._telling(transfer, session, cell, payer, payee)
            except (DatabaseError, DBAPIError):
                await session.roll_back()
                raise

        decorate = transactional(using=self.manager, retries=retries, isolation="SERIALIZABLE", retry=policy)
        self.transfer = decorate(call)
        self.transfers = itertools.cycle([decorate(call) for _ in range(4)])

    async def _telling(self, what: Callable[..., object], *arguments: object) -> None:
        """Do it, and tell the unit of an error as a connection does."""
        transaction = current_unit(self.manager)._transaction  # noqa: SLF001
        try:
            await what(*arguments)  # type: ignore[misc]
        except DatabaseError as error:
            if error.sqlstate == "53300":
                connect_failed(transaction, error)
                raise
            operation_failed(transaction, error, None, lost=False, sent=True)
            raise DBAPIError(UPDATE, None, error) from error

    async def call(self, cell: Cell, payer: int, payee: int) -> bool:
        """Return whether it was committed."""
        try:
            await (next(self.transfers) if cell.four else self.transfer)(cell, payer, payee)
        except (ConflictError, PoolTimeoutError):
            return False
        return True


class ByHand(Side):
    """The loop of `contention_sides.ByHand` over simulated sessions.

    Args:
        process: in which it runs.
        costs: of a transaction.
        chance: for the jitter.
        in_turns: one call at a time in each process.
        lock: lock both rows first, in the order of their keys, at READ COMMITTED.
    """

    def __init__(
        self, process: Process, costs: Costs, chance: random.Random, *, in_turns: bool = False, lock: bool = False
    ) -> None:
        self._process, self._costs, self._chance = process, costs, chance
        self._turn = asyncio.Lock() if in_turns else None
        self._lock = lock
        self._level = "READ COMMITTED" if lock else "SERIALIZABLE"

    async def call(self, cell: Cell, payer: int, payee: int) -> bool:
        """Return whether it was committed."""
        if self._turn is None:
            return await self._loop(cell, payer, payee)
        async with self._turn:
            return await self._loop(cell, payer, payee)

    async def _loop(self, cell: Cell, payer: int, payee: int) -> bool:
        for attempt in range(RETRIES + 1):
            self.runs += 1
            session = Session(self._process, self._costs, self._level)
            try:
                await self._once(session, cell, payer, payee)
            except PoolTimeoutError:
                return False
            except DatabaseError as error:
                if not is_retryable(error):
                    raise
            else:
                return True
            if attempt < RETRIES:
                await asyncio.sleep(self._chance.uniform(0, min(1.0, 0.01 * 2**attempt)))
        return False

    async def _once(self, session: Session, cell: Cell, payer: int, payee: int) -> None:
        try:
            await transfer(session, cell, payer, payee, lock=self._lock)
        except DatabaseError:
            await session.roll_back()
            raise
        await session.commit()


SIDES: dict[str, Callable[[Process, Costs, random.Random], Side]] = {
    "sqla_uow": Ours,
    "full jitter": ByHand,
    "one at a time": partial(ByHand, in_turns=True),
    "lock first": partial(ByHand, lock=True),
}
"""By the names that `processes` gives them."""
