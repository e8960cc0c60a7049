"""One transaction through `@transactional` against the same by hand, by the driver alone, and by others.

Every side runs the same body with the session it gives; the first of a case is what one writes without any library.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

from sqlalchemy import text
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

from benchmarks import interleaving
from benchmarks.contention_sides import RETRIES, full_jitter
from benchmarks.interleaving import Figure, compare, left_out
from benchmarks.transaction_peers import PEERS, RETRYING
from sqla_uow import UnitOfWorkManager, current_session, is_retryable, transactional

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

    Call = Callable[[], Awaitable[object]]
    Body = Callable[[AsyncSession], Awaitable[None]]
    Run = Callable[[Body], Awaitable[None]]

__all__ = ["every_case", "report"]

SELECT = text("SELECT n FROM counter WHERE id = 1")
UPDATE = text("UPDATE counter SET n = n + 1 WHERE id = 1")


async def no_sql(_session: AsyncSession) -> None:
    """Send nothing."""


async def one_select(session: AsyncSession) -> None:
    """Read one row."""
    await session.execute(SELECT)


async def one_update(session: AsyncSession) -> None:
    """Write one row."""
    await session.execute(UPDATE)


async def ten_selects(session: AsyncSession) -> None:
    """Read one row ten times."""
    for _ in range(10):
        await session.execute(SELECT)


@transactional
async def unit(body: Body) -> None:
    """Run the body in a unit."""
    await body(current_session())


@transactional(retries=RETRIES, isolation="SERIALIZABLE")
async def retried(body: Body) -> None:
    """Run the body in a unit that may be run again."""
    await body(current_session())


@transactional(propagation="nested")
async def savepoint(body: Body) -> None:
    """Run the body in a savepoint."""
    await body(current_session())


async def joined(_session: AsyncSession) -> None:
    """Read one row in a transactional function that joins."""
    await unit(one_select)


async def in_savepoint(_session: AsyncSession) -> None:
    """Read one row in a transactional function that is a savepoint."""
    await savepoint(one_select)


async def in_savepoint_by_hand(session: AsyncSession) -> None:
    """Read one row in a savepoint."""
    async with session.begin_nested():
        await one_select(session)


def by_hand(engine: AsyncEngine) -> Run:
    """Return what one writes without the library."""
    maker = async_sessionmaker(engine, expire_on_commit=False)

    async def run(body: Body) -> None:
        async with maker.begin() as session:
            await body(session)

    return run


def loop_by_hand(engine: AsyncEngine) -> Run:
    """Return a SERIALIZABLE loop as it is usually written: session, body and COMMIT again, after a wait."""
    once = by_hand(engine.execution_options(isolation_level="SERIALIZABLE"))

    async def run(body: Body) -> None:
        for attempt in range(RETRIES + 1):
            try:
                await once(body)
            except Exception as error:
                if attempt == RETRIES or not is_retryable(error):
                    raise
            else:
                return
            await asyncio.sleep(full_jitter(attempt))

    return run


async def by_the_driver(url: str, statement: str, stack: contextlib.AsyncExitStack) -> Call:
    """Return the same by asyncpg alone, on one connection that is never given back."""
    import asyncpg  # noqa: PLC0415  # only where PostgreSQL is measured

    connection: Any = await asyncpg.connect(url.replace("+asyncpg", ""))
    stack.push_async_callback(connection.close)

    async def call() -> None:
        async with connection.transaction():
            await connection.fetch(statement)

    return call


def bound(run: Run, body: Body) -> Call:
    """Return a call of no arguments."""
    return lambda: run(body)


async def peers(
    engine: AsyncEngine, stack: contextlib.AsyncExitStack, builders: dict[str, Any] = PEERS
) -> dict[str, Run]:
    """Return the ones that are installed."""
    built: dict[str, Run] = {}
    for name, build in builders.items():
        try:
            built[name] = await build(engine, stack)
        except ImportError as error:
            left_out(name, error)
    return built


async def every_case(url: str, stack: contextlib.AsyncExitStack) -> dict[str, tuple[dict[str, Call], int]]:
    """Return what is compared in each case, the one by hand first, and how often it is called in a round."""
    plain, ours = create_async_engine(url), create_async_engine(url)
    for engine in (plain, ours):
        stack.push_async_callback(engine.dispose)
    await prepare(plain)
    strict = plain.execution_options(isolation_level="SERIALIZABLE")
    hand: dict[str, Run] = {"Session.begin() by hand": by_hand(plain)}
    runs = {**hand, "sqla_uow": unit, **await peers(plain, stack)}
    loops = {"loop by hand": loop_by_hand(plain), "sqla_uow": retried, **await peers(strict, stack, RETRYING)}
    cases: dict[str, tuple[dict[str, Call], int]] = {}
    for what, body, calls in (
        ("no SQL", no_sql, 100),
        ("one SELECT", one_select, 20),
        ("one UPDATE", one_update, 20),
    ):
        cases[what] = ({name: bound(run, body) for name, run in runs.items()}, calls)
    if "+asyncpg" in url:
        cases["one SELECT"][0]["asyncpg alone"] = await by_the_driver(url, SELECT.text, stack)
        cases["one UPDATE"][0]["asyncpg alone"] = await by_the_driver(url, UPDATE.text, stack)
    cases["ten SELECTs"] = ({name: bound(run, ten_selects) for name, run in runs.items()}, 5)
    cases["one SELECT, SERIALIZABLE with retries"] = (
        {name: bound(run, one_select) for name, run in loops.items()}, 20
    )  # fmt: skip
    run = hand["Session.begin() by hand"]
    cases["one SELECT, nested"] = ({"by hand": bound(run, one_select), "sqla_uow": bound(unit, joined)}, 20)
    cases["one SELECT, savepoint"] = (
        {"by hand": bound(run, in_savepoint_by_hand), "sqla_uow": bound(unit, in_savepoint)}, 20
    )  # fmt: skip
    stack.enter_context(UnitOfWorkManager(ours).activate())
    return cases


async def measure(url: str, rounds: int) -> dict[str, dict[str, Figure]]:
    """Return, for each case, the figures of every side."""
    async with contextlib.AsyncExitStack() as stack:
        cases = await every_case(url, stack)
        return {what: await compare(*case, rounds) for what, case in cases.items()}


async def prepare(engine: AsyncEngine) -> None:
    """Make the table."""
    async with engine.begin() as connection:
        await connection.execute(text("DROP TABLE IF EXISTS counter"))
        await connection.execute(text("CREATE TABLE counter (id INTEGER PRIMARY KEY, n INTEGER)"))
        await connection.execute(text("INSERT INTO counter VALUES (1, 0)"))


def report(url: str, rounds: int) -> dict[str, dict[str, dict[str, float]]]:
    """Measure, print the tables, and return the figures."""
    return interleaving.report(asyncio.run(measure(url, rounds)))
