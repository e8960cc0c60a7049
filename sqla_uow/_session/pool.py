"""What is set on a connection that the pool lends, and what the connection must be when it comes back."""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING, Any

from sqlalchemy import event
from sqlalchemy.engine.base import OptionEngine

from sqla_uow._databases.database import driver_of
from sqla_uow._databases.driver import State
from sqla_uow._log import log

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy.engine.characteristics import ConnectionCharacteristic
    from sqlalchemy.pool import ConnectionPoolEntry, PoolResetState

    from sqla_uow._databases.database import Database
    from sqla_uow._databases.driver import Driver

__all__ = ["HANDED_OUT", "LendingEngine", "install"]

HANDED_OUT = "sqla_uow.raw"
"""Key of the note that the driver's own connection was handed out to user code; it stays until the connection is back."""


class LendingEngine(OptionEngine):
    """An engine that knows what is set on each of its connections."""

    settings: tuple[tuple[str, ConnectionCharacteristic, Any], ...] = ()
    """What is set on each of its connections: an isolation level, or that it only reads."""
    unit_driver: Driver
    """What is known of its driver; SQLAlchemy's own `driver` is the driver's name."""
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
        self.unit_driver = driver_of(dialect)
        self.is_idle = self.unit_driver.is_idle
        known = dialect.connection_characteristics
        self.settings = tuple((name, known[name], value) for name, value in options.items())
        self.reset = functools.partial(dialect._reset_characteristics, options)


@functools.cache
def _resetting(restore: Callable[[Any, dict[Any, Any]], None]) -> Callable[..., None]:
    """Return the listener that undoes what units have set: always the same for a database, so none listens twice."""

    def reset(dbapi_connection: Any, record: ConnectionPoolEntry | None, state: PoolResetState) -> None:
        if state.asyncio_safe and record is not None and record.info:  # None: it was detached, and does not go back
            restore(dbapi_connection, record.info)

    return reset


@functools.cache
def _returned(driver: Driver) -> Callable[[Any, ConnectionPoolEntry], None]:
    """Return the listener for connections that come back into a pool: always the same for a driver, so none listens twice."""
    is_idle = driver.is_idle

    def returned(dbapi_connection: Any, entry: ConnectionPoolEntry) -> None:
        if dbapi_connection is None:
            return
        # The adapter's, as all our drivers have one; the entry's asks the dialect.
        raw = dbapi_connection.driver_connection
        lent = entry.info.pop(HANDED_OUT, False)
        if not lent and is_idle(raw) and driver.is_open(raw):
            return
        if lent and driver.switched_to_autocommit(raw):
            where = "in autocommit"
        elif driver.is_fit(raw):
            return
        else:
            where = "inside a transaction"
        state = driver.state(raw)
        entry.invalidate()
        if where == "in autocommit" or state not in (State.NONE, None):
            log(
                logging.WARNING,
                "a connection came back to the pool %s, and is discarded; leave autocommit alone, end the transaction before it "
                "is returned, and let no other task go on with it", where,
            )  # fmt: skip

    return returned


def install(database: Database, *, shared: bool) -> None:
    """Listen to an engine's pool, once for the engine and its copies.

    `event.listen` ignores a listener that the target has already.  Do not ask `event.contains` before: it knows targets by id(),
    and a new pool that got the id of a collected one was left without its listener.

    Args:
        database: of the units.
        shared: the pool lends one connection to several users at once, or one that is inside somebody else's transaction.
    """
    if not shared:
        event.listen(database.pool, "checkin", _returned(database.driver))
    if database.system.sets_back:
        event.listen(database.pool, "reset", _resetting(database.system.restore))
