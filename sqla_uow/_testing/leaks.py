"""`assert_no_leaks`: every connection comes back, with no transaction open on it, and as it was."""

from __future__ import annotations

import sys
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from greenlet import getcurrent
from sqlalchemy import event

from sqla_uow._databases.database import WITHIN
from sqla_uow._settings.changes import SettingChanges
from sqla_uow._tasks.frames import running_task
from sqla_uow._testing.statements import engine_of, names_told_by

if TYPE_CHECKING:
    from collections.abc import Generator
    from types import FrameType

    from sqlalchemy.engine import Engine
    from sqlalchemy.pool import ConnectionPoolEntry

    from sqla_uow._testing.statements import Bind

__all__ = ["assert_no_leaks"]

_INTERNAL = ("sqlalchemy", "sqla_uow", "asyncio", "contextlib", "greenlet")


@contextmanager
def assert_no_leaks(bind: Bind, /, *, settings: bool = False) -> Generator[None]:
    """Fail if a connection that the block takes from the pool is not back at its end, or came back in a transaction.

    An exception that leaves the block is raised as it is.

    Args:
        bind: the engine, or a manager over it.
        settings: fail also if a connection came back with another role or other settings, because somebody has sent SET
            without LOCAL: the next one to get it would have them.  On PostgreSQL; it asks each time a connection is
            taken and returned.

    Raises:
        AssertionError: there is such a connection; the message says how many, which task took each, and where.
        TypeError: `bind` is neither an engine nor a manager.
        ValueError: `settings` was asked for, and this is not PostgreSQL.
    """
    engine = engine_of(bind, "assert_no_leaks()")
    changes = SettingChanges(engine, names_told_by(bind), _where) if settings else None
    with nullcontext() if changes is None else changes.watched(), _all_back(engine):
        yield
    if changes is not None and changes.found:
        what = f"came back with {', '.join(map(repr, sorted(changes.changed)))} changed"
        raise AssertionError(_message(changes.found, what, what))


@contextmanager
def _all_back(engine: Engine) -> Generator[None]:
    taken: dict[ConnectionPoolEntry, str] = {}
    poisoned: list[str] = []
    within = WITHIN in engine.get_execution_options()  # always in the test's transaction

    def checkout(_connection: Any, record: ConnectionPoolEntry, _proxy: Any) -> None:
        taken[record] = _where()

    def checkin(connection: Any, record: ConnectionPoolEntry) -> None:
        where = taken.pop(record, "before the block")
        if connection is not None and not within and _in_transaction(connection.driver_connection):
            poisoned.append(where)

    pool = engine.pool  # SQLAlchemy knows what dispose() puts in its place, which has the listeners too
    listeners = (("checkout", checkout), ("checkin", checkin))
    for name, listener in listeners:
        event.listen(pool, name, listener)
    try:
        yield
    finally:
        for name, listener in listeners:
            event.remove(pool, name, listener)
    if taken:
        raise AssertionError(
            _message(list(taken.values()), "were not returned to the pool", "was not returned to the pool")
        )
    if poisoned:
        raise AssertionError(_message(poisoned, "came back in a transaction", "came back in a transaction"))


def _message(places: list[str], many: str, one: str) -> str:
    count = f"1 connection {one}" if len(places) == 1 else f"{len(places)} connections {many}"
    return f"{count}; taken {', and '.join(places)}"


def _where() -> str:
    """Say which task is here, and where in the user's code."""
    current = getcurrent().parent
    frame: FrameType | None = sys._getframe() if current is None else current.gr_frame
    while frame is not None and str(frame.f_globals.get("__name__", "")).partition(".")[0] in _INTERNAL:
        frame = frame.f_back
    task = running_task()
    name = "outside any task" if task is None else f"by task {task.get_name()!r}"
    return name if frame is None else f"{name} at {frame.f_code.co_filename}:{frame.f_lineno}"


def _in_transaction(raw: Any) -> bool:
    """Ask the driver, which the server keeps informed."""
    if hasattr(raw, "is_in_transaction"):  # asyncpg
        return bool(raw.is_in_transaction())
    if hasattr(raw, "get_transaction_status"):  # aiomysql, asyncmy
        return bool(raw.get_transaction_status())
    if hasattr(raw, "pgconn"):  # psycopg: 0 is IDLE
        return bool(raw.pgconn.transaction_status)
    return bool(getattr(raw, "in_transaction", False))
