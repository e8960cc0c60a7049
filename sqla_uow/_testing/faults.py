"""`FaultPlan`: a unit of work meets a failure of its database, where you say, as the driver reports it."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Self, get_args
from weakref import WeakKeyDictionary

from sqlalchemy import event
from sqlalchemy.util import await_only

from sqla_uow._scope.places import UnitPlace
from sqla_uow._session.connection import UnitConnection
from sqla_uow._session.session import UnitSession
from sqla_uow._tasks.frames import current_places
from sqla_uow._testing.errors import raise_by_server, raise_lost, raise_refused
from sqla_uow._testing.statements import engine_of, is_work
from sqla_uow._transaction.phase import Phase

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from sqla_uow._testing.statements import Bind
    from sqla_uow._transaction.transaction import Transaction

__all__ = ["Fault", "FaultPlan", "FaultPoint"]

Fault = Literal["conflict", "deadlock", "lock timeout", "lost", "refused", "latency", "cancel"]
"""What happens; see `FaultPlan`."""
FaultPoint = Literal["connect", "statement", "flush", "commit", "after commit"]
"""Where it happens; see `FaultPlan`."""

_POINTS: dict[Fault, tuple[FaultPoint, ...]] = {
    "conflict": ("statement", "flush", "commit"),
    "deadlock": ("statement", "flush", "commit"),
    "lock timeout": ("statement", "flush", "commit"),
    "lost": ("statement", "flush", "commit", "after commit"),
    "refused": ("connect",),
    "latency": get_args(FaultPoint),
    "cancel": get_args(FaultPoint),
}
_NOT_ON_SQLITE = ("deadlock", "lost", "refused")


class FaultPlan:
    """Make units of work fail in the ``with`` block, with the error that the driver in use really raises.

    ::

        with FaultPlan(manager, "conflict", at="commit"):
            await transfer(1, 2, Decimal(10))

    This proves that `transfer` survives a COMMIT that is refused once.  The block fails if no unit was struck in it,
    because then it proves nothing.  Only units are struck, in any task; plain connections of the engine are not.

    Args:
        bind: the engine, or a manager over it; the one that `rolled_back` gives works too.
        fault: ``"conflict"``: a serialization failure (PostgreSQL 40001; MariaDB 1020, and 1213 at COMMIT, as Galera;
            SQLITE_BUSY).  ``"deadlock"``: 40P01, 1213.  ``"lock timeout"``: 55P03, 1205, SQLITE_BUSY.
            ``"lost"``: the link to the server breaks.  ``"refused"``: nobody answers at connect.
            ``"latency"``: nothing but a pause.  ``"cancel"``: the unit's task is cancelled.
        at: ``"connect"``: where a unit takes its connection, new or from the pool.  ``"statement"``: in place of one of
            the function's own; what the unit sends for itself is not counted.  ``"flush"``: in place of its first
            statement.  ``"commit"``: in place of COMMIT, which is not sent.  ``"after commit"``: the fault hits the
            answer to COMMIT, which the server has applied.
        nth: which one is struck, from 1: which of a unit's statements or flushes; for the other points, which of the
            block's units.
        times: how many units in a row are struck; an attempt is a unit.
        seconds: how long a ``"latency"`` lasts.

    Attributes:
        struck: how many units were struck.

    Raises:
        TypeError: `bind` is neither an engine nor a manager.
        ValueError: the fault cannot happen at that point, or not on this database.
    """

    def __init__(
        self,
        bind: Bind,
        fault: Fault,
        /,
        *,
        at: FaultPoint = "statement",
        nth: int = 1,
        times: int = 1,
        seconds: float = 0.05,
    ) -> None:
        self._engine = engine_of(bind, "FaultPlan()")
        _check_place(self._engine.dialect.name, fault, at)
        _check_numbers(nth, times, seconds)
        self._fault: Fault = fault
        self._at: FaultPoint = at
        self._nth = nth
        self._times = times
        self._seconds = seconds
        self._units = 0
        self._seen: WeakKeyDictionary[Transaction, int] = WeakKeyDictionary()
        self._flushing: Transaction | None = None
        self._of: dict[object, Transaction] = {}
        self._lost: list[BaseException] = []
        self._undo: list[Callable[[], None]] = []
        self.struck: int = 0

    def __enter__(self) -> Self:
        """Begin to strike.

        Raises:
            RuntimeError: the plan was used before.
        """
        if self._undo:
            raise RuntimeError("a FaultPlan was entered twice; a plan is used once, make a new one")
        # The dialect is where SQLAlchemy meets the driver: all that stands above it sees the failure as it ever does.
        for name in ("do_execute", "do_executemany", "do_execute_no_params"):
            self._wrap(name, self._execute)
        self._wrap("do_commit", self._commit)
        self._wrap("is_disconnect", self._is_disconnect)
        for target, name, listener in (
            (self._engine.pool, "checkout", self._checkout),
            (UnitSession, "before_flush", self._before_flush),
            (UnitSession, "after_flush", self._after_flush),
        ):
            event.listen(target, name, listener)
            self._undo.append(partial(event.remove, target, name, listener))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Strike no more.

        Raises:
            AssertionError: the block ended normally, and nothing was struck.
        """
        for undo in reversed(self._undo):
            undo()
        self._of.clear()
        if kind is None and not self.struck:
            what = f"{self._fault} at {self._at!r} number {self._nth}"
            raise AssertionError(
                f"no unit was struck by {what}; the block has no such point, or none in a unit of this engine"
            )

    def __repr__(self) -> str:
        return f"<FaultPlan: {self._fault} at {self._at} number {self._nth}, struck {self.struck} of {self._times}>"

    # -- where

    def _wrap(self, name: str, around: Callable[..., Any]) -> None:
        dialect: Any = self._engine.dialect
        original = getattr(dialect, name)
        before: Any = dialect.__dict__.get(name)  # that of a plan around this one

        def wrapped(*args: Any) -> Any:
            return around(original, *args)

        def undo() -> None:
            if before is None:
                delattr(dialect, name)
            else:
                setattr(dialect, name, before)

        setattr(dialect, name, wrapped)
        self._undo.append(undo)

    def _execute(self, original: Callable[..., Any], cursor: Any, statement: str, *rest: Any) -> None:
        context = rest[-1]
        connection = getattr(context, "root_connection", None)
        if isinstance(connection, UnitConnection):
            unit, dbapi_connection = connection.transaction, connection.connection.dbapi_connection
            self._of[dbapi_connection] = unit
            if is_work(statement) and self._is_due(unit):
                self._strike(unit, dbapi_connection)
        original(cursor, statement, *rest)

    def _is_due(self, unit: Transaction) -> bool:
        if self._at == "flush":
            due, self._flushing = self._flushing is unit, None
            return due
        return self._at == "statement" and self._count(unit)

    def _count(self, unit: Transaction) -> bool:
        """Count one more of this unit's; say whether it is to be struck."""
        self._seen[unit] = self._seen.get(unit, 0) + 1
        return self._seen[unit] == self._nth and self.struck < self._times

    def _count_unit(self) -> bool:
        """Count one more unit at this point; say whether it is to be struck."""
        self._units += 1
        return self._nth <= self._units < self._nth + self._times

    def _before_flush(self, session: UnitSession, *_details: object) -> None:
        unit = session.transaction_of_unit
        ours = unit is not None and unit.database.sync_engine.dialect is self._engine.dialect
        self._flushing = unit if unit is not None and ours and self._at == "flush" and self._count(unit) else None

    def _after_flush(self, *_details: object) -> None:
        self._flushing = None

    def _checkout(self, dbapi_connection: Any, *_details: object) -> None:
        open_here = [place.open_transaction() for place in current_places() if isinstance(place, UnitPlace)]
        transaction = next((one for one in open_here if one is not None), None)
        if transaction is not None and self._at == "connect" and self._count_unit():
            self._strike(transaction, dbapi_connection)

    def _commit(self, original: Callable[..., Any], connection: Any) -> None:
        unit = self._of.get(getattr(connection, "dbapi_connection", connection))
        at_commit = self._at in ("commit", "after commit")
        due = unit is not None and unit.phase is Phase.SENT and at_commit and self._count_unit()
        if unit is None or not due:
            original(connection)
        elif self._at == "commit":
            self._strike(unit, connection)
            original(connection)
        else:
            original(connection)
            self._strike(unit, connection)

    # -- what

    def _strike(self, unit: Transaction, connection: Any) -> None:
        self.struck += 1
        dialect = self._engine.dialect
        if self._fault == "latency":
            await_only(asyncio.sleep(self._seconds))
        elif self._fault == "cancel":
            _cancel(unit)
        elif self._fault == "refused":
            raise_refused(dialect)
        elif self._fault == "lost":
            try:
                raise_lost(dialect, connection)
            except Exception as error:
                self._lost.append(error)
                raise
        else:
            raise_by_server(dialect, self._fault, connection, committing=self._at == "commit")

    def _is_disconnect(self, original: Callable[..., Any], error: BaseException, *rest: Any) -> bool:
        # Most dialects ask the driver whether the link is broken; SQLAlchemy then closes it, and the server rolls back.
        return any(error is lost for lost in self._lost) or bool(original(error, *rest))


def _cancel(unit: Transaction) -> None:
    """Cancel the task that the unit belongs to, which at COMMIT waits for another one."""
    task = unit.owner.last or asyncio.current_task()
    assert task is not None
    task.cancel()


def _check_place(database: str, fault: object, at: object) -> None:
    points = next((points for known, points in _POINTS.items() if known == fault), None)
    if points is None:
        raise ValueError(f"FaultPlan() got {fault!r}, which is not a fault; use one of {', '.join(map(repr, _POINTS))}")
    if at not in points:
        raise ValueError(f"FaultPlan({fault!r}) got at={at!r}; use {' or '.join(map(repr, points))}")
    if database == "sqlite" and fault in _NOT_ON_SQLITE:
        raise ValueError(f"FaultPlan({fault!r}) was asked of SQLite, which has none; use 'conflict' or 'lock timeout'")


def _check_numbers(nth: object, times: object, seconds: object) -> None:
    for number in (nth, times):
        if not isinstance(number, int) or number < 1:
            raise ValueError(f"FaultPlan() got nth={nth!r}, times={times!r}; use whole numbers, from 1")
    if not isinstance(seconds, int | float) or not seconds >= 0:  # nan is neither
        raise ValueError(f"FaultPlan() got seconds={seconds!r}; use a number from 0")
