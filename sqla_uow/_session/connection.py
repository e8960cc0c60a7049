"""The connection of a unit and the engine that makes it: what SQLAlchemy tells of statements, savepoints and errors.

The listeners are on the class of the units' connections, so they cost nobody else anything.  Errors and COMMIT are no
listeners of ours: one of the user that raises would keep those behind it from being told.  That takes a few private names of
SQLAlchemy's events and connections, alike in 2.0.58 and 2.1.9: the tests of bindings listen to engines, classes and single
connections.
"""

from __future__ import annotations

import asyncio
import enum
import functools
import logging
import sys
from typing import TYPE_CHECKING, Any

from sqlalchemy import event
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.engine.base import OptionEngine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.util import await_only

from sqla_uow._databases.driver import begin_now, listen_to_commit, tell_next_results, tell_raw_calls
from sqla_uow._databases.driver_state import (
    Ended,
    State,
    idle_check,
    in_transaction,
    is_fit,
    state_of,
    switched_to_autocommit,
)
from sqla_uow._databases.failures import Kind, classify
from sqla_uow._databases.interrupt import settle
from sqla_uow._databases.levels import lift_lock_wait, limit_statement, restore_sqlite
from sqla_uow._databases.poolers import explain
from sqla_uow._databases.self_wait import connect_unless_stuck
from sqla_uow._log import record
from sqla_uow._session.statement_kind import (
    CONTROL,
    OPENING,
    SOMETHING,
    Rows,
    does,
    ends_in_its_tail,
    ends_raw,
    rows_of,
    selects,
)
from sqla_uow._session.streams import open_stream
from sqla_uow._transaction.phase import Phase
from sqla_uow.errors import PropagationError, ReadOnlyError, UnitOfWorkError

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NoReturn

    from sqlalchemy.engine.characteristics import ConnectionCharacteristic
    from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection, PoolResetState

    from sqla_uow._replicas.router import Replicas
    from sqla_uow._session.database import Database
    from sqla_uow._transaction.transaction import Transaction

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
            lent: Any = self._dbapi_connection
            self.raw: Any = engine.dialect.get_driver_connection(lent.dbapi_connection)
            if not engine._has_events and not engine.is_idle(self.raw) and in_transaction(self):
                self._check_lent(engine)
            if engine.settings:
                self._set_up(engine)
        except BaseException:
            # Cut off while the isolation level is set, for which psycopg awaits: nobody else knows the connection yet.
            lent = self.__dict__.get("_dbapi_connection")
            if lent is not None:
                lent.invalidate()
            raise

    def _check_lent(self, engine: UnitEngine) -> None:
        """Refuse a connection that the pool has lent in the middle of somebody else's transaction, and discard it.

        Where listeners see a connection before we do, the transaction may be theirs.  SQLite's driver may be told to be in
        one always, and a unit of a test is inside the test's.
        """
        pool: Any = engine.pool
        if pool.dispatch.checkout or engine.dialect.name == "sqlite" or self.unit.database.within is not None:
            return
        raise PropagationError(
            f"the pool has lent {self.unit.name} a connection in the middle of a transaction, which is discarded; let who used "
            "it before end what it began, also on the driver's own connection, and leave pool_reset_on_return as it is"
        )

    def _set_up(self, engine: UnitEngine) -> None:
        """Do what ``execution_options(isolation_level=...)`` would, which looks each up anew: that costs a fortieth of a unit."""
        lent: Any = self._dbapi_connection
        adapted, dialect = lent.dbapi_connection, engine.dialect
        # A savepoint in somebody else's transaction has its own dialect, which sets nothing and so has nothing to restore.
        restore = engine.reset if self.unit.database.within else _restoring(dialect.driver, lent, engine)
        lent._connection_record.finalize_callback.append(restore)
        for name, characteristic, value in engine.settings:
            # In a transaction that a listener has begun it is too late for the driver, but not for `opening`.
            if name != "postgresql_readonly" or not in_transaction(self):
                characteristic.set_characteristic(dialect, adapted, value)

    @property
    def connection(self) -> PoolProxiedConnection:
        """The connection of the pool, by which everybody comes to the driver's own: nobody tells what is sent on that."""
        unit = self.unit
        if (
            unit.phase.is_active
            and not unit.raw_taken
            and unit.doom.marked is None
            and self._dbapi_connection is not None
        ):
            self._hand_out(unit)
        return super().connection

    @property
    def info(self) -> dict[Any, Any]:
        """What belongs to the connection in the pool; to look it up is not to take it."""
        return super().connection.info

    def _hand_out(self, unit: Transaction) -> None:
        unit.raw_taken = True
        unit.wrote = unit.wrote or not unit.read_only
        driver, raw = self.dialect.driver, self.raw
        try:
            begin_now(self)
        except BaseException as error:
            unit.doom.mark(error, failure=classify(error) if isinstance(error, Exception) else None, hard=True)
            self.invalidate(error)
            raise
        self.info[_LENT] = True
        unit.was_open = unit.was_open or state_of(driver, raw) is State.OPEN
        unit.unwatch.append(tell_raw_calls(driver, raw, _RawCalls(unit, driver, raw)))

    def _commit_impl(self) -> None:
        """Send COMMIT when all listeners have been heard, if the driver says that there is something to commit.

        Raises:
            RollbackOnlyError: it would be, or was, a ROLLBACK.
        """
        unit, dialect = self.unit, self.engine.dialect
        unit.before_commit()
        if self._has_events or self.engine._has_events:
            self.dispatch.commit(self)
        if self._echo:
            self._log_info("COMMIT")
        if unit.doom.marked is not None:  # a listener may have sent what failed
            unit.check_sound()
        if unit.stream is not None:
            unit.close_left_stream()
        if not self.invalidated and (unit.raw_taken or dialect.driver != "asyncpg"):
            self._ask_driver(unit)
        # asyncpg does not tell a failed transaction; its server will, but where a savepoint stands for the transaction.
        listens = dialect.driver == "asyncpg" and not self.invalidated and unit.database.within is None
        answer = listen_to_commit(self) if listens else None
        unit.sending_commit()
        try:
            dialect.do_commit(super().connection)
        except BaseException as error:
            self._handle_dbapi_exception(error, None, None, None, None)
        if answer is not None and answer.is_rollback:
            unit.answered_by_rollback()
        # Of a closed connection the adapter has sent nothing, and says nothing.
        if unit.phase is not Phase.SENT and not self.invalidated:
            unit.was_closed()

    def _ask_driver(self, unit: Transaction) -> None:
        """Have the driver say whether there is something to commit.

        Raises:
            RollbackOnlyError: there is not.
        """
        state = state_of(self.dialect.driver, self.raw)
        unit.hear(state)
        if state is None and self.dialect.name == "sqlite":  # its adapter may say that it is closed, or say nothing
            unit.was_closed()

    def _handle_dbapi_exception(  # noqa: PLR0917  # SQLAlchemy's signature
        self,
        e: BaseException,
        statement: Any,
        parameters: Any,
        cursor: Any,
        context: Any,
        is_sub_exec: bool = False,  # noqa: FBT001, FBT002  # likewise
    ) -> NoReturn:
        """Tell the unit of an error, whatever the listeners of ``handle_error`` make of it."""
        unit = self.unit
        if isinstance(e, UnitOfWorkError) or self._reentrant_error:
            super()._handle_dbapi_exception(e, statement, parameters, cursor, context, is_sub_exec)
        # It comes without its statement where rows were being fetched.
        fetching = statement is None and context is not None
        sent = fetching or getattr(context, "sent_by_unit", context is None and unit.owner.in_flight is not None)
        if isinstance(e, OSError) and not isinstance(e, TimeoutError) and (sent or statement is None):
            self._is_disconnect = True  # raw from the socket, which SQLAlchemy does not know as an error of the driver
        # A ROLLBACK failed.  asyncpg forgets that it is in a transaction, so the pool would lend it on as it is.
        undone = statement is None and context is None and unit.phase in (Phase.ACTIVE, Phase.ENDING)
        stale = _stale_plans(e, self.dialect.driver)
        if stale is _Stale.IN_THE_POOL:
            self._is_disconnect = True
        if isinstance(e, asyncio.CancelledError) and unit.phase is not Phase.SENT and not self.invalidated:
            unit.unwatch_raw()  # what stops the statement is no call of another task
            settle(self, getattr(context, "cursor", None))
        try:
            super()._handle_dbapi_exception(e, statement, parameters, cursor, context, is_sub_exec)
        except BaseException as shown:
            explain(shown, self.dialect.driver)
            if (undone or stale is _Stale.HERE) and not self.invalidated:
                self.invalidate(e)
                if isinstance(shown, DBAPIError):
                    shown.connection_invalidated = True
            self._close_server_cursor(cursor, context)
            unit.failed(e, shown, lost=self.invalidated, sent=sent)
            if unit.self_wait is not None:
                unit.doom.mark(unit.self_wait, hard=True)
                raise unit.self_wait from e
            failure = classify(e) if unit.read_only and isinstance(e, Exception) else None
            if failure is not None and failure.kind is Kind.READ_ONLY:
                raise ReadOnlyError(unit.read_only_message("a write was sent")) from e
            raise

    def _close_server_cursor(self, cursor: Any, context: Any) -> None:
        """Close what SQLAlchemy leaves open on a lost connection; nothing is sent.  Psycopg would warn of it."""
        if self.invalidated and self.dialect.driver == "psycopg" and getattr(context, "_is_server_side", False):
            self._safe_close_cursor(cursor)


class UnitEngine(OptionEngine):
    """The engine as units see it: tells the unit when connecting begins, fails or is done."""

    unit: Transaction | None = None
    settings: tuple[tuple[str, ConnectionCharacteristic, Any], ...] = ()
    """What each connection of it is set to: an isolation level, or that it only reads."""
    is_idle: Callable[[Any], bool]
    """Says of the driver's own connection that surely no transaction is open on it."""
    reset: Callable[[Any], None]
    """Sets it to SQLAlchemy's defaults on its way into the pool, where the driver does not say what was before."""

    def update_execution_options(self, **options: Any) -> None:
        # SQLAlchemy's dialects note the settings among them in a listener on the engine.  That one would have to be joined
        # with ours for each connection, see `UnitConnection`.
        self.dispatch.set_engine_execution_options(self, options)
        self._execution_options = self._execution_options.union(options)
        dialect: Any = self.dialect  # its interface lacks what every dialect has
        self.is_idle = idle_check(dialect.driver)
        known = dialect.connection_characteristics
        self.settings = tuple((name, known[name], value) for name, value in options.items())
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
            if connection is None:
                simple = transaction.database.has_connected and not transaction.enclosing
                connection = UnitConnection(self, transaction) if simple else self._connect(transaction)
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

    def _connect(self, transaction: Transaction) -> Connection:
        if transaction.enclosing and transaction.database.is_exhausted():
            return await_only(connect_unless_stuck(transaction, lambda: self._connect_to(transaction)))
        return self._connect_to(transaction)

    def _connect_to(self, transaction: Transaction) -> Connection:
        database = transaction.database
        if database.has_connected:
            return UnitConnection(self, transaction)
        with database.first_alone(transaction.owner.loop):
            return UnitConnection(self, transaction)

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


def _restoring(driver: str, lent: Any, engine: UnitEngine) -> Callable[[Any], None]:
    """Return what sets a connection back to what it is now: SQLAlchemy would say READ WRITE, say, where nothing was said.

    A hot standby refuses that, and a role that only reads by default would write.
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
    return engine.reset


def _take_turn(transaction: Transaction) -> None:
    turns = transaction.database.turns()
    if turns is not None and (turns.everyone or not transaction.read_only):
        await_only(turns.take(transaction, transaction.enclosing))


# -- the events


def _before_cursor_execute(  # noqa: PLR0917  # SQLAlchemy's signature
    connection: UnitConnection,
    cursor: Any,
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
    try:
        unit.before_statement(writes=writes)
    except PropagationError:
        if context is not None and context._is_server_side:  # SQLAlchemy 2.0 leaves it open, and psycopg warns of that
            connection._safe_close_cursor(cursor)
        raise
    if context is not None:
        context.sent_by_unit = True
    if writes:
        unit.wrote = unit.wrote_rows = True
    else:
        kind = does(statement.lstrip()[:OPENING])
        if kind is CONTROL and not (unit.database.family == "sqlite" and statement[:5] == "BEGIN"):
            unit.refuse_control(statement.split(maxsplit=1)[0].upper())
        if unit.pending_savepoint is not None:
            unit.pending_savepoint = statement.rpartition(" ")[2]
        elif kind is SOMETHING and not (unit.wrote_rows and unit.database.family != "mysql") and not selects(context):
            unit.wrote = True
            _note_rows(unit, statement)
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


def _note_rows(unit: Transaction, statement: str) -> None:
    """Note that a unit has rows that a rollback would take back; refuse what would commit them on MariaDB."""
    if unit.database.family == "mysql":
        statement = statement.lstrip()
        rows = rows_of(statement[:OPENING])
        if rows is Rows.OUTLIVES or (rows is Rows.COMMITS and unit.wrote_rows):
            unit.refuse_implicit_commit(" ".join(statement.split(maxsplit=2)[:2]).upper())
        if rows is not Rows.WRITES:
            return
    unit.wrote_rows = True


def _after_cursor_execute(
    connection: UnitConnection,
    _cursor: Any,
    statement: str,
    _parameters: Any,
    context: Any,
    _many: bool,  # noqa: FBT001  # SQLAlchemy's signature
) -> None:
    unit = connection.unit
    unit.after_statement()
    if context._is_server_side:
        context.cursor_fetch_strategy = open_stream(unit, context)
    how = None if unit.watch is None else unit.watch(unit.wrote_rows)
    if how is Ended.MAYBE:
        _hear_next_results(connection, unit)
    if how is not None and (how is not Ended.MAYBE or ends_in_its_tail(statement)):
        _ended(connection, unit, how)


def _hear_next_results(connection: UnitConnection, unit: Transaction) -> None:
    raw = connection.raw
    if "next_result" not in vars(raw):
        unit.unwatch.append(tell_next_results(raw, unit.raw_failed))


_LENT = "sqla_uow.raw"
"""Notes that the driver's own connection was handed out, until it is back in the pool."""


class _RawCalls:
    """Hears of what is sent on the driver's own connection.

    Args:
        unit: whose it is.
        driver: its name.
        raw: its connection.
    """

    __slots__ = ("_driver", "_raw", "_unit")

    def __init__(self, unit: Transaction, driver: str, raw: Any) -> None:
        self._unit = unit
        self._driver = driver
        self._raw = raw

    def begin_raw(self) -> object:
        self._look()
        return self._unit.begin_raw()

    def raw_failed(self, error: BaseException) -> None:
        if self._unit.database.family != "postgresql":
            self._unit.raw_failed(error)
        elif isinstance(error, Exception):  # else a savepoint there may have brought it back, as the driver knows
            self._unit.raw_conflicted(error)

    def end_raw(self, begun: object) -> None:
        self._unit.end_raw(begun)

    def raw_sent(self, text: str) -> None:
        unit = self._unit
        was_open, state = unit.was_open, self._look()
        # asyncpg's word may come when the body has just ended.
        open_here = unit.phase.is_active or unit.phase is Phase.COMMITTING
        if not open_here or unit.owner.in_flight is not None:
            return
        if (was_open and state is State.NONE) or ends_raw(unit.database.family, text):
            unit.ended_raw()

    def _look(self) -> State | None:
        state = state_of(self._driver, self._raw)
        self._unit.was_open = self._unit.was_open or state is State.OPEN
        return state


def _ended(connection: UnitConnection, unit: Transaction, how: Ended) -> None:
    """Make the end that nobody could see before known, and leave nothing of it to the next user of the connection."""
    if how is Ended.AUTOCOMMIT:
        lent: Any = connection._dbapi_connection
        lent.dbapi_connection.autocommit(False)  # noqa: FBT003  # the driver's signature
    unit.ended_by_statement(how)


class _Stale(enum.Enum):
    """What has been prepared before a migration, or by another client of a pooler."""

    HERE = "on this connection"
    IN_THE_POOL = "on all connections of the pool"


def _stale_plans(error: BaseException, driver: str) -> _Stale | None:
    """Say what the pool must renew of what was prepared, so that a call meets it once, not once a connection.

    SQLAlchemy does so itself for the plans of asyncpg.  Of what a pooler has forgotten only this connection is given up:
    where that is a matter of settings, all would be, again and again.
    """
    failure = classify(error) if isinstance(error, Exception) else None
    if failure is None or failure.kind is not Kind.STALE_PLAN:
        return None
    if driver == "asyncpg" and failure.code in ("0A000", "XX000"):
        return None
    return _Stale.HERE if failure.code in ("26000", "42P05") else _Stale.IN_THE_POOL


def _rollback(connection: UnitConnection) -> None:
    connection.unit.before_rollback(sys.exception())
    connection.unit.close_left_stream()


def _savepoint(connection: UnitConnection, _name: str | None) -> None:
    connection.unit.pending_savepoint = ""  # the name is generated later; read from the statement


def _rollback_savepoint(connection: UnitConnection, name: str, _context: None) -> None:
    unit = connection.unit
    unit.check_not_ending()
    unit.end_stream()
    unit.doom.roll_back_savepoint(name)
    unit.doom.end_savepoint(name)
    unit.rolling_back_to_savepoint = True
    unit.lifts_lock_wait = unit.lifts_lock_wait or unit.lifted_lock_wait  # SET LOCAL is undone as well


def _release_savepoint(connection: UnitConnection, name: str, _context: None) -> None:
    connection.unit.doom.end_savepoint(name)


def _reset(dbapi_connection: Any, record: ConnectionPoolEntry | None, state: PoolResetState) -> None:
    if state.asyncio_safe and record is not None and record.info:  # None: it was detached, and goes back to no pool
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


@functools.cache
def _returned(driver: str) -> Callable[[Any, ConnectionPoolEntry], None]:
    """Return the listener for connections that come back into a pool; one for each driver, so that none listens twice."""
    is_idle = idle_check(driver)

    def returned(dbapi_connection: Any, entry: ConnectionPoolEntry) -> None:
        if dbapi_connection is None:
            return
        raw = entry.driver_connection
        lent = entry.info.pop(_LENT, False)
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
    """Listen for what is told to no connection's class, once for each engine and its copies.

    `event.listen` itself ignores the same listener on the same target.  Asking `event.contains` first does not: it knows
    targets by id(), and a new pool that got the id of a collected one was left without its listener.

    Args:
        engine: of the units.
        shared: its pool lends one connection to several users at once, or one that is inside a transaction of somebody else.
    """
    if not shared:
        event.listen(engine.pool, "checkin", _returned(engine.dialect.driver))
    if engine.dialect.name == "sqlite":
        event.listen(engine.pool, "reset", _reset)
