"""A process that uses the database: its thread, its pool of connections, and the sessions on them."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from benchmarks.simulation.server import DatabaseError, Server, Transaction

if TYPE_CHECKING:
    import random

    from benchmarks.simulation.costs import Costs
    from benchmarks.simulation.machine import Thread

__all__ = ["Pool", "PoolTimeoutError", "Process", "Session"]


class PoolTimeoutError(TimeoutError):
    """No connection of the pool came free in time."""


class Pool:
    """So many connections, made when they are first wanted, and kept; who finds none free waits in a queue.

    Args:
        server: that they lead to.
        size: how many at most.
        timeout: seconds to wait for one.
    """

    def __init__(self, server: Server, size: int, timeout: float) -> None:
        self._server = server
        self._free = 0  # made, and not in use
        self._made = 0
        self._places = asyncio.Semaphore(size)
        self._timeout = timeout

    async def take(self, connect: float) -> None:
        """Take a connection.

        Args:
            connect: seconds that the server computes for a new one.

        Raises:
            PoolTimeoutError: none came free in time.
            DatabaseError: 53300, the server has as many as it may.
        """
        try:
            async with asyncio.timeout(self._timeout):
                await self._places.acquire()
        except TimeoutError:
            raise PoolTimeoutError from None
        if self._free:
            self._free -= 1
            return
        try:
            await self._connect(connect)
        except DatabaseError:
            self._places.release()
            raise

    async def _connect(self, seconds: float) -> None:
        if self._server.connections >= self._server.settings.max_connections:
            await self._server.cores.work(seconds)
            raise DatabaseError("53300")
        self._server.connections += 1
        self._made += 1
        await self._server.cores.work(seconds)

    def give_back(self) -> None:
        """Give a connection back."""
        self._free += 1
        self._places.release()


class Process:
    """What all sessions of a process share."""

    def __init__(self, server: Server, thread: Thread, pool: Pool, chance: random.Random) -> None:
        self.server = server
        self.thread = thread
        self.pool = pool
        self.chance = chance


class Session:
    """One transaction as its client sees it; each method is a message and its answer.

    Args:
        process: in which it runs.
        costs: of its side.
        level: its isolation.
        lock_wait: seconds to wait for a lock, told to the server behind BEGIN; None is for ever.
    """

    def __init__(self, process: Process, costs: Costs, level: str, lock_wait: float | None = None) -> None:
        self._process = process
        self._server = process.server
        self._costs = costs
        self._transaction = Transaction(level)
        self._transaction.lock_wait = lock_wait
        self._owed = costs.client.start  # computed together with what comes next
        self._begun = False

    async def update(self, key: int, amount: int) -> None:
        """Add to a row."""
        await self._begin()
        await self._send(self._costs.client.statement)
        self._server.see(self._transaction)
        await self._serve(self._costs.server.statement)
        await self._server.update(self._transaction, key, amount)
        await self._answer(self._costs.client.statement)

    async def lock(self, key: int) -> None:
        """Lock a row first."""
        await self._begin()
        await self._send(self._costs.client.statement)
        self._server.see(self._transaction)
        await self._serve(self._costs.server.statement)
        await self._server.lock(self._transaction, key)
        await self._answer(self._costs.client.statement)

    async def commit(self) -> None:
        """Commit, and give the connection back.

        Raises:
            DatabaseError: 40001; nothing is left to be rolled back.
        """
        await self._send(self._costs.client.end)
        await self._serve(self._costs.server.commit)
        try:
            self._server.commit(self._transaction)
        except DatabaseError:
            await self._answer(0.0)
            await self._compute(self._owed + self._costs.client.failure - self._costs.client.end / 2)
            self._process.pool.give_back()
            raise
        await self._answer(self._costs.client.end)
        await self._compute(self._owed)
        self._process.pool.give_back()

    async def roll_back(self) -> None:
        """Roll back after a failure, and give the connection back."""
        if not self._begun:
            await self._compute(self._costs.client.failure)
            return
        await asyncio.sleep(self._costs.delay)  # the answer that was an error
        self._owed = self._costs.client.statement / 2
        await self._send(self._costs.client.failure)
        await self._serve(self._costs.server.roll_back)
        self._server.roll_back(self._transaction)
        await self._answer(self._costs.client.failure)
        await self._compute(self._owed)
        self._process.pool.give_back()

    async def _begin(self) -> None:
        if self._begun:
            return
        await self._process.pool.take(self._costs.server.connect)
        self._begun = True
        messages = 1 if self._transaction.lock_wait is None else 2
        for _ in range(messages):
            await self._send(self._costs.client.begin)
            await self._serve(self._costs.server.begin)
            await self._answer(self._costs.client.begin)

    async def _compute(self, seconds: float, delay: float = 0.0) -> None:
        await self._process.thread.work(self._costs.drawn(seconds, self._process.chance), delay)

    async def _serve(self, seconds: float) -> None:
        await self._server.cores.work(self._costs.drawn(seconds, self._process.chance))

    async def _send(self, seconds: float) -> None:
        """Compute what was owed and half of what the message costs, and send it."""
        owed, self._owed = self._owed, 0.0
        await self._compute(owed + seconds / 2, self._costs.delay)

    async def _answer(self, seconds: float) -> None:
        """Get the answer; the other half is computed with what comes next."""
        await asyncio.sleep(self._costs.delay)
        self._owed += seconds / 2
