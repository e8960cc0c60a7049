"""The connection of a unit and the engine that makes it: what SQLAlchemy tells of statements, savepoints and errors.

The listeners are on the class of the units' connections, so they cost nobody else anything; only ``handle_error`` has to be
on the engine's dialect.  That takes a few private names of SQLAlchemy's events and connections, alike in 2.0.58 and 2.1.9:
the tests of bindings listen to engines, classes and single connections.
"""

from __future__ import annotations

import asyncio
import enum
import functools
import re
import sys
from typing import TYPE_CHECKING, Any

from sqlalchemy import event
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.engine.base import OptionEngine
from sqlalchemy.util import await_only

from sqla_uow._classify import Kind, classify
from sqla_uow._isolation import lift_lock_wait, limit_statement, restore_sqlite
from sqla_uow._poolers import explain
from sqla_uow._settle import settle
from sqla_uow._transaction import Phase, Transaction
from sqla_uow.errors import ReadOnlyError, UnitOfWorkError

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy.engine import ExceptionContext
    from sqlalchemy.engine.characteristics import ConnectionCharacteristic
    from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection, PoolResetState

    from sqla_uow._database import Database
    from sqla_uow._replicas import Replicas

__all__ = ["UnitConnection", "UnitEngine", "install", "lift"]


class UnitConnection(Connection):
    """A connection that knows whose it is; the listeners are inert on every other."""

    def __init__(self, engine: UnitEngine, unit: Transaction) -> None:
        self.unit = unit
        try:
            if engine._has_events:  # listeners of the user: joining them with ours costs 30 us for each connection
                super().__init__(engine)
                self._has_events = True  # SQLAlchemy 2.0 takes the engine's flag for the connection's
            else:  # ours alone, and one dispatch for all connections: to make it anew would cost one 15 us
                self.dispatch = _dispatch
                super().__init__(engine, _has_events=True)
            if engine.settings:
                self._set_up(engine)
        except BaseException:
            # Cut off while the isolation level is set, for which psycopg awaits: nobody else knows the connection yet.
            lent: PoolProxiedConnection | None = self.__dict__.get("_dbapi_connection")
            if lent is not None:
                lent.invalidate()
            raise

    def _set_up(self, engine: UnitEngine) -> None:
        """Do what ``execution_options(isolation_level=...)`` would, which looks each up anew: that costs a fortieth of a unit."""
        lent: Any = self.connection
        for characteristic, value in engine.settings:
            characteristic.set_characteristic(engine.dialect, lent.dbapi_connection, value)
        lent._connection_record.finalize_callback.append(engine.reset)

    def _commit_impl(self) -> None:
        # As SQLAlchemy does, but for what is noted once all listeners have been heard: one of them may veto.
        unit = self.unit
        unit.before_commit()
        if self._has_events or self.engine._has_events:
            self.dispatch.commit(self)
        if self._echo:
            self._log_info("COMMIT")
        unit.sending_commit()
        try:
            self.engine.dialect.do_commit(self.connection)
        except BaseException as error:
            self._handle_dbapi_exception(error, None, None, None, None)


class UnitEngine(OptionEngine):
    """The engine as units see it: tells the unit when connecting begins, fails or is done."""

    unit: Transaction | None = None
    settings: tuple[tuple[ConnectionCharacteristic, Any], ...] = ()
    """What each connection of it is set to: an isolation level, or that it only reads."""
    reset: Callable[[Any], None]
    """Sets it back on its way into the pool."""

    def update_execution_options(self, **options: Any) -> None:
        # SQLAlchemy's dialects note the settings among them in a listener on the engine.  That one would have to be joined
        # with ours for each connection, see `UnitConnection`.
        self.dispatch.set_engine_execution_options(self, options)
        self._execution_options = self._execution_options.union(options)
        dialect: Any = self.dialect  # its interface lacks what every dialect has
        known = dialect.connection_characteristics
        self.settings = tuple((known[name], value) for name, value in options.items())
        self.reset = functools.partial(dialect._reset_characteristics, options)

    def of(self, transaction: Transaction) -> UnitEngine:
        """Return this engine for one unit.  A copy of its attributes: making an option engine costs ten times as much."""
        engine = UnitEngine.__new__(UnitEngine)
        engine.__dict__.update(self.__dict__)
        engine.unit = transaction
        return engine

    def _become(self, other: UnitEngine) -> None:
        """Lead elsewhere; sessions know their connections by the engine, which has to stay the same object."""
        unit = self.unit
        self.__dict__.update(other.__dict__)
        self.unit = unit

    def connect(self) -> Connection:
        transaction = self.unit
        if transaction is None or transaction.connection is not None:
            return super().connect()
        times = transaction.times
        began = 0.0 if times is None else times.clock()
        try:
            transaction.before_connect()
            _take_turn(transaction)
            connection = (
                None if transaction.replicas is None else self._connect_to_replica(transaction.replicas, transaction)
            )
            connection = connection or UnitConnection(self, transaction)
            if not transaction.phase.is_open:  # it has ended meanwhile
                connection.close()
                transaction.check_usable()
        except BaseException as error:
            explain(error, self.dialect.driver)
            transaction.connect_failed(error)
            raise
        finally:
            if times is not None:
                times.connection_seconds = times.clock() - began
        transaction.owner.leave()
        return connection

    def _connect_to_replica(self, replicas: Replicas, transaction: Transaction) -> Connection | None:
        def connect(database: Database[Any]) -> Connection:
            self._become(database.unit_engine(transaction))
            return UnitConnection(self, transaction)

        try:
            lent = await_only(replicas.lend(transaction, connect))
            if lent is None:
                return None
            transaction.replica, connection = lent
            transaction.database = transaction.replica.database
            return connection
        finally:
            self._become(transaction.database.unit_engine(transaction))


def _take_turn(transaction: Transaction) -> None:
    turns = transaction.database.turns()
    if turns is not None and (turns.everyone or not transaction.read_only):
        await_only(turns.take(transaction, transaction.enclosing))


# -- the events


def _before_cursor_execute(
    connection: UnitConnection,
    _cursor: Any,
    statement: str,
    parameters: Any,
    context: Any,
    many: bool,  # noqa: FBT001  # SQLAlchemy's signature
) -> tuple[str, Any]:
    unit = connection.unit
    if unit.lifts_lock_wait and unit.is_calm() and not unit.rolling_back_to_savepoint:
        lift(connection)
    # isdelete is documented for DefaultExecutionContext only; every dialect's context is one.
    writes = context is not None and (context.isinsert or context.isupdate or context.isdelete)
    unit.before_statement(writes=writes)
    if writes:
        unit.wrote = True
    else:
        does = _does(statement.lstrip()[:_OPENING])
        if does is _CONTROL and not (unit.database.family == "sqlite" and statement[:5] == "BEGIN"):
            unit.refuse_control(statement.split(maxsplit=1)[0].upper())
        if unit.pending_savepoint is not None:
            unit.pending_savepoint = statement.rpartition(" ")[2]
        elif does is _SOMETHING and not unit.wrote and not _selects(context):
            unit.wrote = True
    if unit.deadline is not None and unit.database.limits_statements and not many:
        statement = limit_statement(statement, unit.deadline - unit.clock())
    return statement, parameters


def lift(connection: UnitConnection) -> None:
    """Lift the limit of an attempt that has become the last; another statement may be about to be sent."""
    unit = connection.unit
    pending, wrote = unit.pending_savepoint, unit.wrote
    unit.lifts_lock_wait, unit.pending_savepoint = False, None
    lift_lock_wait(connection)
    unit.lifted_lock_wait, unit.pending_savepoint, unit.wrote = True, pending, wrote


# SQLite's BEGIN is ours, or the user's own recipe; MariaDB's commits what is open, but for its BEGIN NOT ATOMIC blocks.
_ENDS = re.compile(
    r"(?:COMMIT|END|ABORT|START\s+TRANSACTION|BEGIN(?!\s+NOT\b)|ROLLBACK(?!\s+(?:(?:WORK|TRANSACTION)\s+)?TO\b))\b",
    re.IGNORECASE,
)


_READING = ("SELECT", "BEGIN", "PRAGMA", "SET TRANS", "SHOW", "SAVEPOINT", "RELEASE", "ROLLBACK")
_OPENING = 64  # characters: as much as the longest of the above needs, and little enough to be remembered


class _Does(enum.Enum):
    """What the opening of a statement says that it does."""

    CONTROL = "ends the transaction, or begins another"
    READING = "reads"
    SOMETHING = "writes, or cannot be told"


_CONTROL, _SOMETHING = _Does.CONTROL, _Does.SOMETHING  # looking a member up by its name runs Python code on 3.11


@functools.lru_cache(maxsize=512)
def _does(opening: str) -> _Does:
    if _ENDS.match(opening) is not None:
        return _Does.CONTROL
    return _Does.READING if opening[:9].upper().startswith(_READING) else _Does.SOMETHING


def _selects(context: Any) -> bool:
    """Say whether SQLAlchemy knows the statement as a SELECT; one that begins with WITH, say."""
    return (
        context is not None and context.compiled is not None and getattr(context.compiled.statement, "is_select", False)
    )


def _after_cursor_execute(
    connection: UnitConnection,
    _cursor: Any,
    _statement: str,
    _parameters: Any,
    _context: Any,
    _many: bool,  # noqa: FBT001  # SQLAlchemy's signature
) -> None:
    connection.unit.after_statement()


def _handle_error(context: ExceptionContext) -> None:
    connection = context.connection
    if not isinstance(connection, UnitConnection):
        return
    unit = connection.unit
    error = context.original_exception
    if isinstance(error, UnitOfWorkError):
        return
    # It comes without its statement where rows were being fetched.
    fetching = context.statement is None and context.execution_context is not None
    sent = fetching or unit.owner.in_flight is not None
    # With a statement that was not sent it is one of a column type or of another listener.
    if isinstance(error, OSError) and not isinstance(error, TimeoutError) and (sent or context.statement is None):
        context.is_disconnect = True  # raw from the socket, which SQLAlchemy does not know as an error of the driver
    if context.statement is None and not fetching and unit.phase in (Phase.ACTIVE, Phase.ENDING):
        # A ROLLBACK failed.  asyncpg forgets that it is in a transaction, so the pool would lend it on as it is.
        context.is_disconnect = True
        context.invalidate_pool_on_disconnect = False
    _let_go_of_stale_plans(context, error, connection.dialect.driver)
    if isinstance(error, asyncio.CancelledError) and unit.phase is not Phase.SENT and not connection.invalidated:
        settle(connection, getattr(context.execution_context, "cursor", None))
    explain(context.sqlalchemy_exception, connection.dialect.driver)
    unit.failed(error, context.sqlalchemy_exception, lost=context.is_disconnect, sent=sent)
    failure = classify(error) if unit.read_only and isinstance(error, Exception) else None
    if failure is not None and failure.kind is Kind.READ_ONLY:
        raise ReadOnlyError(unit.read_only_message("a write was sent"))


def _let_go_of_stale_plans(context: ExceptionContext, error: BaseException, driver: str) -> None:
    """Have the pool renew what was prepared before a migration, so that a call meets it once, not once a connection.

    SQLAlchemy does so itself for the plans of asyncpg.  Of what a pooler has forgotten only this connection is given up:
    where that is a matter of settings, all would be, again and again.
    """
    failure = classify(error) if isinstance(error, Exception) else None
    if failure is None or failure.kind is not Kind.STALE_PLAN:
        return
    if not (driver == "asyncpg" and failure.code in ("0A000", "XX000")):
        context.is_disconnect = True
        context.invalidate_pool_on_disconnect = failure.code not in ("26000", "42P05")


def _rollback(connection: UnitConnection) -> None:
    connection.unit.before_rollback(sys.exception())


def _savepoint(connection: UnitConnection, _name: str | None) -> None:
    connection.unit.pending_savepoint = ""  # the name is generated later; read from the statement


def _rollback_savepoint(connection: UnitConnection, name: str, _context: None) -> None:
    unit = connection.unit
    unit.check_not_ending()
    unit.damage.roll_back(name)
    unit.damage.leave(name)
    unit.rolling_back_to_savepoint = True
    unit.lifts_lock_wait = unit.lifts_lock_wait or unit.lifted_lock_wait  # SET LOCAL is undone as well


def _release_savepoint(connection: UnitConnection, name: str, _context: None) -> None:
    connection.unit.damage.leave(name)


def _reset(dbapi_connection: Any, record: ConnectionPoolEntry, state: PoolResetState) -> None:
    if state.asyncio_safe and record.info:
        restore_sqlite(dbapi_connection, record.info)


_LISTENERS: dict[str, Callable[..., Any]] = {
    "before_cursor_execute": _before_cursor_execute,
    "after_cursor_execute": _after_cursor_execute,
    "rollback": _rollback,
    "savepoint": _savepoint,
    "rollback_savepoint": _rollback_savepoint,
    "release_savepoint": _release_savepoint,
}
# On the class of our connections, not on the engine: nobody else's statements pay for them.
for _name, _listener in _LISTENERS.items():
    event.listen(UnitConnection, _name, _listener, retval=_name == "before_cursor_execute")


_dispatch: Any = UnitConnection.__new__(UnitConnection).dispatch


def _listen_to_one(event_key: Any, **options: Any) -> None:
    """Give a connection a dispatch of its own, because somebody listens to it alone."""
    connection = event_key.dispatch_target
    del connection.dispatch
    connection.dispatch._listen(event_key, **options)


_dispatch._listen = _listen_to_one


def install(engine: Engine) -> None:
    """Listen for what is told to no connection's class, once for each engine and its copies.

    `event.listen` itself ignores the same listener on the same target.  Asking `event.contains` first does not: it knows
    targets by id(), and a new pool that got the id of a collected one was left without its listener.
    """
    event.listen(engine.dialect, "handle_error", _handle_error)
    if engine.dialect.name == "sqlite":
        event.listen(engine.pool, "reset", _reset)
