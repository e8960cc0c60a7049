"""The connection of a unit: reports errors, sends COMMIT, and hands out the driver's own connection.

Errors and COMMIT are overridden and not listened to: a listener of the user that raises would keep ours from being called.  That
takes a few private names of SQLAlchemy's events and connections, the same in 2.0.58 and 2.1.9: the tests of bindings listen to
engines, classes and single connections.
"""

from __future__ import annotations

import asyncio
import enum
from typing import TYPE_CHECKING, Any

from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError

from sqla_uow._databases.driver import State
from sqla_uow._databases.failures import Kind, classify
from sqla_uow._databases.interrupt import stop_statement
from sqla_uow._session.pool import HANDED_OUT
from sqla_uow._transaction.committing import (
    before_commit,
    check_driver,
    refuse_answer,
    refuse_closed,
)
from sqla_uow._transaction.phase import Phase
from sqla_uow._transaction.raw_calls import RawCalls
from sqla_uow._transaction.reports import operation_failed
from sqla_uow.errors import PropagationError, ReadOnlyError, UnitOfWorkError

if TYPE_CHECKING:
    from typing import NoReturn

    from sqlalchemy.pool import PoolProxiedConnection

    from sqla_uow._databases.driver import Driver
    from sqla_uow._session.pool import LendingEngine
    from sqla_uow._transaction.transaction import Transaction

__all__ = ["UnitConnection"]


class UnitConnection(Connection):
    """A connection that knows the transaction that it is for."""

    def __init__(self, engine: LendingEngine, transaction: Transaction) -> None:
        self.transaction = transaction
        self.driver = engine.unit_driver
        try:
            heard = engine._has_events
            if heard:  # the user listens: to join those listeners with ours costs 30 us for each connection
                super().__init__(engine)
                self._has_events = True  # SQLAlchemy 2.0 takes the engine's flag for the connection's
            else:  # only we listen: all connections share one dispatch, as making one costs 15 us
                self.dispatch = _dispatch
                super().__init__(engine, _has_events=True)
            lent: Any = self._dbapi_connection
            self.raw: Any = engine.dialect.get_driver_connection(lent.dbapi_connection)
            if not heard and not engine.is_idle(self.raw) and self.driver.in_transaction(self):
                self._check_lent(engine)
            if engine.settings:
                self._set_up(engine)
        except BaseException:
            # For example cancelled while psycopg sets the isolation level.  Nobody else knows the connection yet.
            lent = self.__dict__.get("_dbapi_connection")
            if lent is not None:
                lent.invalidate()
            raise

    def _check_lent(self, engine: LendingEngine) -> None:
        """Refuse a connection that the pool has lent in the middle of somebody else's transaction, and discard it.

        If listeners see a connection before we do, the transaction may be theirs.  SQLite's driver can be told always to be in
        one, and a unit of a test is inside the test's.

        Raises:
            PropagationError: it is.
        """
        pool: Any = engine.pool
        database = self.transaction.database
        if pool.dispatch.checkout or database.system.lends_open or database.within is not None:
            return
        raise PropagationError(
            f"the pool has lent {self.transaction.name} a connection in the middle of a transaction, which is discarded; end the "
            "transaction where the connection was used before, also on the driver's own connection, and leave "
            "pool_reset_on_return as it is"
        )

    def _set_up(self, engine: LendingEngine) -> None:
        """Do what ``execution_options(isolation_level=...)`` does; that looks up each setting again, for a fortieth of a unit."""
        lent: Any = self._dbapi_connection
        adapted, dialect = lent.dbapi_connection, engine.dialect
        # A unit that is a savepoint in somebody else's transaction has its own dialect, which sets nothing.
        restore = None if self.transaction.database.within else self.driver.set_back(lent)
        lent._connection_record.finalize_callback.append(restore or engine.reset)
        for name, characteristic, value in engine.settings:
            # If a listener has begun a transaction, it is too late for the driver, but not for `System.open`.
            if name != "postgresql_readonly" or not self.driver.in_transaction(self):
                characteristic.set_characteristic(dialect, adapted, value)

    @property
    def connection(self) -> PoolProxiedConnection:
        """The connection of the pool, and the only way to the driver's own: SQLAlchemy does not tell what is sent on that."""
        transaction = self.transaction
        if (
            transaction.phase.is_active
            and not transaction.raw_taken
            and transaction.doom.marked is None
            and self._dbapi_connection is not None
        ):
            self._hand_out(transaction)
        return super().connection

    @property
    def info(self) -> dict[Any, Any]:
        """The pool's notes on the connection; reading them does not hand it out."""
        return super().connection.info

    def _hand_out(self, transaction: Transaction) -> None:
        transaction.raw_taken = True
        transaction.wrote = transaction.wrote or not transaction.read_only
        driver, raw = self.driver, self.raw
        try:
            driver.begin_now(self)
        except BaseException as error:
            transaction.doom.mark(error, failure=classify(error) if isinstance(error, Exception) else None, hard=True)
            self.invalidate(error)
            raise
        self.info[HANDED_OUT] = True
        transaction.was_open = transaction.was_open or driver.state(raw) is State.OPEN
        transaction.unwatch += (driver.tell_raw_calls(raw, RawCalls(transaction, driver, raw)),)

    def _commit_impl(self) -> None:
        """Send COMMIT after all listeners have run, if the driver says that there is something to commit.

        Raises:
            RollbackOnlyError: it would be, or was, a ROLLBACK.
        """
        transaction = self.transaction
        before_commit(transaction)
        self.dispatch.commit(self)
        if self._echo:
            self._log_info("COMMIT")
        if transaction.doom.marked is not None:  # a listener may have sent what failed
            transaction.check_sound()
        if transaction.stream is not None:
            transaction.stream.close_if_left()
        answer = None if self.invalidated else self._ask_driver(transaction)
        try:
            self.engine.dialect.do_commit(super().connection)
        except BaseException as error:
            self._handle_dbapi_exception(error, None, None, None, None)
        if answer is not None and answer.tag == "ROLLBACK":
            refuse_answer(transaction)
        # On a closed connection the adapter sends nothing, and raises nothing.
        if transaction.phase is not Phase.SENT and not self.invalidated:
            refuse_closed(transaction)

    def _ask_driver(self, transaction: Transaction) -> Any:
        """Ask the driver whether there is something to commit; return what will have the server's answer, if the driver drops that.

        Raises:
            RollbackOnlyError: there is nothing.
        """
        driver, raw, answer = self.driver, self.raw, None
        if transaction.raw_taken or driver.knows_failure:
            state = driver.state(raw)
            check_driver(transaction, state)
            if state is None and not driver.says_closed:  # closed: its adapter may raise, or do nothing
                refuse_closed(transaction)
        # Where the driver does not say that a transaction has failed, the server does, unless the unit is a savepoint.
        if not driver.knows_failure and transaction.database.within is None:
            answer = driver.listen_to_commit(self)
        if driver.is_open(raw):
            transaction.phase = Phase.SENT  # from here on the outcome may be unknown
        return answer

    def _handle_dbapi_exception(  # noqa: PLR0917  # SQLAlchemy's signature
        self,
        e: BaseException,
        statement: Any,
        parameters: Any,
        cursor: Any,
        context: Any,
        is_sub_exec: bool = False,  # noqa: FBT001, FBT002  # SQLAlchemy's signature
    ) -> NoReturn:
        """Tell the unit of an error before listeners of ``handle_error`` can change it."""
        transaction = self.transaction
        if isinstance(e, UnitOfWorkError) or self._reentrant_error:
            super()._handle_dbapi_exception(e, statement, parameters, cursor, context, is_sub_exec)
        # An error while rows are fetched comes without the statement.
        fetching = statement is None and context is not None
        sent = fetching or getattr(context, "sent_by_unit", context is None and transaction.owner.in_flight is not None)
        if isinstance(e, OSError) and not isinstance(e, TimeoutError) and (sent or statement is None):
            self._is_disconnect = True  # from the socket: SQLAlchemy does not know it as an error of the driver
        # A ROLLBACK failed.  asyncpg forgets that it is in a transaction, so the pool would lend the connection as it is.
        undone = statement is None and context is None and transaction.phase in (Phase.ACTIVE, Phase.ENDING)
        stale = _stale_plans(e, self.driver)
        if stale is _Stale.IN_THE_POOL:
            self._is_disconnect = True
        if isinstance(e, asyncio.CancelledError) and transaction.phase is not Phase.SENT and not self.invalidated:
            transaction.unwatch_raw()  # so that what stops the statement is not taken for a call of another task
            stop_statement(self, getattr(context, "cursor", None))
        try:
            super()._handle_dbapi_exception(e, statement, parameters, cursor, context, is_sub_exec)
        except BaseException as shown:
            self.driver.explain(shown)
            if (undone or stale is _Stale.HERE) and not self.invalidated:
                self.invalidate(e)
                if isinstance(shown, DBAPIError):
                    shown.connection_invalidated = True
            self._close_server_cursor(cursor, context)
            operation_failed(transaction, e, shown, lost=self.invalidated, sent=sent)
            if transaction.self_wait is not None:
                transaction.doom.mark(transaction.self_wait, hard=True)
                raise transaction.self_wait from e
            failure = classify(e) if transaction.read_only and isinstance(e, Exception) else None
            if failure is not None and failure.kind is Kind.READ_ONLY:
                raise ReadOnlyError(transaction.read_only_message("a write was sent")) from e
            raise

    def _close_server_cursor(self, cursor: Any, context: Any) -> None:
        """Close the cursor that SQLAlchemy leaves open on a lost connection, if the driver would warn.  Nothing is sent."""
        if self.invalidated and self.driver.warns_of_cursors and getattr(context, "_is_server_side", False):
            self._safe_close_cursor(cursor)


_dispatch: Any = UnitConnection.__new__(UnitConnection).dispatch


def _listen_to_one(event_key: Any, **options: Any) -> None:
    """Give a connection a dispatch of its own, because somebody listens to it alone."""
    connection = event_key.dispatch_target
    del connection.dispatch
    connection.dispatch._listen(event_key, **options)


_dispatch._listen = _listen_to_one


class _Stale(enum.Enum):
    """Which connections hold statements that were prepared before a migration, or by another client of a pooler."""

    HERE = "on this connection"
    IN_THE_POOL = "on all connections of the pool"


def _stale_plans(error: BaseException, driver: Driver) -> _Stale | None:
    """Say which connections must be renewed, so that a call fails once, not once for each connection.

    SQLAlchemy itself renews the plans of asyncpg.  If a pooler has forgotten a statement, only this connection is given up:
    wrong settings of the pooler would cost all connections, again and again.
    """
    failure = classify(error) if isinstance(error, Exception) else None
    if failure is None or failure.kind is not Kind.STALE_PLAN:
        return None
    if driver.renews_plans and failure.code in ("0A000", "XX000"):
        return None
    return _Stale.HERE if failure.code in ("26000", "42P05") else _Stale.IN_THE_POOL
