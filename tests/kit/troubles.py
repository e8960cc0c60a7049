"""Every failure that may be retried, provoked for real: a second session, a lock, a snapshot, a killed backend."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from typing import Any, ClassVar

from sqlalchemy import event, text

from tests.kit.models import Note, Versioned

CONFLICT, LOCK, STALE, LOST = "conflict", "lock timeout", "stale version", "lost connection"


class Trouble:
    """One failure that strikes a unit from outside.

    `strike` is called in the unit's body and either raises what the database reports, or leaves the unit so that its
    COMMIT will.  `settle` ends the other session; called at the next attempt's start and at the test's end.
    """

    reason: ClassVar[str] = CONFLICT
    code: ClassVar[str | None] = None
    isolation: ClassVar[Any] = None
    options: ClassVar[dict[str, Any]] = {}
    at_commit: ClassVar[bool] = False
    needs_first: ClassVar[bool] = False
    """It strikes the unit's first statement, so the unit cannot have written before."""

    def __init__(self, db):
        self.db = db
        self.struck = 0
        self._outside = contextlib.AsyncExitStack()

    def engine(self, **options):
        return self.db.engine(**self.options, **options)

    async def settle(self):
        await self._outside.aclose()

    async def write(self, session):
        """Do what the unit is for: half of it before the trouble, so that half a commit would show."""
        session.add(Note(text="written"))
        await session.flush()

    async def strike(self, session):
        self.struck += 1
        if not self.needs_first:
            await self.write(session)
        await self.provoke(session)

    async def provoke(self, session):
        raise NotImplementedError

    async def second(self):
        """Return another session of the database, in a transaction, until `settle`."""
        return await self._outside.enter_async_context(self.db.outside())

    def sqlite(self):
        connection = sqlite3.connect(self.db.url.partition(":///")[2], timeout=0, isolation_level=None)
        self._outside.callback(connection.close)
        return connection


UPDATE = "UPDATE account SET balance = balance + 1 WHERE id = :id"


class ChangedSinceRead(Trouble):
    """PostgreSQL: a row that another transaction changed since this one's snapshot."""

    code = "40001"
    isolation = "REPEATABLE READ"

    async def provoke(self, session):
        await session.execute(text("SELECT balance FROM account"))
        await self.db.run(UPDATE, id=1)
        await session.execute(text(UPDATE), {"id": 1})


class WriteSkewAtCommit(Trouble):
    """PostgreSQL: two transactions that each read what the other writes; this one is told at COMMIT."""

    code = "40001"
    isolation = "SERIALIZABLE"
    at_commit = True

    async def provoke(self, session):
        await session.execute(text("SELECT sum(balance) FROM account"))
        await session.execute(text(UPDATE), {"id": 1})
        other = await self.second()
        await other.execute(text("SET TRANSACTION ISOLATION LEVEL SERIALIZABLE"))
        await other.execute(text("SELECT sum(balance) FROM account"))
        await other.execute(text(UPDATE), {"id": 2})
        await other.commit()


class Deadlock(Trouble):
    """Two transactions that lock two rows crosswise; this one is the victim."""

    async def provoke(self, session):
        other = await self.second()
        await self.prefer_victim(session, other)
        await session.execute(text(UPDATE), {"id": 1})
        await other.execute(text(UPDATE), {"id": 2})
        waiting = asyncio.create_task(other.execute(text(UPDATE), {"id": 1}))
        self._outside.push_async_callback(asyncio.wait, {waiting})
        await self.db.until_waiting()
        await self.hit(session)

    async def hit(self, session):
        await session.execute(text(UPDATE), {"id": 2})

    async def prefer_victim(self, session, other):
        raise NotImplementedError


class PostgreSQLDeadlock(Deadlock):
    code = "40P01"

    async def prefer_victim(self, session, other):
        await session.execute(text("SET LOCAL deadlock_timeout = '1ms'"))
        await other.execute(text("SET LOCAL deadlock_timeout = '1min'"))


class MariaDBDeadlock(Deadlock):
    code = "1213"

    async def prefer_victim(self, session, other):
        # InnoDB rolls back the one that has done less
        await other.execute(text("INSERT INTO note (text) SELECT 'weight' FROM seq_1_to_10"))


class UnseenDeadlock(MariaDBDeadlock):
    """A deadlock met past SQLAlchemy: only the 1305 of the savepoint that is gone tells of it."""

    async def hit(self, session):
        raw = await (await session.connection()).get_raw_connection()
        async with raw.driver_connection.cursor() as cursor:
            await cursor.execute(UPDATE.replace(":id", "2"))


class LockNotAvailable(Trouble):
    """A row that another transaction has locked."""

    reason = LOCK
    code = "55P03"

    async def provoke(self, session):
        other = await self.second()
        await other.execute(text(UPDATE), {"id": 1})
        await session.execute(text("SELECT balance FROM account WHERE id = 1 FOR UPDATE NOWAIT"))


class LockWaitTimeout(LockNotAvailable):
    code = "1205"


class Deferred(Trouble):
    """PostgreSQL: a constraint that is checked at COMMIT, and needs a row that another transaction has locked."""

    at_commit = True

    async def add_child(self, session, parent):
        """Write what COMMIT will look for the parent of."""
        await self.db.run(
            "CREATE TABLE IF NOT EXISTS child "
            "(parent int NOT NULL REFERENCES account (id) DEFERRABLE INITIALLY DEFERRED)"
        )
        await session.execute(text("INSERT INTO child VALUES (:parent)"), {"parent": parent})


class LockTimeoutAtCommit(Deferred):
    """PostgreSQL: another transaction deletes the parent, and does not end."""

    reason = LOCK
    code = "55P03"

    async def provoke(self, session):
        await self.add_child(session, 1)
        other = await self.second()
        await other.execute(text("SELECT id FROM account WHERE id = 1 FOR UPDATE"))
        await session.execute(text("SET LOCAL lock_timeout = '1ms'"))


class DeadlockAtCommit(Deferred):
    """PostgreSQL: the other one waits for a row of ours meanwhile."""

    code = "40P01"

    async def provoke(self, session):
        await self.add_child(session, 1)
        other = await self.second()
        pid = await other.scalar(text("SELECT pg_backend_pid()"))
        await session.execute(text("SET LOCAL deadlock_timeout = '1ms'"))
        await other.execute(text("SET LOCAL deadlock_timeout = '1min'"))
        await session.execute(text(UPDATE), {"id": 2})
        await other.execute(text("SELECT id FROM account WHERE id = 1 FOR UPDATE"))
        waiting = asyncio.create_task(other.execute(text(UPDATE), {"id": 2}))
        self._outside.push_async_callback(asyncio.wait, {waiting})
        # That one: PostgreSQL looks for a deadlock once a wait, so COMMIT must find it waiting.
        await self.db.until_waiting(pid)


class CommitBlocked(Trouble):
    """MariaDB: a backup holds all COMMITs, for longer than this session waits."""

    reason = LOCK
    code = "1205"
    at_commit = True

    async def provoke(self, session):
        await session.execute(text("SET SESSION lock_wait_timeout = 0"))
        other = await self.second()
        await other.execute(text("FLUSH TABLES WITH READ LOCK"))
        # The server gives the locks of a closed session back a little later, and the next attempt waits for none.
        self._outside.push_async_callback(other.execute, text("UNLOCK TABLES"))


class SnapshotChanged(ChangedSinceRead):
    """MariaDB with innodb_snapshot_isolation=ON: 1020, whose SQLSTATE is HY000."""

    code = "1020"
    options: ClassVar[dict[str, Any]] = {"connect_args": {"init_command": "SET innodb_snapshot_isolation = ON"}}


class Busy(Trouble):
    """SQLite: another process writes."""

    code = "SQLITE_BUSY"
    options: ClassVar[dict[str, Any]] = {"connect_args": {"timeout": 0}, "wal": False}  # the PRAGMA would be busy, too
    needs_first = True

    async def provoke(self, session):
        self.sqlite().execute("BEGIN IMMEDIATE")
        await self.write(session)


class BusyAtCommit(Trouble):
    """SQLite with a rollback journal: another process still reads."""

    code = "SQLITE_BUSY"
    options: ClassVar[dict[str, Any]] = {"connect_args": {"timeout": 0}, "wal": False}
    at_commit = True

    def engine(self, **options):
        with contextlib.closing(self.sqlite()) as connection:
            connection.execute("PRAGMA journal_mode = DELETE")
        return super().engine(**options)

    async def provoke(self, session):
        reader = self.sqlite()
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM account").fetchall()


class BusySnapshot(ChangedSinceRead):
    """SQLite with the user's own deferred BEGIN: a reader that wants to write what has changed."""

    code = "SQLITE_BUSY_SNAPSHOT"
    isolation = None
    needs_first = True

    def engine(self, **options):
        engine = self.db.engine(**options)

        @event.listens_for(engine.sync_engine, "connect")
        def connect(dbapi_connection, _record):
            dbapi_connection.isolation_level = None

        @event.listens_for(engine.sync_engine, "begin")
        def begin(connection):
            connection.exec_driver_sql("BEGIN")

        return engine


class ChangedVersion(Trouble):
    """SQLAlchemy's version counter: the row was changed since it was read."""

    reason = STALE

    async def provoke(self, session):
        row = await session.get_one(Versioned, 1)
        await self.change(session)
        row.value += 1
        await session.flush()

    async def change(self, session):
        await self.db.run("UPDATE versioned SET version = version + 1")


class BackendKilled(Trouble):
    """The server ends the session in the middle of its transaction."""

    reason = LOST

    async def provoke(self, session):
        await self.db.kill(session)
        await session.execute(text("SELECT 1"))


POSTGRESQL = (
    ChangedSinceRead, WriteSkewAtCommit, PostgreSQLDeadlock, DeadlockAtCommit, LockNotAvailable, LockTimeoutAtCommit,
    ChangedVersion, BackendKilled,
)  # fmt: skip
MARIADB = (MariaDBDeadlock, SnapshotChanged, LockWaitTimeout, CommitBlocked, ChangedVersion, BackendKilled)
SQLITE = (Busy, BusyAtCommit, BusySnapshot)
TROUBLES: dict[str, tuple[type[Trouble], ...]] = {
    "asyncpg": POSTGRESQL,
    "psycopg": POSTGRESQL,
    "asyncmy": MARIADB,
    "aiomysql": MARIADB,
    "sqlite": SQLITE,
}
# At once, and again and again, whatever time a unit has left to wait for locks.
QUICK: dict[str, type[Trouble]] = {"postgresql": ChangedSinceRead, "mysql": LockWaitTimeout, "sqlite": BusySnapshot}
