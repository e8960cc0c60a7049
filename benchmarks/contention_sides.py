"""Who is compared under contention: the same SQL, run again in different ways after a conflict."""

from __future__ import annotations

import asyncio
import itertools
import random
from typing import TYPE_CHECKING, NamedTuple

from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from benchmarks.interleaving import left_out
from benchmarks.transaction_peers import RETRYING
from sqla_uow import RetryPolicy, current_session, is_retryable, transactional
from sqla_uow.errors import ConflictError

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AsyncExitStack

    from sqlalchemy.ext.asyncio import AsyncEngine

    from benchmarks.transaction_peers import Run

__all__ = ["RETRIES", "ByHand", "Cell", "Side", "every_side", "full_jitter", "sides"]

RETRIES = 5
TAKE = text("UPDATE account SET balance = balance - 1 WHERE id = :id")
GIVE = text("UPDATE account SET balance = balance + 1 WHERE id = :id")
READ = text("SELECT balance FROM account WHERE id = :id")
LOCK = text("SELECT balance FROM account WHERE id = :id FOR UPDATE")
WRITE = text("UPDATE account SET balance = :balance WHERE id = :id")


class Cell(NamedTuple):
    """One situation: rows, seconds of pause in the body, workers.

    Attributes:
        ordered: whether a transfer locks its rows in the order of their ids.
        skew: whether it reads two rows and writes one of them, instead of a transfer: what snapshots alone let pass.
        four: whether four functions do the same, as those of a real service do.
    """

    rows: int
    pause: float
    workers: int
    ordered: bool = False
    skew: bool = False
    four: bool = False

    @classmethod
    def parse(cls, one: str) -> Cell:
        """Parse ``rows/pause in ms/workers[/ordered|/skew|/four]``."""
        rows, pause, workers, *shape = one.split("/")
        if shape not in ([], ["ordered"], ["skew"], ["four"]):
            raise ValueError(one)
        return cls(
            int(rows), float(pause) / 1000, int(workers), *(shape == [name] for name in ("ordered", "skew", "four"))
        )

    def __str__(self) -> str:
        shape = "/ordered" if self.ordered else "/skew" if self.skew else "/four" if self.four else ""
        return f"{self.rows}/{self.pause * 1000:g}/{self.workers}{shape}"


async def body(session: AsyncSession, cell: Cell, payer: int, payee: int) -> None:
    """Do what the cell has: with a single row, read it and write it back; else a transfer, or a write that may skew."""
    if cell.rows == 1 or cell.skew:
        read = [(await session.execute(READ, {"id": one})).scalar_one() for one in sorted({payer, payee})]
        if cell.pause:
            await asyncio.sleep(cell.pause)
        await session.execute(WRITE, {"id": payer, "balance": (sum(read) + 1) % 1_000_000})
        return
    first, second = ((TAKE, payer), (GIVE, payee))
    if cell.ordered and payer > payee:
        first, second = second, first
    await session.execute(first[0], {"id": first[1]})
    if cell.pause:
        await asyncio.sleep(cell.pause)
    await session.execute(second[0], {"id": second[1]})


async def locking_body(session: AsyncSession, cell: Cell, payer: int, payee: int) -> None:
    """Lock what will be read or written, then do the same."""
    ids = list(dict.fromkeys((payer, payee)))
    for one in sorted(ids) if cell.ordered else ids:
        await session.execute(LOCK, {"id": one})
    await body(session, cell, payer, payee)


class Side:
    """One way of writing it."""

    runs = 0

    async def call(self, cell: Cell, payer: int, payee: int) -> bool:
        """Return whether it was committed."""
        raise NotImplementedError


class Ours(Side):
    """`@transactional(retries=5, isolation="SERIALIZABLE")`."""

    def __init__(self, policy: RetryPolicy) -> None:
        async def transfer(cell: Cell, payer: int, payee: int) -> None:
            self.runs += 1
            await body(current_session(), cell, payer, payee)

        decorate = transactional(retries=RETRIES, isolation="SERIALIZABLE", retry=policy)
        self.transfers = itertools.cycle([decorate(transfer) for _ in range(4)])
        self.transfer = decorate(transfer)

    async def call(self, cell: Cell, payer: int, payee: int) -> bool:
        """Return whether it was committed."""
        try:
            await (next(self.transfers) if cell.four else self.transfer)(cell, payer, payee)
        except ConflictError:
            return False
        return True


class ByHand(Side):
    """A loop as it is usually written: session, body and COMMIT again, after a wait."""

    body = staticmethod(body)
    isolation = "SERIALIZABLE"

    def __init__(self, engine: AsyncEngine, wait: Callable[[int], float], *, lock: asyncio.Lock | None = None) -> None:
        isolated = engine.execution_options(isolation_level=self.isolation)
        self.maker = async_sessionmaker(isolated, expire_on_commit=False)
        self.wait = wait
        self.lock = lock

    async def call(self, cell: Cell, payer: int, payee: int) -> bool:
        """Return whether it was committed."""
        if self.lock is not None:
            async with self.lock:
                return await self._loop(cell, payer, payee)
        return await self._loop(cell, payer, payee)

    async def _loop(self, cell: Cell, payer: int, payee: int) -> bool:
        for attempt in range(RETRIES + 1):
            self.runs += 1
            try:
                async with self.maker.begin() as session:
                    await self.body(session, cell, payer, payee)
            except DBAPIError as error:
                if not is_retryable(error):
                    raise
            else:
                return True
            if attempt < RETRIES:
                await asyncio.sleep(self.wait(attempt))
        return False


class ForUpdate(ByHand):
    """The same loop where every row is locked first, which READ COMMITTED is enough for."""

    body = staticmethod(locking_body)
    isolation = "READ COMMITTED"


class Peer(Side):
    """Somebody else's retry, with what its documentation sets."""

    def __init__(self, run: Run) -> None:
        self.run = run

    async def call(self, cell: Cell, payer: int, payee: int) -> bool:
        """Return whether it was committed."""

        async def once(session: AsyncSession) -> None:
            self.runs += 1
            await body(session, cell, payer, payee)

        try:
            await self.run(once)
        except DBAPIError:
            return False
        return True


def full_jitter(retry: int) -> float:
    """Return what `RetryPolicy()` would wait."""
    return random.uniform(0, min(1.0, 0.01 * 2**retry))  # noqa: S311  # no secret


def sides(engine: AsyncEngine) -> dict[str, Side]:
    """Return who is compared."""
    return {
        "sqla_uow": Ours(RetryPolicy()),
        "full jitter": ByHand(engine, full_jitter),
        "one at a time": ByHand(engine, full_jitter, lock=asyncio.Lock()),
    }


async def every_side(engine: AsyncEngine, stack: AsyncExitStack) -> dict[str, Side]:
    """Return these and those that one would try next; a peer that is not installed is left out."""
    compared = {**sides(engine), "immediate retry": ByHand(engine, lambda _retry: 0.0)}
    if engine.dialect.name != "sqlite":  # which has no FOR UPDATE: its writers take turns anyway
        compared["SELECT FOR UPDATE"] = ForUpdate(engine, full_jitter)
    strict = engine.execution_options(isolation_level="SERIALIZABLE")
    for name, build in RETRYING.items():
        try:
            compared[name] = Peer(await build(strict, stack))
        except ImportError as error:
            left_out(name, error)
    return compared
