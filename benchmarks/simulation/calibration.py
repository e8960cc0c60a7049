"""Measures what a transaction costs where nobody is in its way: CPU in the client and on the server, message by message."""

from __future__ import annotations

import math
import random
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from benchmarks.contention_sides import GIVE, RETRIES, TAKE, ByHand, Cell, Side
from benchmarks.simulation.costs import EXCHANGES, ClientCosts, Costs, ServerCosts
from sqla_uow import RetryPolicy, UnitOfWorkManager, current_session, transactional
from sqla_uow.errors import ConflictError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from sqlalchemy.ext.asyncio import AsyncEngine

    Body = Callable[[AsyncSession, Cell, int, int], Awaitable[None]]

__all__ = ["Table", "costs", "table"]

OWN_STAT = Path("/proc/self/schedstat")
CALLS = 400
WARM_UP_CALLS = 100
CONFLICT = text("DO $$ BEGIN RAISE EXCEPTION SQLSTATE '40001'; END $$")


class Mark(NamedTuple):
    """A moment in a transaction, in seconds.

    Attributes:
        before: what this process has computed, before it looked at the server.
        server: what the server's process has computed.
        after: as `before`, when it had looked.
        waited: for a core, both together.
        clock: the time.
    """

    before: float
    server: float
    after: float
    waited: float
    clock: float


def _accounts(schedstat: Path) -> tuple[float, float]:
    """Return the seconds that a process's first thread has computed, and waited for a core."""
    computed, waited, _slices = schedstat.read_text().split()
    return int(computed) / 1e9, int(waited) / 1e9


class Probe:
    """Notes the moments of one transaction after the other, on a single connection."""

    def __init__(self, pid: int) -> None:
        self._stat = Path(f"/proc/{pid}/schedstat")
        self.marks: list[Mark] = []

    def mark(self) -> None:
        """Note one."""
        before, clock = time.process_time(), time.perf_counter()
        (server, its_wait), (_computed, own_wait) = _accounts(self._stat), _accounts(OWN_STAT)
        self.marks.append(Mark(before, server, time.process_time(), its_wait + own_wait, clock))

    async def body(self, session: AsyncSession, _cell: object, payer: int, payee: int) -> None:
        """Do a transfer."""
        self.mark()
        await session.execute(TAKE, {"id": payer})
        self.mark()
        await session.execute(GIVE, {"id": payee})
        self.mark()

    async def failing(self, session: AsyncSession, _cell: object, payer: int, _payee: int) -> None:
        """Write, and be refused."""
        self.mark()
        await session.execute(TAKE, {"id": payer})
        self.mark()
        await session.execute(CONFLICT)


class Table(NamedTuple):
    """How the server reads and writes a table of so many rows.

    Attributes:
        scans: a statement reads all of it.
        index_writes: the share of updates that write into the index.
    """

    scans: bool
    index_writes: float


async def table(url: str) -> Table:
    """Ask the server, after some transfers."""
    engine = create_async_engine(url)
    async with engine.connect() as connection:
        plan = (await connection.execute(text("EXPLAIN UPDATE account SET balance = 1 WHERE id = 1"))).scalars().all()
        await connection.execute(text("SELECT pg_stat_force_next_flush()"))
    async with engine.connect() as connection:
        updated, in_place = (
            await connection.execute(
                text("SELECT n_tup_upd, n_tup_hot_upd FROM pg_stat_user_tables WHERE relname = 'account'")
            )
        ).one()
    await engine.dispose()
    return Table(any("Seq Scan" in line for line in plan), 1 - in_place / updated if updated else 0.0)


class ByHandWith(ByHand):
    """The loop by hand around another body."""

    def __init__(self, engine: AsyncEngine, body: Body) -> None:
        super().__init__(engine, lambda _retry: 0.0)
        self.body = body  # type: ignore[assignment]


class OursWith(Side):
    """`@transactional` around another body."""

    def __init__(self, engine: AsyncEngine, body: Body) -> None:
        manager = UnitOfWorkManager(engine)

        @transactional(using=manager, retries=RETRIES, isolation="SERIALIZABLE", retry=RetryPolicy(base=0, cap=0))
        async def transfer(cell: Cell, payer: int, payee: int) -> None:
            await body(current_session(manager), cell, payer, payee)

        self.transfer = transfer

    async def call(self, cell: Cell, payer: int, payee: int) -> bool:
        """Return whether it was committed."""
        try:
            await self.transfer(cell, payer, payee)
        except ConflictError:
            return False
        return True


SIDES: dict[str, Callable[[AsyncEngine, Body], Side]] = {"sqla_uow": OursWith, "full jitter": ByHandWith}


class Stand:
    """One table with a connection, and each side on it."""

    def __init__(self, engine: AsyncEngine, rows: int, pid: int) -> None:
        self.engine = engine
        self.cell = Cell(rows, 0, 1)
        self.good = {name: Probe(pid) for name in SIDES}
        self.bad = {name: Probe(pid) for name in SIDES}
        self._committing = {name: build(engine, self.good[name].body) for name, build in SIDES.items()}
        self._failing = {name: build(engine, self.bad[name].failing) for name, build in SIDES.items()}

    @classmethod
    async def on(cls, url: str, rows: int) -> Stand:
        """Connect."""
        engine = create_async_engine(url, pool_size=1, max_overflow=0)
        async with engine.connect() as connection:
            pid = (await connection.execute(text("SELECT pg_backend_pid()"))).scalar_one()
        return cls(engine, rows, pid)

    async def call(self, name: str, *, fail: bool) -> None:
        """Call one side."""
        payer, payee = random.sample(range(1, self.cell.rows + 1), 2)
        self.good[name].mark()
        await self._committing[name].call(self.cell, payer, payee)
        self.good[name].mark()
        if fail:
            await self._failing[name].call(self.cell, payer, payee)

    def forget(self) -> None:
        """Begin anew, after the warm-up."""
        for probe in (*self.good.values(), *self.bad.values()):
            probe.marks.clear()


async def costs(tables: Mapping[str, int], count: int = CALLS) -> dict[str, dict[str, Costs]]:
    """Measure all tables and sides in turns; a client's part is that of all tables together.

    Args:
        tables: how many rows the table has, by the URL of a database on this machine.
        count: calls that count, of each side on each table.

    Returns:
        by URL and side.
    """
    stands = {url: await Stand.on(url, rows) for url, rows in tables.items()}
    for number in range(WARM_UP_CALLS + count):
        for stand in stands.values():
            if number == WARM_UP_CALLS:
                stand.forget()
            for name in SIDES:
                await stand.call(name, fail=number % 4 == 0)
    for stand in stands.values():
        await stand.engine.dispose()
    found: dict[str, dict[str, Costs]] = {url: {} for url in tables}
    for name in SIDES:
        calls = [call for stand in stands.values() for call in _calls(stand.good[name].marks)]
        failures = [pair for stand in stands.values() for pair in _failures(stand.bad[name].marks)]
        client, delay, spread = _client_costs(calls, failures), _delay(calls), _spread(calls)
        for url, stand in stands.items():
            server = _server_costs(_calls(stand.good[name].marks), _failures(stand.bad[name].marks))
            found[url][name] = Costs(client=client, server=server, delay=delay, spread=spread)
    return found


def _calls(marks: list[Mark]) -> list[list[Mark]]:
    return [marks[first : first + 5] for first in range(0, len(marks), 5)]


def _failures(marks: list[Mark]) -> list[list[Mark]]:
    """Return pairs: behind the first statement, and in the next attempt, behind a statement that has failed."""
    each = 2 * (RETRIES + 1)
    return [
        marks[call + step : call + step + 2] for call in range(0, len(marks), each) for step in range(1, each - 1, 2)
    ]


def _client_costs(calls: list[list[Mark]], failures: list[list[Mark]]) -> ClientCosts:
    start, first, statement, end = (_client(calls, step) for step in range(4))
    again = _client(failures, 0)
    return ClientCosts(
        start=start, begin=max(0.0, first - statement), statement=statement, end=end, failure=again - statement - start
    )


def _server_costs(calls: list[list[Mark]], failures: list[list[Mark]]) -> ServerCosts:
    first, statement, commit = (_server(calls, step) for step in range(1, 4))
    return ServerCosts(
        begin=max(0.0, first - statement), statement=statement, commit=commit,
        roll_back=max(0.0, _server(failures, 0) - statement),
    )  # fmt: skip


def _delay(calls: list[list[Mark]]) -> float:
    """Return what is left of the time when nobody computes, and nobody waits for a core."""
    left = [
        call[4].clock - call[0].clock - (call[4].before - call[0].before)
        - (call[4].server - call[0].server) - (call[4].waited - call[0].waited)
        for call in calls
    ]  # fmt: skip
    return max(0.0, statistics.mean(left)) / (2 * EXCHANGES)


def _spread(calls: list[list[Mark]]) -> float:
    """Return by how much the time of one piece of work differs between calls.

    A statement and COMMIT are three of them each, the message, the server's part and the answer, which differ more than their
    sum.
    """
    steps = [[call[step + 1].clock - call[step].clock for call in calls] for step in (2, 3)]
    return math.sqrt(3) * statistics.mean(statistics.stdev(times) / statistics.mean(times) for times in steps)


def _client(calls: list[list[Mark]], step: int) -> float:
    return statistics.mean(call[step + 1].before - call[step].after for call in calls)


def _server(calls: list[list[Mark]], step: int) -> float:
    return statistics.mean(call[step + 1].server - call[step].server for call in calls)
