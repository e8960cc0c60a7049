"""PostgreSQL as its clients meet it: snapshots, row locks in order, deadlocks after a second, what it computes."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks.simulation.serializable import RefusedError, Serializable, Snapshot

if TYPE_CHECKING:
    import asyncio
    import random
    from collections.abc import Hashable, Iterator

    from benchmarks.simulation.machine import Cores

__all__ = ["DatabaseError", "Row", "Server", "Settings", "Transaction"]


class DatabaseError(Exception):
    """What a driver raises, with its SQLSTATE."""

    def __init__(self, sqlstate: str) -> None:
        super().__init__(sqlstate)
        self.sqlstate = sqlstate


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a server is set to, and what it does with its table.

    Attributes:
        deadlock_timeout: seconds that a lock is waited for before anybody looks for a deadlock.
        max_connections: of all clients together.
        scans: the table is so small that each statement reads all of it, which SERIALIZABLE takes for a read of each row.
        index_writes: the share of updates that write into the index as well, because there is no room in the row's page.
        leaf: rows whose keys stand in one page of the index.
    """

    deadlock_timeout: float = 1.0
    max_connections: int = 200
    scans: bool = False
    index_writes: float = 0.0
    leaf: int = 367


class _Waiter:
    """A transaction in the queue of a row."""

    __slots__ = ("future", "timers", "transaction")

    def __init__(self, transaction: Transaction, future: asyncio.Future[None]) -> None:
        self.transaction = transaction
        self.future = future
        self.timers: list[asyncio.TimerHandle] = []

    def end(self, error: DatabaseError | None) -> None:
        self.transaction.waits_for = None
        for timer in self.timers:
            timer.cancel()
        if not self.future.done():
            if error is None:
                self.future.set_result(None)
            else:
                self.future.set_exception(error)


class Row:
    """A row: who has it locked, who waits for that, and the commit that it is of."""

    __slots__ = ("holder", "key", "queue", "value", "version")

    def __init__(self, key: int) -> None:
        self.key = key
        self.version = 0
        self.value = 0
        self.holder: Transaction | None = None
        self.queue: deque[_Waiter] = deque()


class _Rows(dict[int, Row]):
    """The table: a row is there once somebody wants it."""

    def __missing__(self, key: int) -> Row:
        row = self[key] = Row(key)
        return row


class Transaction:
    """One transaction on the server."""

    __slots__ = ("held", "level", "lock_wait", "over", "snapshot", "waits_for", "written")

    def __init__(self, level: str) -> None:
        self.level = level
        self.lock_wait: float | None = None
        self.snapshot: Snapshot | None = None  # taken by the first statement
        self.held: list[Row] = []
        self.written: list[tuple[Row, int]] = []
        self.waits_for: Row | None = None
        self.over = False


class Server:
    """The database.

    Args:
        loop: whose time it is.
        cores: where it computes.
        settings: of the server.
        chance: decides which updates write into the index.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, cores: Cores, settings: Settings, chance: random.Random
    ) -> None:
        self._loop = loop
        self.cores = cores
        self.settings = settings
        self.rows = _Rows()
        self.connections = 0
        self.commits = 0
        self.errors: dict[str, int] = {}
        self._chance = chance
        self._serializable = Serializable()

    # -- statements; what they compute is accounted for by whoever sends them

    def see(self, transaction: Transaction) -> Snapshot:
        """Return the snapshot that a statement reads from; the first one takes it."""
        if transaction.snapshot is None:
            transaction.snapshot = Snapshot(self.commits)
            if transaction.level == "SERIALIZABLE":
                self._serializable.begin(transaction.snapshot)
        return transaction.snapshot

    async def update(self, transaction: Transaction, key: int, amount: int) -> None:
        """Add to a row, once nobody else has it locked.

        Raises:
            DatabaseError: 40001, 40P01 or 55P03; all of the transaction is undone, and its locks are free.
        """
        try:
            await self._write(transaction, self.rows[key], amount)
        except RefusedError:
            raise self._failed(transaction, DatabaseError("40001")) from None
        except DatabaseError as error:
            raise self._failed(transaction, error) from None

    async def lock(self, transaction: Transaction, key: int) -> None:
        """Do what ``SELECT ... FOR UPDATE`` does to a row; raises as `update`."""
        try:
            await self._lock(transaction, self.rows[key])
        except DatabaseError as error:
            raise self._failed(transaction, error) from None

    def commit(self, transaction: Transaction) -> None:
        """Make its writes those that others see.

        Raises:
            DatabaseError: 40001.
        """
        if transaction.snapshot is not None and transaction.level == "SERIALIZABLE":
            try:
                self._serializable.commit(transaction.snapshot, self.commits + 1)
            except RefusedError:
                raise self._failed(transaction, DatabaseError("40001")) from None
        self.commits += 1
        for row, amount in transaction.written:
            row.value += amount
            row.version = self.commits
        self._let_go(transaction)

    def roll_back(self, transaction: Transaction) -> None:
        """Undo it; nothing is left to do where it has failed."""
        if not transaction.over:
            if transaction.snapshot is not None and transaction.level == "SERIALIZABLE":
                self._serializable.roll_back(transaction.snapshot)
            transaction.written.clear()
            self._let_go(transaction)

    def _failed(self, transaction: Transaction, error: DatabaseError) -> DatabaseError:
        self.errors[error.sqlstate] = self.errors.get(error.sqlstate, 0) + 1
        self.roll_back(transaction)
        return error

    # -- rows

    async def _write(self, transaction: Transaction, row: Row, amount: int) -> None:
        snapshot, strict = self.see(transaction), transaction.level == "SERIALIZABLE"
        if strict:
            self._serializable.reads(snapshot, self._read_with(row))
        await self._lock(transaction, row)
        if strict:
            self._serializable.writes(snapshot, self._written_with(row), seen_as=[self._seen_as(row)])
        transaction.written.append((row, amount))

    def _seen_as(self, row: Row) -> Hashable:
        return "table" if self.settings.scans else row.key

    def _read_with(self, row: Row) -> list[Hashable]:
        """Return what an UPDATE of the row reads: all of a small table; else the row, and a page of the index."""
        leaf = (
            [("leaf", row.key // self.settings.leaf)] if self.settings.index_writes and not self.settings.scans else []
        )
        return [self._seen_as(row), *leaf]

    def _written_with(self, row: Row) -> list[Hashable]:
        """Return what it writes: the row, in its table; and in the page of the index where the new version has no room."""
        if self.settings.scans:
            return ["table"]
        indexed = self._chance.random() < self.settings.index_writes
        return [row.key, ("leaf", row.key // self.settings.leaf)] if indexed else [row.key]

    async def _lock(self, transaction: Transaction, row: Row) -> None:
        self._check_version(transaction, row)
        if row.holder is transaction:
            return
        if row.holder is None:
            row.holder = transaction
        else:
            await self._wait(transaction, row)
        transaction.held.append(row)

    def _check_version(self, transaction: Transaction, row: Row) -> None:
        """Raise 40001 where somebody has changed it since the snapshot, for a level that has one."""
        snapshot = transaction.snapshot
        if transaction.level != "READ COMMITTED" and snapshot is not None and row.version > snapshot.seen:
            raise DatabaseError("40001")

    async def _wait(self, transaction: Transaction, row: Row) -> None:
        waiter = _Waiter(transaction, self._loop.create_future())
        row.queue.append(waiter)
        transaction.waits_for = row
        self._set_timers(waiter, row)
        await waiter.future

    def _set_timers(self, waiter: _Waiter, row: Row) -> None:
        """Begin to count, as PostgreSQL does anew where the first in the queue waits for the holder."""
        for timer in waiter.timers:
            timer.cancel()
        waiter.timers = [self._loop.call_later(self.settings.deadlock_timeout, self._look, waiter, row)]
        if waiter.transaction.lock_wait is not None:
            waiter.timers.append(
                self._loop.call_later(waiter.transaction.lock_wait, self._leave, waiter, row, DatabaseError("55P03"))
            )

    def _leave(self, waiter: _Waiter, row: Row, error: DatabaseError) -> None:
        if not waiter.future.done():
            first = row.queue[0] is waiter
            row.queue.remove(waiter)
            waiter.end(error)
            if first and row.queue:
                self._set_timers(row.queue[0], row)

    def _look(self, waiter: _Waiter, row: Row) -> None:
        """Look for a deadlock: does who is waited for wait for this one, over however many?"""
        if any(one is waiter.transaction for one in _waited_for(waiter.transaction)):
            self._leave(waiter, row, DatabaseError("40P01"))

    def _let_go(self, transaction: Transaction) -> None:
        transaction.over = True
        for row in transaction.held:
            row.holder = None
            self._pass_on(row)
        transaction.held.clear()

    def _pass_on(self, row: Row) -> None:
        """Give the row to the next in its queue who may still have it."""
        while row.queue:
            waiter = row.queue.popleft()
            try:
                self._check_version(waiter.transaction, row)
            except DatabaseError as error:
                waiter.end(error)
                continue
            row.holder = waiter.transaction
            waiter.end(None)
            if row.queue:
                self._set_timers(row.queue[0], row)
            return


def _waited_for(transaction: Transaction) -> Iterator[Transaction]:
    """Yield whom it waits for, whom that one waits for, and so on; ends after a round."""
    seen: set[Hashable] = set()
    current: Transaction = transaction
    while (row := current.waits_for) is not None:
        head = row.queue[0].transaction
        behind = head if head is not current else row.holder
        if behind is None or id(behind) in seen:
            return
        seen.add(id(behind))
        yield behind
        current = behind
