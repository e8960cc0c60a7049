"""Rows that tell whether a transaction has committed.

A transaction writes the row of its token before COMMIT.  Another one asks by an INSERT of the same token: that waits while
the first one lives, where a SELECT would answer too early.  On another node of a Galera cluster it would not wait either, and
CockroachDB and YugabyteDB may lose the first one's lock before its COMMIT; there the INSERT is committed, so that one of the
two transactions fails.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from typing import TYPE_CHECKING

from sqlalchemy import Column, MetaData, String, Table, insert, update
from sqlalchemy.engine import Engine
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.exc import OperationalError as SAOperationalError
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.schema import CreateTable

from sqla_uow._databases.failures import Kind, classify, code_of
from sqla_uow._log import log
from sqla_uow._tasks.per_loop import PerLoop

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection
    from sqlalchemy.ext.asyncio import AsyncConnection

    from sqla_uow._databases.database import Database

__all__ = ["MARKERS", "Markers"]


MARKERS = Table("sqla_uow_commits", MetaData(), Column("token", String(36), primary_key=True))
"""The marker rows.  Made on first need; each transaction takes over a free one, so there are as many as units at a time."""
# In the connection's own schema: a map that leads each tenant to another would ask for as many tables.
_UNTRANSLATED = {"schema_translate_map": None}

_TABLE_EXISTS = frozenset({1050, "42P07"})


class Markers:
    """The marker rows of one manager.

    Args:
        database: where they are.

    Attributes:
        free: the tokens of rows that the next transactions may take over.
        ready: their table is there.
    """

    __slots__ = ("_database", "_locks", "free", "ready")

    def __init__(self, database: Database) -> None:
        self._database = database
        self._locks = PerLoop(asyncio.Lock)
        self.free: list[str] = []
        self.ready: bool = False

    async def make_table(self) -> None:
        """Make the marker table where it is needed and missing."""
        if self.ready or not self._database.system.ddl_is_apart:
            return
        async with self._locks.here():
            if not self.ready:
                # On a connection of its own, because DDL of MariaDB, say, commits what is open; and not one of the pool,
                # because units that wait for this table may hold them all.
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

    def write(self, connection: Connection, old: str | None) -> str:
        """Write a new token, and return it; in SQLAlchemy's greenlet.

        Args:
            connection: of the transaction.
            old: the token of a row that it may take over.
        """
        if not self.ready:  # the one writer is this transaction, SQLite's or a test's; its DDL is part of it
            connection.execute(CreateTable(MARKERS, if_not_exists=True), execution_options=_UNTRANSLATED)
        token = str(uuid.uuid4())
        if old is not None:
            taken_over = update(MARKERS).where(MARKERS.c.token == old).values(token=token)
            if connection.execute(taken_over, execution_options=_UNTRANSLATED).rowcount:
                return token
        connection.execute(insert(MARKERS).values(token=token), execution_options=_UNTRANSLATED)
        return token

    async def ask(self, connection: AsyncConnection, token: str | None) -> str:
        """Ask by an INSERT whether a token has been committed.

        Returns:
            "committed"; "aborted"; "forced": aborted, and the row is ours, so that it stays so; "again": not known yet;
            "undecidable": nobody could tell.
        """
        try:
            if not self._database.system.ddl_is_apart:  # by the transaction in question, if there was none before
                await connection.execute(CreateTable(MARKERS, if_not_exists=True), execution_options=_UNTRANSLATED)
            await connection.execute(insert(MARKERS).values(token=token), execution_options=_UNTRANSLATED)
            if await self._database.system.may_lose_locks(connection):
                return await _force(connection)
        except IntegrityError:
            return "committed"
        except SAOperationalError as error:
            log(logging.DEBUG, "probing a commit marker failed (%s); probing again", type(error).__name__, error=error)
            return "again"
        finally:
            await connection.rollback()
        return "aborted"


async def _force(connection: AsyncConnection) -> str:
    """Let the cluster decide between the transaction, which may still be under way on its node, and this one."""
    try:
        await connection.commit()
    except DBAPIError as error:
        # Lost: then nobody could tell whose row it is.  Refused: the transaction may be there.
        failure = classify(error)
        known = failure is None or failure.kind not in (Kind.LOST, Kind.AMBIGUOUS)
        return "again" if known else "undecidable"
    return "forced"
