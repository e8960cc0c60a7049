"""`rolled_back`: a test's work, undone at its end."""

from __future__ import annotations

import logging
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, overload

from sqlalchemy.engine import Engine
from sqlalchemy.exc import OperationalError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.pool import AsyncAdaptedQueuePool

from sqla_uow._api.manager import UnitOfWorkManager
from sqla_uow._databases.database import WITHIN, driver_of, family_of, system_of
from sqla_uow._databases.interrupt import stop_statement
from sqla_uow._tasks.shield import shielded
from sqla_uow._testing.savepoints import Outer, check_loop, dialect_within
from sqla_uow._testing.statements import engine_of
from sqla_uow.errors import PropagationError, TaskBoundaryError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from contextlib import AbstractAsyncContextManager

    from sqlalchemy.engine import Connection
    from sqlalchemy.ext.asyncio import AsyncConnection
    from sqlalchemy.pool import Pool

    from sqla_uow.typing import IsolationLevel

__all__ = ["rolled_back"]

logger = logging.getLogger("sqla_uow")
S = TypeVar("S", bound=AsyncSession)

GIVE_BACK_SECONDS = 10.0
"""How long the end of the block may take."""


@overload
def rolled_back(
    bind: AsyncEngine, /, *, isolation: IsolationLevel | None = ...
) -> AbstractAsyncContextManager[AsyncEngine]: ...
@overload
def rolled_back(
    bind: UnitOfWorkManager[S], /, *, isolation: IsolationLevel | None = ...
) -> AbstractAsyncContextManager[UnitOfWorkManager[S]]: ...
def rolled_back(
    bind: AsyncEngine | UnitOfWorkManager[Any], /, *, isolation: IsolationLevel | None = None
) -> AbstractAsyncContextManager[Any]:
    """Give a test an engine, or a manager, whose transactions are all rolled back at the end of the block.

    One connection is taken and a transaction begun on it.  Each unit's transaction is a savepoint in it: COMMIT releases
    it, so that the units that follow see its rows, and ROLLBACK goes back to it.  Units, retries, savepoints, hooks and
    errors behave as in production.  On PostgreSQL deferred constraints are checked where a COMMIT would check them.

    What a savepoint cannot do is an error that says so: a unit at a stronger isolation level than the outer
    transaction's, two units open at once in one task (``requires_new``), and everything after the connection was lost.
    Units of several tasks wait for each other.  The level of the outer transaction decides when rows that other
    connections commit are seen.

    Args:
        bind: the engine whose connection is used, or a manager.  For a manager, the block gets one of the same name and
            options, activated.
        isolation: the level of the outer transaction, at least as strong as that of every unit; None is the engine's.

    Raises:
        PropagationError: `bind` is the engine, or the manager, of another such block.
        TaskBoundaryError: the engine's pool has a connection of another event loop.
        TypeError: `bind` is neither an engine nor a manager.
        ValueError: this database does not have the level.
    """
    if WITHIN in engine_of(bind, "rolled_back()").get_execution_options():
        raise PropagationError("rolled_back() got what another rolled_back() has made; one undoes all, leave one out")
    if isinstance(bind, UnitOfWorkManager):
        return _manager_rolled_back(bind, isolation or bind.isolation)
    return _engine_rolled_back(bind, isolation)


@asynccontextmanager
async def _manager_rolled_back(
    manager: UnitOfWorkManager[S], isolation: IsolationLevel | None
) -> AsyncGenerator[UnitOfWorkManager[S]]:
    async with _engine_rolled_back(manager.engine, isolation) as engine:
        with manager._over(engine).activate() as inside:
            yield inside


@asynccontextmanager
async def _engine_rolled_back(engine: AsyncEngine, isolation: IsolationLevel | None) -> AsyncGenerator[AsyncEngine]:
    system_of(engine.dialect).check_level(isolation, who="rolled_back()")
    # In tasks of their own: cut off half-way, they would leave the connection with its locks to the next test.
    taken = await shielded(partial(_take, engine, isolation))
    if taken.cancelled is not None:
        if taken.trouble is None:
            await shielded(partial(_give_back, *taken.task.result(), cut_off=True))
        raise taken.cancelled
    connection, outer = taken.task.result()
    cut_off = True
    try:
        try:
            yield AsyncEngine(_EngineWithin(engine.sync_engine, outer))
        except Exception:
            cut_off = False
            raise
        cut_off = False
    finally:
        outer.is_over = True
        ended = await shielded(partial(_give_back, connection, outer, cut_off=cut_off), limit=GIVE_BACK_SECONDS)
        ended.stop()
        if ended.trouble is not None:
            logger.info("rolled_back() could not give back its connection (%s)", type(ended.trouble).__name__)
        if ended.cancelled is not None:
            raise ended.cancelled


async def _take(engine: AsyncEngine, isolation: IsolationLevel | None) -> tuple[AsyncConnection, Outer]:
    connection = await engine.connect()
    raw = await connection.get_raw_connection()
    try:
        check_loop(
            raw.driver_connection, "the engine's pool has given rolled_back() a connection of another event loop"
        )
    except TaskBoundaryError:
        _put_back(raw)
        raise
    try:
        if isolation is not None:
            await connection.execution_options(isolation_level=isolation)
        await connection.begin()
        return connection, await connection.run_sync(_begin, family_of(engine.dialect))
    except BaseException:
        await connection.close()
        raise


def _put_back(raw: Any) -> None:
    """Return a connection to its pool as it is: a reset or a goodbye would be sent on the other loop."""
    record = raw._connection_record
    connection = record.dbapi_connection
    raw.detach()  # puts the record back without it
    record.dbapi_connection, raw.dbapi_connection = connection, None


async def _give_back(connection: AsyncConnection, outer: Outer, *, cut_off: bool) -> None:
    await connection.run_sync(_roll_back, outer, cut_off)
    await connection.close()


def _roll_back(connection: Connection, outer: Outer, cut_off: bool) -> None:  # noqa: FBT001  # run_sync() has no names
    """Roll back, or throw away what a statement may still be going on in, as a unit does that is cut off."""
    in_memory = outer.family == "sqlite" and ":memory:" in (connection.engine.url.database or ":memory:")
    if cut_off and not in_memory:  # which is gone with its connection
        stop_statement(connection, None)
        connection.invalidate()
        return
    transaction = connection.get_transaction()
    assert transaction is not None
    try:
        transaction.rollback()
        if outer.is_lost:
            connection.invalidate()
    except (
        SQLAlchemyError,
        OSError,
        ValueError,
    ) as error:  # the server has rolled back what it lost; aiosqlite: closed
        logger.info("rolled_back() had lost its connection (%s)", type(error).__name__)
        connection.invalidate()


def _begin(connection: Connection, family: str) -> Outer:
    """Have the driver begin in fact; most of them wait for the first statement."""
    dbapi_connection: Any = connection.connection.dbapi_connection
    if family == "sqlite":
        raw: Any = connection.connection.driver_connection
        if not raw.in_transaction:  # else the user's own BEGIN recipe has spoken
            try:
                connection.exec_driver_sql("BEGIN IMMEDIATE")
            except OperationalError as error:
                error.add_note(
                    "sqla_uow: rolled_back() waited for SQLite's one writer; where tests run side by side, as with "
                    "pytest-xdist, give each worker a file of its own"
                )
                raise
    else:
        connection.exec_driver_sql("SELECT 1")
    driver_of(connection.dialect).keep_cancel_request(connection)
    return Outer(dbapi_connection, family, connection.get_isolation_level())


class _EngineWithin(Engine):
    """An engine of one connection, in the outer transaction."""

    def __init__(self, engine: Engine, outer: Outer) -> None:
        dialect = dialect_within(engine.dialect, outer)
        options = {name: value for name, value in engine.get_execution_options().items() if name != "isolation_level"}
        pool = _PoolWithin(outer.lend, pool_size=1, max_overflow=0, dialect=dialect)
        pool.twin = engine.pool
        super().__init__(
            pool,
            dialect,
            engine.url,
            hide_parameters=engine.hide_parameters,
            execution_options={**options, WITHIN: "rolled_back()"},
        )
        self.dispatch._update(engine.dispatch, only_propagate=False)
        self._has_events = engine._has_events

    def dispose(self, close: bool = True) -> None:  # noqa: FBT001, FBT002  # SQLAlchemy's signature
        """Keep the connection: an application that shuts down in a test must not end the test's transaction."""


class _PoolWithin(AsyncAdaptedQueuePool):
    """A pool of that one connection."""

    twin: Pool

    def recreate(self) -> Any:
        """Return a pool of other connections to the same server: it is asked for what must not use this one."""
        return self.twin.recreate()
