"""What became of a COMMIT whose answer was lost.

PostgreSQL keeps the status of a transaction id.  Elsewhere a row tells; see `markers`.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, ProgrammingError

from sqla_uow._databases.failures import classify
from sqla_uow._log import log
from sqla_uow._unit.markers import Markers
from sqla_uow.typing import Status

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from sqlalchemy.engine import Connection
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

    from sqla_uow._databases.database import Database
    from sqla_uow._transaction.transaction import Transaction

__all__ = ["Verification", "Verifier"]


VERIFY_SECONDS = 30.0
"""How long an outcome without a deadline is asked for, while the server may be restarting."""
POLL_SECONDS = 0.05

# PostgreSQL: an id is not durable before something of its transaction is. After a crash it can be given again, and the
# status is somebody else's (seen on 18.6). Statistics are reset by a crash, so the time of their reset tells one.
_MARK = "SELECT pg_current_xact_id()::text, stats_reset::text FROM pg_stat_bgwriter"
_LIFE = text("SELECT pg_is_in_recovery(), stats_reset::text FROM pg_stat_bgwriter")
_STATUS = text("SELECT pg_xact_status(CAST(:xid AS text)::xid8)")
_FUTURE = "22023"
# The checkpoint at the end of recovery has the next id as recovery found it; only such a one is where its redo begins.
_SURVIVED = text(
    "SELECT CASE WHEN CAST(:xid AS text)::numeric >= next THEN 'aborted' WHEN redo_lsn = checkpoint_lsn THEN 'committed' END "
    "FROM (SELECT split_part(next_xid, ':', 1)::numeric * 4294967296 + split_part(next_xid, ':', 2)::numeric AS next, "
    "redo_lsn, checkpoint_lsn FROM pg_control_checkpoint()) AS control"
)


class Verifier:
    """Verifies the COMMITs of one manager.

    Args:
        database: of the manager.

    Attributes:
        markers: the rows that tell, where the server does not.
    """

    __slots__ = ("_database", "markers")

    def __init__(self, database: Database) -> None:
        self._database = database
        self.markers: Markers = Markers(database)

    def verification(self) -> Verification:
        """Return the verification of a unit that begins."""
        return Verification(self.markers, self._database)


class Verification:
    """Marks one transaction before its COMMIT, and says afterwards whether it is there."""

    __slots__ = ("_database", "_forced", "_life", "_markers", "_old", "_token", "marked")

    def __init__(self, markers: Markers, database: Database) -> None:
        self._markers = markers
        self._database = database
        # Before the transaction's snapshot: a row that is younger would be a conflict (innodb_snapshot_isolation).
        self._old = markers.free.pop() if markers.free else None
        self._token: str | None = None
        self._life: str | None = None
        self._forced = False  # the token is in a row of ours, so the transaction can never bring it
        self.marked: bool = False

    async def get_ready(self, transaction: Transaction) -> None:
        """See that `mark` will work; not in SQLAlchemy's greenlet."""
        try:
            await self._markers.make_table()
        except Exception as error:  # on a connection of its own: the transaction is sound, and may be run again
            transaction.connect_failure = classify(error, connecting=True)
            raise

    def mark(self, connection: Connection) -> None:
        """Make the transaction recognisable; in SQLAlchemy's greenlet, just before COMMIT."""
        if self._database.keeps_status():
            self._token, self._life = connection.exec_driver_sql(_MARK).one()
        else:
            self._token = self._markers.write(connection, self._old)
        self.marked = True

    def conclude(self, status: Status) -> None:
        """Take note of the outcome: the marker that is there now is free for another transaction."""
        if status is Status.AMBIGUOUS or self._database.keeps_status():
            return
        committed = self.marked and status is Status.COMMITTED
        there = [self._token] if committed else [self._old, *([self._token] if self._forced else [])]
        self._markers.free.extend(marker for marker in there if marker is not None)
        self._markers.ready = self._markers.ready or committed

    async def ask(self, transaction: Transaction) -> bool | None:
        """Ask until there is an answer.

        Returns:
            True: committed.  False: not, and it never will be.  None: not known within the deadline, or ever.
        """
        until = transaction.deadline if transaction.deadline is not None else transaction.clock() + VERIFY_SECONDS
        question = self._ask_status if self._database.keeps_status() else self._ask_marker
        while transaction.clock() < until:
            try:
                async with asyncio.timeout(max(0.01, until - transaction.clock())):
                    answer = await _on_fresh_connection(self._database.engine, question)
            except ProgrammingError:
                raise
            except Exception as error:  # of the server, the network, or a pool that others hold: not for ever
                log(
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
        answer = await self._markers.ask(connection, self._token)
        if answer != "forced":
            return answer
        self._forced = True
        return "aborted"


async def _on_fresh_connection(engine: AsyncEngine, ask: Callable[[AsyncConnection], Awaitable[str]]) -> str:
    async with engine.connect() as connection:
        return await ask(connection)
