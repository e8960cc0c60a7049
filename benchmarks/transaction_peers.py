"""Other ways of running a function in a transaction, each set up as its documentation has it."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session, async_sessionmaker

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from contextlib import AsyncExitStack

    from sqlalchemy.ext.asyncio import AsyncEngine

    Body = Callable[[AsyncSession], Awaitable[None]]
    Run = Callable[[Body], Awaitable[None]]

__all__ = ["PEERS", "RETRYING"]


async def sqlalchemy_transactional(engine: AsyncEngine, stack: AsyncExitStack) -> Run:
    """sqlalchemy-transactional's decorator."""
    from sqlalchemy_transactional.asyncio import current_session, sessionmaker_context, transactional

    await stack.enter_async_context(sessionmaker_context(async_sessionmaker(engine, expire_on_commit=False)))

    @transactional
    async def run(body: Body) -> None:
        await body(current_session())

    return run


async def transactional_sqlalchemy(engine: AsyncEngine, _stack: AsyncExitStack) -> Run:
    """transactional-sqlalchemy's decorator, which hands the session over by keyword."""
    from transactional_sqlalchemy import init_manager, transactional

    maker = async_sessionmaker(engine, expire_on_commit=False)
    init_manager(async_scoped_session(maker, scopefunc=asyncio.current_task))

    @transactional
    async def run(body: Body, session: Any = None) -> None:
        await body(session)

    return run


async def context_async(engine: AsyncEngine, _stack: AsyncExitStack) -> Run:
    """context-async-sqlalchemy's block outside a request."""
    from context_async_sqlalchemy import DBConnect, new_non_ctx_atomic_session

    connect = DBConnect(lambda _host: engine, lambda one: async_sessionmaker(one, expire_on_commit=False), "here")

    async def run(body: Body) -> None:
        async with new_non_ctx_atomic_session(connect) as session:
            await body(session)

    return run


async def db_retry(engine: AsyncEngine, _stack: AsyncExitStack) -> Run:
    """db-retry's decorator around its transaction, COMMIT inside."""
    from db_retry import Transaction, postgres_retry

    maker = async_sessionmaker(engine, expire_on_commit=False)

    @postgres_retry
    async def run(body: Body) -> None:
        async with Transaction(session=maker()) as transaction:
            await body(transaction.session)
            await transaction.commit()

    return run


async def dbop_runner(engine: AsyncEngine, _stack: AsyncExitStack) -> Run:
    """dbop-runner in a session's block, COMMIT outside its loop."""
    from dbop_runner import DBOpRunner

    silent = logging.getLogger("benchmarks.dbop_runner")
    silent.disabled = True  # a warning for each conflict
    maker, runner = async_sessionmaker(engine, expire_on_commit=False), DBOpRunner(max_retries=5, logger=silent)

    async def run(body: Body) -> None:
        async with maker.begin() as session:
            await runner.run_async(session, body)

    return run


RETRYING: dict[str, Callable[[AsyncEngine, AsyncExitStack], Awaitable[Run]]] = {
    "db-retry": db_retry,
    "dbop-runner": dbop_runner,
}
PEERS: dict[str, Callable[[AsyncEngine, AsyncExitStack], Awaitable[Run]]] = {
    "context-async-sqlalchemy": context_async,
    "sqlalchemy-transactional": sqlalchemy_transactional,
    "transactional-sqlalchemy": transactional_sqlalchemy,
    **RETRYING,
}
