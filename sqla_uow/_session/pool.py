"""What is set on a connection that the pool lends, and what the connection must be when it comes back."""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING, Any

from sqlalchemy import event
from sqlalchemy.engine.base import OptionEngine

from sqla_uow._databases.driver_state import State, idle_check, is_fit, state_of, switched_to_autocommit
from sqla_uow._databases.levels import restore_sqlite
from sqla_uow._log import record

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy.engine import Engine
    from sqlalchemy.engine.characteristics import ConnectionCharacteristic
    from sqlalchemy.pool import ConnectionPoolEntry, PoolResetState

__all__ = ["HANDED_OUT", "LendingEngine", "install", "restoring"]

HANDED_OUT = "sqla_uow.raw"
"""Key of the note that the driver's own connection was handed out to user code; it stays until the connection is back."""


class LendingEngine(OptionEngine):
    """An engine that knows what is set on each of its connections."""

    settings: tuple[tuple[str, ConnectionCharacteristic, Any], ...] = ()
    """What is set on each of its connections: an isolation level, or that it only reads."""
    is_idle: Callable[[Any], bool]
    """Says whether surely no transaction is open on the driver's own connection."""
    reset: Callable[[Any], None]
    """Sets a connection to SQLAlchemy's defaults on its way into the pool, if the driver does not say what was set before."""

    def update_execution_options(self, **options: Any) -> None:
        # SQLAlchemy's dialects apply these settings by a listener on the engine.  It would have to be joined with our listeners
        # for each connection, see `UnitConnection`.
        self.dispatch.set_engine_execution_options(self, options)
        self._execution_options = self._execution_options.union(options)
        dialect: Any = self.dialect  # its interface lacks what every dialect has
        self.is_idle = idle_check(dialect.driver)
        known = dialect.connection_characteristics
        self.settings = tuple((name, known[name], value) for name, value in options.items())
        self.reset = functools.partial(dialect._reset_characteristics, options)


def restoring(driver: str, lent: Any, reset: Callable[[Any], None]) -> Callable[[Any], None]:
    """Return what sets a connection back to what it is now.

    SQLAlchemy's own way would say READ WRITE even if nothing was said before.  A hot standby refuses that, and a role that only
    reads by default could write.

    Args:
        driver: its name.
        lent: the connection, as the pool has lent it.
        reset: SQLAlchemy's own way, for other drivers.
    """
    adapted, raw = lent.dbapi_connection, lent.driver_connection
    if driver == "psycopg":
        before = raw.isolation_level, raw.read_only

        def restore(adapted: Any) -> None:
            if raw.closed:
                return
            if raw.isolation_level != before[0]:
                adapted.set_isolation_level(before[0])
            if raw.read_only != before[1]:
                adapted.set_read_only(before[1])

        return restore
    if driver == "asyncpg":
        level, only_reads = adapted.isolation_level, adapted.readonly

        def restore_asyncpg(adapted: Any) -> None:
            adapted.set_isolation_level(level)
            adapted.readonly = only_reads

        return restore_asyncpg
    return reset


def _reset(dbapi_connection: Any, record: ConnectionPoolEntry | None, state: PoolResetState) -> None:
    if state.asyncio_safe and record is not None and record.info:  # None: it was detached, and does not go back
        restore_sqlite(dbapi_connection, record.info)


@functools.cache
def _returned(driver: str) -> Callable[[Any, ConnectionPoolEntry], None]:
    """Return the listener for connections that come back into a pool: always the same for a driver, so none listens twice."""
    is_idle = idle_check(driver)

    def returned(dbapi_connection: Any, entry: ConnectionPoolEntry) -> None:
        if dbapi_connection is None:
            return
        raw = entry.driver_connection
        lent = entry.info.pop(HANDED_OUT, False)
        if not lent and is_idle(raw):
            return
        if lent and switched_to_autocommit(driver, raw):
            where = "in autocommit"
        elif is_fit(driver, raw):
            return
        else:
            where = "inside a transaction"
        state = state_of(driver, raw)
        entry.invalidate()
        if where == "in autocommit" or state not in (State.NONE, None):
            record(
                logging.WARNING,
                "a connection came back to the pool %s, and is discarded; leave autocommit alone, end the transaction before it "
                "is returned, and let no other task go on with it", where,
            )  # fmt: skip

    return returned


def install(engine: Engine, *, shared: bool) -> None:
    """Listen to an engine's pool, once for the engine and its copies.

    `event.listen` ignores a listener that the target has already.  Do not ask `event.contains` before: it knows targets by id(),
    and a new pool that got the id of a collected one was left without its listener.

    Args:
        engine: of the units.
        shared: the pool lends one connection to several users at once, or one that is inside somebody else's transaction.
    """
    if not shared:
        event.listen(engine.pool, "checkin", _returned(engine.dialect.driver))
    if engine.dialect.name == "sqlite":
        event.listen(engine.pool, "reset", _reset)
