"""The engine of a unit: takes the unit's connection, of its database or of a replica."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.util import await_only

from sqla_uow._databases.self_wait import connect_unless_stuck
from sqla_uow._session.connection import UnitConnection
from sqla_uow._session.connection_events import listen_to
from sqla_uow._session.pool import LendingEngine
from sqla_uow._transaction.reports import before_connect, connect_failed

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection

    from sqla_uow._databases.database import Database
    from sqla_uow._replicas.router import ReplicaRouter
    from sqla_uow._transaction.transaction import Transaction

__all__ = ["UnitEngine"]

listen_to(UnitConnection)


class UnitEngine(LendingEngine):
    """The engine of a unit: tells the unit that it connects, and that it could not."""

    transaction: Transaction | None = None

    @classmethod
    def for_unit(cls, database: Database, transaction: Transaction) -> AsyncEngine:
        """Return the engine for units like this one, made once for each level, for reading and for writing."""
        key = (transaction.isolation, transaction.read_only)
        engine = database.unit_engines.get(key)
        if engine is None:
            options = database.system.engine_options(transaction.isolation, read_only=transaction.read_only)
            engine = database.unit_engines[key] = AsyncEngine(cls(database.sync_engine, options))
        return engine

    def of(self, transaction: Transaction) -> UnitEngine:
        """Return a copy for one unit.  Making an option engine costs ten times as much."""
        engine = UnitEngine.__new__(UnitEngine)
        engine.__dict__.update(self.__dict__)
        engine.transaction = transaction
        return engine

    def _lead_to(self, database: Database, transaction: Transaction) -> None:
        """Lead to another database.  Sessions find their connections by the engine, so it has to stay the same object."""
        self.__dict__.update(self.for_unit(database, transaction).sync_engine.__dict__)
        self.transaction = transaction

    def connect(self) -> Connection:
        transaction = self.transaction
        if transaction is None or transaction.connection is not None:
            return super().connect()
        times = transaction.times
        began = 0.0 if times is None else times.clock()
        try:
            if transaction.preamble is not None and transaction.preamble.before is not None:
                await_only(transaction.preamble.before())
            before_connect(transaction)
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
            self.unit_driver.explain(error)
            connect_failed(transaction, error)
            raise
        finally:
            if times is not None:
                times.connection_seconds = times.clock() - began
        transaction.owner.end_operation()
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

    def _connect_to_replica(self, replicas: ReplicaRouter, transaction: Transaction) -> Connection | None:
        def connect(database: Database) -> Connection:
            self._lead_to(database, transaction)
            return UnitConnection(self, transaction)

        try:
            lent = await_only(replicas.lend(transaction, connect))
            if lent is None:
                return None
            transaction.replica, connection = lent
            transaction.database = transaction.replica.database
            return connection
        finally:
            self._lead_to(transaction.database, transaction)


def _take_turn(transaction: Transaction) -> None:
    turn = transaction.turn
    if turn is not None and not turn.taken:
        await_only(turn.take())
        transaction.lock_wait = turn.lock_wait
    queue = transaction.database.writer_queue()
    if queue is not None and (queue.everyone or not transaction.read_only):
        await_only(queue.take(transaction, transaction.enclosing))
