"""One transaction through `@transactional` against the same by hand, call by call in turns.

A round runs some calls of one side, then as many of the other; the ratio is taken round by round and its median is
quoted, because the machine's speed drifts.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from typing import TYPE_CHECKING

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from sqla_uow import UnitOfWorkManager, current_session, transactional

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

SELECT = text("SELECT n FROM counter WHERE id = 1")
UPDATE = text("UPDATE counter SET n = n + 1 WHERE id = 1")


@transactional
async def nothing() -> None:
    """Send no SQL."""


@transactional
async def select() -> None:
    """Read one row."""
    await current_session().execute(SELECT)


@transactional(retries=5, isolation="SERIALIZABLE")
async def serializable_select() -> None:
    """Read one row, ready to be retried."""
    await current_session().execute(SELECT)


@transactional
async def update() -> None:
    """Write one row."""
    await current_session().execute(UPDATE)


@transactional
async def ten_selects() -> None:
    """Read one row ten times."""
    for _ in range(10):
        await current_session().execute(SELECT)


def by_hand(
    maker: async_sessionmaker[AsyncSession], statement: object = None, times: int = 1
) -> Callable[[], Awaitable[None]]:
    """Return what one writes without the library."""

    async def call() -> None:
        async with maker.begin() as session:
            for _ in range(times if statement is not None else 0):
                await session.execute(statement)  # type: ignore[call-overload]  # one of the two above

    return call


async def measure(url: str, rounds: int) -> dict[str, dict[str, float]]:
    """Return, for each case, the median microseconds of both sides and the median of their ratio."""
    plain, ours = create_async_engine(url), create_async_engine(url)
    async with plain.begin() as connection:
        await connection.execute(text("CREATE TABLE counter (id INTEGER PRIMARY KEY, n INTEGER)"))
        await connection.execute(text("INSERT INTO counter VALUES (1, 0)"))
    maker = async_sessionmaker(plain, expire_on_commit=False)
    strict = async_sessionmaker(plain.execution_options(isolation_level="SERIALIZABLE"), expire_on_commit=False)
    cases = {
        "no SQL": (by_hand(maker), nothing, 200),
        "one SELECT": (by_hand(maker, SELECT), select, 30),
        "one SELECT, SERIALIZABLE": (by_hand(strict, SELECT), serializable_select, 30),
        "one UPDATE": (by_hand(maker, UPDATE), update, 30),
        "ten SELECTs": (by_hand(maker, SELECT, 10), ten_selects, 10),
    }
    try:
        with UnitOfWorkManager(ours).activate():
            return {name: await _compare(*case, rounds) for name, case in cases.items()}
    finally:
        await plain.dispose()
        await ours.dispose()


async def _compare(
    hand: Callable[[], Awaitable[None]], unit: Callable[[], Awaitable[None]], calls: int, rounds: int
) -> dict[str, float]:
    pairs = [(await _time(hand, calls), await _time(unit, calls)) for _ in range(rounds + 2)][2:]  # two to warm up
    return {
        "by_hand": statistics.median(pair[0] for pair in pairs),
        "sqla_uow": statistics.median(pair[1] for pair in pairs),
        "ratio": statistics.median(pair[1] / pair[0] for pair in pairs),
    }


async def _time(call: Callable[[], Awaitable[None]], calls: int) -> float:
    started = time.perf_counter()
    for _ in range(calls):
        await call()
    return (time.perf_counter() - started) / calls * 1e6


def report(url: str, rounds: int) -> dict[str, dict[str, float]]:
    """Measure, print a table, and return the figures."""
    figures = asyncio.run(measure(url, rounds))
    print(f"{'':28}{'by hand, us':>14}{'sqla_uow, us':>14}{'ratio':>8}")
    for name, figure in figures.items():
        print(f"{name:28}{figure['by_hand']:>14.1f}{figure['sqla_uow']:>14.1f}{figure['ratio']:>8.2f}")
    return figures
