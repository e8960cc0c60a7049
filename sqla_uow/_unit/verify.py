"""Settle an unknown COMMIT.

PostgreSQL keeps the status of a transaction id.  Elsewhere a marker row is written in the same transaction, and probed by
an INSERT of the same token: it waits while the old transaction lives, where a SELECT would answer too early.  On another node
of a Galera cluster it would not wait either, and CockroachDB and YugabyteDB may lose the old one's lock before its COMMIT, so
there the INSERT is committed: one of the two transactions then fails.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from typing import TYPE_CHECKING

from sqlalchemy import Column, MetaData, String, Table, insert, text, update
from sqlalchemy.engine import Engine
from sqlalchemy.exc import DBAPIError, IntegrityError, ProgrammingError
from sqlalchemy.exc import OperationalError as SAOperationalError
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.schema import CreateTable

from sqla_uow._databases.failures import Kind, classify, code_of
from sqla_uow._log import record
from sqla_uow._tasks.per_loop import PerLoop
from sqla_uow.typing import Status

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from sqlalchemy.engine import Connection
    from sqlalchemy.ext.asyncio import AsyncConnection

    from sqla_uow._databases.database import Database
    from sqla_uow._transaction.transaction import Transaction

__all__ = ["Notary", "Witness"]


VERIFY_SECONDS = 30.0
"""How long an outcome without a deadline is asked for, while the server may be restarting."""
POLL_SECONDS = 0.05

MARKERS = Table("sqla_uow_commits", MetaData(), Column("token", String(36), primary_key=True))
"""The marker rows.  Made on first need; each transaction takes over a free one, so there are as many as units at a time."""
# In the connection's own schema: a map that leads each tenant to another would ask for as many tables.
_UNTRANSLATED = {"schema_translate_map": None}


_TABLE_EXISTS = frozenset({1050, "42P07"})

# PostgreSQL: an id is not durable before something of its transaction is. After a crash it can be given again, and the
# status is somebody else's (seen on 18.6). Statistics are reset by a crash, so the time of their reset tells one.
_SIGN = "SELECT pg_current_xact_id()::text, stats_reset::text FROM pg_stat_bgwriter"
_LIFE = text("SELECT pg_is_in_recovery(), stats_reset::text FROM pg_stat_bgwriter")
_STATUS = text("SELECT pg_xact_status(CAST(:xid AS text)::xid8)")
_FUTURE = "22023"
# The checkpoint at the end of recovery has the next id as recovery found it; only such a one is where its redo begins.
_SURVIVED = text(
    "SELECT CASE WHEN CAST(:xid AS text)::numeric >= next THEN 'aborted' WHEN redo_lsn = checkpoint_lsn THEN 'committed' END "
    "FROM (SELECT split_part(next_xid, ':', 1)::numeric * 4294967296 + split_part(next_xid, ':', 2)::numeric AS next, "
    "redo_lsn, checkpoint_lsn FROM pg_control_checkpoint()) AS control"
)


class Notary:
    """What verification needs per manager: whether the marker table is there, and which markers are free."""

    __slots__ = ("_database", "_locks", "free", "ready")

    def __init__(self, database: Database) -> None:
        self._database = database
        self._locks = PerLoop(asyncio.Lock)
        self.ready = False
        self.free: list[str] = []

    def witness(self) -> Witness:
        """Return a witness for a unit that begins."""
        return Witness(self, self._database)

    async def make_table(self) -> None:
        """Make the marker table where it is needed and missing."""
        if self.ready or not self._database.system.ddl_is_apart:
            return
        async with self._locks.here():
            if not self.ready:
                # On a connection of its own, as MariaDB's DDL commits whatever is open, say; and not one of the pool, where
                # units that wait for this table may hold them all.
                engine = self._database.sync_engine
                beside = AsyncEngine(Engine(engine.pool.recreate(), engine.dialect, engine.url))
                try:
                    async with beside.begin() as connection:
                        await connection.run_sync(MARKERS.metadata.create_all)
                except DBAPIError as error:
                    if (
                        error.orig is None or code_of(error.orig) not in _TABLE_EXISTS
                    ):  # made by another process meanwhile
                        raise
                finally:
                    await beside.dispose()
                self.ready = True


class Witness:
    """Signs one transaction before its COMMIT, and says afterwards whether it is there."""

    __slots__ = ("_database", "_life", "_notary", "_old", "_outlawed", "_token", "signed")

    def __init__(self, notary: Notary, database: Database) -> None:
        self._notary = notary
        self._database = database
        # Before the transaction's snapshot: a row that is younger would be a conflict (innodb_snapshot_isolation).
        self._old = notary.free.pop() if notary.free else None
        self._token: str | None = None
        self._life: str | None = None
        self._outlawed = False  # the token is in a row of ours, so the transaction can never bring it
        self.signed = False

    async def get_ready(self, transaction: Transaction) -> None:
        """See that `sign` will work; not in SQLAlchemy's greenlet."""
        try:
            await self._notary.make_table()
        except Exception as error:  # on a connection of its own: the transaction is sound, and may be run again
            transaction.connect_failure = classify(error, connecting=True)
            raise

    def sign(self, connection: Connection) -> None:
        """Make the transaction recognisable; in SQLAlchemy's greenlet, just before COMMIT."""
        if self._database.keeps_status():
            self._token, self._life = connection.exec_driver_sql(_SIGN).one()
        else:
            self._mark(connection)
        self.signed = True

    def _mark(self, connection: Connection) -> None:
        if not self._notary.ready:  # the one writer is this transaction, SQLite's or a test's; its DDL is part of it
            connection.execute(CreateTable(MARKERS, if_not_exists=True), execution_options=_UNTRANSLATED)
        self._token = str(uuid.uuid4())
        if self._old is not None:
            taken_over = update(MARKERS).where(MARKERS.c.token == self._old).values(token=self._token)
            if connection.execute(taken_over, execution_options=_UNTRANSLATED).rowcount:
                return
        connection.execute(insert(MARKERS).values(token=self._token), execution_options=_UNTRANSLATED)

    def settle(self, status: Status) -> None:
        """Take note of the outcome: the marker that is there now is free for another transaction."""
        if status is Status.AMBIGUOUS or self._database.keeps_status():
            return
        committed = self.signed and status is Status.COMMITTED
        there = [self._token] if committed else [self._old, *([self._token] if self._outlawed else [])]
        self._notary.free.extend(marker for marker in there if marker is not None)
        self._notary.ready = self._notary.ready or committed

    async def verdict(self, transaction: Transaction) -> bool | None:
        """Ask until there is an answer.

        Returns:
            True: committed.  False: not, and it never will be.  None: not known within the deadline, or ever.
        """
        until = transaction.deadline if transaction.deadline is not None else transaction.clock() + VERIFY_SECONDS
        ask = self._ask_status if self._database.keeps_status() else self._ask_marker
        while transaction.clock() < until:
            try:
                async with asyncio.timeout(max(0.01, until - transaction.clock())):
                    answer = await _on_fresh_connection(self._database.engine, ask)
            except ProgrammingError:
                raise
            except Exception as error:  # of the server, the network, or a pool that others hold: not for ever
                record(
                    logging.DEBUG, "asking for the outcome of a COMMIT failed (%s); asking again", type(error).__name__,
                    function=transaction.name, error=error,
                )  # fmt: skip
                answer = "again"
            if answer != "again":
                return {"committed": True, "aborted": False}.get(answer)
            await asyncio.sleep(POLL_SECONDS)
        return None

    async def _ask_status(self, connection: AsyncConnection) -> str:
        standby, life = (await connection.execute(_LIFE)).one()
        if standby:  # it may not have heard of the transaction yet
            return "again"
        try:
            status = await connection.scalar(_STATUS, {"xid": self._token})
        except DBAPIError as error:
            if getattr(error.orig, "sqlstate", None) != _FUTURE:
                raise
            return "aborted"  # a server that crashed has forgotten it
        if status == "committed" and life != self._life:
            return str(await connection.scalar(_SURVIVED, {"xid": self._token}))
        return "again" if status == "in progress" else str(status)  # None is an id too old to be known: undecidable

    async def _ask_marker(self, connection: AsyncConnection) -> str:
        try:
            if not self._database.system.ddl_is_apart:  # by the transaction in question, if there was none before
                await connection.execute(CreateTable(MARKERS, if_not_exists=True), execution_options=_UNTRANSLATED)
            await connection.execute(insert(MARKERS).values(token=self._token), execution_options=_UNTRANSLATED)
            if await self._database.system.may_lose_locks(connection):
                return await self._outlaw(connection)
        except IntegrityError:
            return "committed"
        except SAOperationalError as error:
            record(
                logging.DEBUG, "probing a commit marker failed (%s); probing again", type(error).__name__, error=error
            )
            return "again"
        finally:
            await connection.rollback()
        return "aborted"

    async def _outlaw(self, connection: AsyncConnection) -> str:
        """Let the cluster decide between the transaction, which may still be under way on its node, and this one."""
        try:
            await connection.commit()
        except DBAPIError as error:
            # Lost: whose row it is then, nobody could tell.  Refused: the transaction may be there.
            failure = classify(error)
            known = failure is None or failure.kind not in (Kind.LOST, Kind.AMBIGUOUS)
            return "again" if known else "undecidable"
        self._outlawed = True
        return "aborted"


async def _on_fresh_connection(engine: AsyncEngine, ask: Callable[[AsyncConnection], Awaitable[str]]) -> str:
    async with engine.connect() as connection:
        return await ask(connection)
