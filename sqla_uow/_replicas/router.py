"""Replicas of a manager's database: which are up, how far they have replayed, and which one a reader gets.

A server is asked for its position over the driver, outside of SQLAlchemy's transactions: one round trip and no BEGIN, on the
very connection that a unit has used or is about to use.
"""

from __future__ import annotations

import asyncio
import logging
import time
from functools import partial
from typing import TYPE_CHECKING, Protocol

from sqlalchemy.util import greenlet_spawn

from sqla_uow._databases.driver import raw_connection
from sqla_uow._databases.failures import Kind, classify
from sqla_uow._log import log
from sqla_uow._replicas.position import NOWHERE, UNKNOWN, Position, has_reached, later

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sqlalchemy.engine import Connection

    from sqla_uow._databases.database import Database
    from sqla_uow._databases.failures import Failure
    from sqla_uow.typing import IsolationLevel

__all__ = ["LastWrite", "Replica", "ReplicaRouter"]


ANSWER_SECONDS = 2.0
"""How long a replica may take to lend a connection, and any server to tell its position."""
DOWN_SECONDS = 1.0, 30.0
"""How long a replica is passed over after its first failure, and at most; it doubles with each."""
LAGGING_SECONDS = 0.5
"""How long no reader waits for a replica that did not catch up in time."""
LOOK_SECONDS = 0.01
"""Pause between two looks at a replica that nobody waits for: it may have caught up."""
POLL_SECONDS = 0.001, 0.016
"""Pause between two looks at how far a replica is: the first, and the longest; it doubles with each."""


# -- asking servers


class NoPositionError(Exception):
    """The server takes part in no replication."""


async def _ask(connection: Connection, database: Database, question: str) -> Position:
    async with asyncio.timeout(ANSWER_SECONDS):
        answer = await database.driver.ask(raw_connection(connection), question)
    if not answer:
        raise NoPositionError("it takes part in no replication")
    return database.system.read_position(answer)


# -- what is known


class Reading(Protocol):
    """What a unit that only reads asks for."""

    isolation: IsolationLevel | None
    last_write: LastWrite | None

    def seconds_left(self) -> float | None: ...


_ASKED = "sqla_uow.asked"


class LastWrite:
    """How far a replica must be to show what one client has written."""

    __slots__ = ("position",)

    def __init__(self, position: Position = NOWHERE) -> None:
        self.position: Position = position

    async def note(self, connection: Connection, database: Database) -> None:
        """Something was committed on a connection, which is in no transaction any more.

        Raises:
            Exception: the server did not tell its position; then no replica is far enough.
        """
        try:
            self.position = later(self.position, await _ask(connection, database, database.system.primary_position))
        except BaseException:
            self.lose()
            raise

    def lose(self) -> None:
        """Something was written, or may have been, at an unknown position."""
        self.position = UNKNOWN


class Replica:
    """One replica, and what is known of it."""

    def __init__(self, number: int, database: Database) -> None:
        self.database: Database = database
        self._missed = NOWHERE
        self._lagging_until = 0.0
        self._look_at = 0.0
        self._number = number
        self._replayed: Position | None = None
        self._down_until = 0.0
        self._failures = 0

    def takes(self, reading: Reading, now: float) -> bool:
        """Say whether it is up, as far as is known, and can serve this reading: no standby can at SERIALIZABLE."""
        level = reading.isolation or self.database.default_isolation()
        return now >= self._down_until and level != "SERIALIZABLE"

    def may_have(self, position: Position, now: float) -> bool:
        """Say whether it is worth a question: one that lags is looked at now and then."""
        return self.has(position) or not self._lags(now) or now >= self._look_at

    def _lags(self, now: float) -> bool:
        return now < self._lagging_until and not self.has(self._missed)

    def is_late(self, position: Position) -> None:
        """Let no reader wait for it, for a while or until it is known to have this position."""
        self._missed = position
        self._lagging_until = time.monotonic() + LAGGING_SECONDS

    def has(self, position: Position) -> bool:
        """Say whether it is known to have replayed so far; of one that was never asked nothing is known."""
        return self._replayed is not None and has_reached(self._replayed, position)

    def is_behind(self, position: Position) -> bool:
        """Say whether it is known not to have replayed so far."""
        return self._replayed is not None and not has_reached(self._replayed, position)

    async def lend(self, connect: Callable[[], Connection]) -> Connection | None:
        """Return a connection, or None and pass the replica over for a while."""
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                return await greenlet_spawn(connect)
        except Exception as error:
            self.failed(error)
            return None

    async def catches_up(self, connection: Connection, position: Position, patience: float) -> bool | None:
        """Wait until it has replayed so far, or until there is no more time.

        Args:
            connection: to it.
            position: that it should have.
            patience: seconds, unless it lags.

        Returns:
            None if it has not, and was not waited for.

        Raises:
            Exception: it did not tell.
        """
        pause, longest = POLL_SECONDS
        now = time.monotonic()
        until = None if self._lags(now) else now + patience
        self._look_at = now + LOOK_SECONDS
        # A server that was restarted may be behind what it was.  Its old connections are dead then; a new one asks.
        known = connection.info.get(_ASKED) is self and self._replayed is not None
        connection.info[_ASKED] = self
        while not (known and self.has(position)):
            self._replayed = await _ask(connection, self.database, self.database.system.replica_position)
            self._failures, known = 0, True
            if not self.has(position):
                if until is None:
                    return None
                if time.monotonic() + pause > until:
                    return False
                await asyncio.sleep(pause)
                pause = min(longest, 2 * pause)
        return True

    def met(self, failure: Failure) -> None:
        """Pass it over after a failure that another server would not have: a lost connection, or a conflict with the replay."""
        if failure.kind in (Kind.CONFLICT, Kind.LOST, Kind.NOT_STARTED):
            self.failed(failure.error)

    def failed(self, error: BaseException) -> None:
        """Pass it over for a while."""
        first, most = DOWN_SECONDS
        seconds = min(most, first * 2**self._failures)
        self._failures += 1
        self._down_until = time.monotonic() + seconds
        self._replayed = None
        failure = classify(error) if isinstance(error, Exception) else None
        code = "" if failure is None or failure.code is None else f" {failure.code}"
        why = str(error) if isinstance(error, NoPositionError) else f"{type(error).__name__}{code}"
        log(
            logging.WARNING, "replica %d is passed over for %g s (%s)", self._number, seconds, why,
            replica=self._number, wait=seconds, error=error, code=None if failure is None else failure.code,
        )  # fmt: skip


class ReplicaRouter:
    """All replicas of one manager.

    Args:
        primary: where everything is written.
        replicas: where that arrives.
        wait: seconds that a read waits for one of them to catch up with its client.
    """

    def __init__(self, primary: Database, replicas: Sequence[Database], wait: float) -> None:
        self.last_write: LastWrite = LastWrite()  # of everybody outside the scopes that are clients of their own
        self.primary: Database = primary
        self._replicas = [Replica(number, database) for number, database in enumerate(replicas, 1)]
        self._wait = wait
        self._turn = 0

    def __len__(self) -> int:
        return len(self._replicas)

    async def lend(
        self, reading: Reading, connect: Callable[[Database], Connection]
    ) -> tuple[Replica, Connection] | None:
        """Connect to a replica that shows what the client has written; None where the primary has to do.

        Args:
            reading: what a unit that only reads asks for.
            connect: to a database; called in SQLAlchemy's greenlet.
        """
        last_write = reading.last_write or self.last_write
        if last_write.position == UNKNOWN:
            await self._see_primary(last_write)
        wanted = last_write.position
        candidates = self._candidates(reading, wanted)
        late: list[Replica] = []
        for replica in candidates:
            connection = await replica.lend(partial(connect, replica.database))
            if connection is None:
                continue
            caught_up: bool | None = None
            try:
                caught_up = await replica.catches_up(connection, wanted, self._patience(reading) / len(candidates))
            except Exception as error:
                replica.failed(error)
                await greenlet_spawn(connection.invalidate)
            except BaseException:
                await greenlet_spawn(connection.invalidate)
                raise
            if caught_up:
                return replica, connection
            if caught_up is False:
                late.append(replica)
            await greenlet_spawn(connection.close)
        if late:
            await self._too_late(late, last_write, wanted)
        return None

    def _candidates(self, reading: Reading, wanted: Position) -> list[Replica]:
        """Return those that are up, beginning with another one at each call; those that lag come last."""
        self._turn = (self._turn + 1) % len(self._replicas)
        now = time.monotonic()
        up = [
            replica
            for replica in self._replicas[self._turn :] + self._replicas[: self._turn]
            if replica.takes(reading, now) and replica.may_have(wanted, now)
        ]
        return sorted(up, key=lambda replica: replica.is_behind(wanted))

    def _patience(self, reading: Reading) -> float:
        left = reading.seconds_left()
        return self._wait if left is None else max(0.0, min(self._wait, left / 2))

    async def _too_late(self, late: list[Replica], last_write: LastWrite, wanted: Position) -> None:
        """Ask the primary: a position that it does not have is dropped; else the replicas lag, and others do not wait for them now."""
        await self._see_primary(last_write)
        if last_write.position is wanted:
            for replica in late:
                replica.is_late(wanted)

    async def _see_primary(self, last_write: LastWrite) -> None:
        """Replace a position beyond the primary's by that: it is not known, forged, or of a server that is gone."""
        wanted = last_write.position
        try:
            async with asyncio.timeout(ANSWER_SECONDS), self.primary.engine.connect() as connection:
                sync_connection = connection.sync_connection
                assert sync_connection is not None
                current = await _ask(sync_connection, self.primary, self.primary.system.primary_position)
        except Exception as error:
            log(logging.DEBUG, "the primary did not tell its position (%s)", type(error).__name__, error=error)
            return
        if not has_reached(current, wanted) and last_write.position is wanted:
            last_write.position = current
