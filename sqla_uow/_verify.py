"""Settle an unknown COMMIT.

PostgreSQL keeps the status of a transaction id.  Elsewhere a marker row is written in the same transaction, and probed by
an INSERT of the same token: it waits while the old transaction lives, where a SELECT would answer too early.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from typing import TYPE_CHECKING, Any

from sqlalchemy import Column, MetaData, String, Table, delete, insert, text
from sqlalchemy.engine import Engine
from sqlalchemy.exc import DBAPIError, IntegrityError, ProgrammingError
from sqlalchemy.exc import OperationalError as SAOperationalError
from sqlalchemy.ext.asyncio import AsyncEngine

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from sqlalchemy.engine import Connection
    from sqlalchemy.ext.asyncio import AsyncConnection

    from sqla_uow._database import Database
    from sqla_uow._transaction import Transaction

__all__ = ["MARKERS", "Notary", "Witness"]

logger = logging.getLogger("sqla_uow")

VERIFY_SECONDS = 30.0
"""How long an outcome without a deadline is asked for, while the server may be restarting."""
POLL_SECONDS = 0.05
_PURGE_AT = 100

MARKERS = Table("sqla_uow_commits", MetaData(), Column("token", String(36), primary_key=True))
"""The marker rows.  Made on first need; rows whose outcome is known are deleted in batches."""


class Notary:
    """What verification needs per manager: whether the marker table is there, and which markers are done with."""

    __slots__ = ("_database", "_lock", "ready", "settled")

    def __init__(self, database: Database[Any]) -> None:
        self._database = database
        self._lock: asyncio.Lock | None = None
        self.ready = database.family == "postgresql"
        self.settled: list[str] = []

    async def witness(self) -> Witness:
        """Return a fresh witness for one unit; makes the marker table where it is needed and missing."""
        if not self.ready and self._database.family != "sqlite":
            await self._make_table()
        return Witness(self, self._database)

    async def _make_table(self) -> None:
        if self._lock is None:
            self._lock = asyncio.Lock()
        async with self._lock:
            if not self.ready:
                # On a connection of its own, as MariaDB's DDL commits whatever is open; and not one of the pool, where
                # units that wait for this table may hold them all.
                engine = self._database.sync_engine
                beside = AsyncEngine(Engine(engine.pool.recreate(), engine.dialect, engine.url))
                try:
                    async with beside.begin() as connection:
                        await connection.run_sync(MARKERS.metadata.create_all)
                finally:
                    await beside.dispose()
                self.ready = True


class Witness:
    """Signs one transaction before its COMMIT, and says afterwards whether it is there."""

    __slots__ = ("_database", "_notary", "_purged", "_token", "signed")

    def __init__(self, notary: Notary, database: Database[Any]) -> None:
        self._notary = notary
        self._database = database
        self._purged: list[str] = []
        self._token: str | None = None
        self.signed = False

    def sign(self, connection: Connection) -> None:
        """Make the transaction recognisable; in SQLAlchemy's greenlet, just before COMMIT."""
        if self._database.family == "postgresql":
            self._token = connection.exec_driver_sql("SELECT pg_current_xact_id()::text").scalar_one()
        else:
            self._mark(connection)
        self.signed = True

    def _mark(self, connection: Connection) -> None:
        notary = self._notary
        if not notary.ready:  # SQLite, whose one writer is this transaction; its DDL is part of it
            MARKERS.create(connection, checkfirst=True)
        if len(notary.settled) >= _PURGE_AT:
            self._purged, notary.settled = notary.settled, []
            connection.execute(delete(MARKERS).where(MARKERS.c.token.in_(self._purged)))
        self._token = str(uuid.uuid4())
        connection.execute(insert(MARKERS).values(token=self._token))

    def settle(self, *, committed: bool) -> None:
        """Take note of the outcome: the marker may go, or those that went with it are still there."""
        if self._token is None or self._database.family == "postgresql":
            return
        self._notary.settled += [self._token] if committed else self._purged
        self._notary.ready = self._notary.ready or committed

    async def verdict(self, transaction: Transaction) -> bool | None:
        """Ask until there is an answer.

        Returns:
            True: committed.  False: not, and it never will be.  None: not known within the deadline, or ever.
        """
        until = transaction.deadline if transaction.deadline is not None else transaction.clock() + VERIFY_SECONDS
        ask = self._ask_status if self._database.family == "postgresql" else self._ask_marker
        while transaction.clock() < until:
            try:
                async with asyncio.timeout(max(0.01, until - transaction.clock())):
                    answer = await _on_fresh_connection(self._database.engine, ask)
            except (OSError, DBAPIError) as error:  # TimeoutError is an OSError
                if isinstance(error, ProgrammingError):
                    raise
                logger.debug("asking for the outcome of a COMMIT failed (%s); asking again", type(error).__name__)
                answer = "again"
            if answer != "again":
                return {"committed": True, "aborted": False}.get(answer)
            await asyncio.sleep(POLL_SECONDS)
        return None

    async def _ask_status(self, connection: AsyncConnection) -> str:
        status = await connection.scalar(text("SELECT pg_xact_status(CAST(:xid AS text)::xid8)"), {"xid": self._token})
        if status == "in progress":
            return "again"
        return str(status)  # None is an id too old to be known: undecidable

    async def _ask_marker(self, connection: AsyncConnection) -> str:
        try:
            if self._database.family == "sqlite":  # made by the transaction in question, if there was none before
                await connection.run_sync(MARKERS.metadata.create_all)
            await connection.execute(insert(MARKERS).values(token=self._token))
        except IntegrityError:
            return "committed"
        except SAOperationalError as error:
            logger.debug("probing a commit marker failed (%s); probing again", type(error).__name__)
            return "again"
        finally:
            await connection.rollback()
        return "aborted"


async def _on_fresh_connection(engine: AsyncEngine, ask: Callable[[AsyncConnection], Awaitable[str]]) -> str:
    async with engine.connect() as connection:
        return await ask(connection)
