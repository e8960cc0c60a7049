"""Transfers between two of a few rows under SERIALIZABLE, and one hot row: what contention leaves of the throughput.

Every side runs the same SQL on the same server for some seconds after a warm-up, one side after the other.  A commit
counts when its caller has seen it; a call that gave up counts as that.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from typing import TYPE_CHECKING, NamedTuple

from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from sqla_uow import RetryPolicy, UnitOfWorkManager, current_session, is_retryable, transactional
from sqla_uow.errors import ConflictError

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy.ext.asyncio import AsyncEngine

RETRIES = 5
WARM_UP = 2.0
SLICE = 1.5
CELLS = "2/0/32,10/0/32,100/0/32,1000/0/32,10000/0/32,10/5/32,100/5/32,1000/5/32,10/0/8,10/0/32/ordered,1/0/32"
"""rows / pause in the body, ms / workers; one row is read and written back."""
TAKE = text("UPDATE account SET balance = balance - 1 WHERE id = :id")
GIVE = text("UPDATE account SET balance = balance + 1 WHERE id = :id")
READ = text("SELECT balance FROM account WHERE id = :id")
WRITE = text("UPDATE account SET balance = :balance WHERE id = :id")


class Cell(NamedTuple):
    """One situation: rows, seconds of pause in the body, workers, and whether rows are locked in order."""

    rows: int
    pause: float
    workers: int
    ordered: bool = False


class Outcome(NamedTuple):
    """What one side did in one cell."""

    commits: float
    gave_up: float
    p99: float
    attempts: float


async def body(session: AsyncSession, cell: Cell, payer: int, payee: int) -> None:
    """Move money; with a single row, read it and write it back."""
    if cell.rows == 1:
        balance = (await session.execute(READ, {"id": 1})).scalar_one()
        if cell.pause:
            await asyncio.sleep(cell.pause)
        await session.execute(WRITE, {"id": 1, "balance": balance + 1})
        return
    first, second = ((TAKE, payer), (GIVE, payee))
    if cell.ordered and payer > payee:
        first, second = second, first
    await session.execute(first[0], {"id": first[1]})
    if cell.pause:
        await asyncio.sleep(cell.pause)
    await session.execute(second[0], {"id": second[1]})


class Side:
    """One way of writing it."""

    runs = 0

    async def call(self, cell: Cell, payer: int, payee: int) -> bool:
        """Return whether it was committed."""
        raise NotImplementedError


class Ours(Side):
    """`@transactional(retries=5, isolation="SERIALIZABLE")`."""

    def __init__(self, policy: RetryPolicy) -> None:
        @transactional(retries=RETRIES, isolation="SERIALIZABLE", retry=policy)
        async def transfer(cell: Cell, payer: int, payee: int) -> None:
            self.runs += 1
            await body(current_session(), cell, payer, payee)

        self.transfer = transfer

    async def call(self, cell: Cell, payer: int, payee: int) -> bool:
        """Return whether it was committed."""
        try:
            await self.transfer(cell, payer, payee)
        except ConflictError:
            return False
        return True


class ByHand(Side):
    """A loop as it is usually written: session, body and COMMIT again, after a wait."""

    def __init__(self, engine: AsyncEngine, wait: Callable[[int], float], *, lock: asyncio.Lock | None = None) -> None:
        strict = engine.execution_options(isolation_level="SERIALIZABLE")
        self.maker = async_sessionmaker(strict, expire_on_commit=False)
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
                    await body(session, cell, payer, payee)
            except DBAPIError as error:
                if not is_retryable(error):
                    raise
            else:
                return True
            if attempt < RETRIES:
                await asyncio.sleep(self.wait(attempt))
        return False


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


class Meter:
    """What one side has done so far, over all its slices."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.latencies: list[float] = []
        self.gave_up = 0
        self.runs = 0

    async def slice(self, side: Side, cell: Cell, seconds: float, *, counts: bool) -> None:
        """Let the workers call it for some seconds."""
        end = time.perf_counter() + seconds
        side.runs = 0
        latencies: list[float] = []
        gave_up = 0

        async def worker() -> None:
            nonlocal gave_up
            while (started := time.perf_counter()) < end:
                payer, payee = random.sample(range(1, cell.rows + 1), 2) if cell.rows > 1 else (1, 1)
                committed = await side.call(cell, payer, payee)
                if committed:
                    latencies.append(time.perf_counter() - started)
                else:
                    gave_up += 1

        started = time.perf_counter()
        await asyncio.gather(*(worker() for _ in range(cell.workers)))
        if counts:
            self.seconds += time.perf_counter() - started  # to the end of the last call: a stall counts
            self.latencies += latencies
            self.gave_up += gave_up
            self.runs += side.runs


def outcome(meters: list[Meter]) -> Outcome:
    """Return the figures of one side, which ran in several processes or in one."""
    latencies = sorted(latency for meter in meters for latency in meter.latencies)
    gave_up = sum(meter.gave_up for meter in meters)
    calls = len(latencies) + gave_up
    return Outcome(
        sum(len(meter.latencies) / meter.seconds for meter in meters),
        gave_up / (calls or 1),
        latencies[int(len(latencies) * 0.99)] if latencies else float("inf"),
        sum(meter.runs for meter in meters) / (calls or 1),
    )


async def prepare(engine: AsyncEngine, rows: int) -> None:
    """Fill the table."""
    async with engine.begin() as connection:
        await connection.execute(text("DROP TABLE IF EXISTS account"))
        await connection.execute(text("CREATE TABLE account (id INTEGER PRIMARY KEY, balance INTEGER NOT NULL)"))
        await connection.execute(
            text("INSERT INTO account VALUES (:id, 0)"), [{"id": number} for number in range(1, rows + 1)]
        )
        if engine.dialect.name == "postgresql":
            # else the planner knows nothing of the table and scans it, and SERIALIZABLE takes that for a read of every row
            await connection.exec_driver_sql("ANALYZE account")


async def measure(url: str, cell: Cell, seconds: float) -> dict[str, Outcome]:
    """Run every side: a warm-up each, then slices in turns, so that they share the machine's moods."""
    logging.getLogger("sqla_uow").setLevel(logging.ERROR)
    engine = create_async_engine(url, pool_size=cell.workers, max_overflow=0, pool_timeout=120)
    await prepare(engine, cell.rows)
    compared = sides(engine)
    meters = {name: Meter() for name in compared}
    with UnitOfWorkManager(engine).activate():
        for name, side in compared.items():
            await meters[name].slice(side, cell, WARM_UP, counts=False)
        for _ in range(max(1, round(seconds / SLICE))):
            for name, side in compared.items():
                await meters[name].slice(side, cell, SLICE, counts=True)
    await engine.dispose()
    return {name: outcome([meter]) for name, meter in meters.items()}


def cells(text_of_cells: str) -> list[Cell]:
    """Parse ``rows/pause in ms/workers[/ordered]``, several with commas between them."""
    parsed = []
    for one in text_of_cells.split(","):
        rows, pause, workers, *ordered = one.split("/")
        parsed.append(Cell(int(rows), float(pause) / 1000, int(workers), ordered == ["ordered"]))
    return parsed


def report(
    url: str,
    which: str,
    seconds: float,
    measured: Callable[[str, Cell, float], dict[str, Outcome]] = lambda *cell: asyncio.run(measure(*cell)),
) -> dict[str, dict[str, dict[str, float]]]:
    """Measure the cells, print a line for each side as soon as it is known, and return the figures."""
    figures = {}
    print(f"{'rows/pause/workers':22}{'':16}{'commits/s':>10}{'gave up':>9}{'p99, ms':>9}{'attempts':>10}")
    for cell in cells(which):
        name = f"{cell.rows}/{cell.pause * 1000:g}/{cell.workers}{'/ordered' if cell.ordered else ''}"
        outcomes = measured(url, cell, seconds)
        for side, outcome in outcomes.items():
            print(
                f"{name:22}{side:16}{outcome.commits:>10.0f}{outcome.gave_up:>9.1%}{outcome.p99 * 1000:>9.0f}"
                f"{outcome.attempts:>10.2f}",
                flush=True,
            )
        figures[name] = {side: outcome._asdict() for side, outcome in outcomes.items()}
    return figures
