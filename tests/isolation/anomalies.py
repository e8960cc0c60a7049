"""Interleavings that tell isolation levels apart, in the names of Adya's thesis and of the Hermitage test suite.

Each is a script of steps, one after the other.  A step that has to wait for a lock is left waiting, and the script goes
on with the next step of somebody else.  The answer is whether the anomaly was there afterwards.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy import text

from sqla_uow.errors import ConflictError
from tests.kit.waiting import until

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from sqla_uow import UnitOfWorkManager
    from tests.kit.databases import Database

COMMIT, ROLLBACK = "COMMIT", "ROLLBACK"
FIRST = "SELECT value FROM test WHERE id = 1"
SECOND = "SELECT value FROM test WHERE id = 2"
BOTH = "SELECT id, value FROM test WHERE id IN (1, 2) ORDER BY id"
THIRDS = "SELECT id, value FROM test WHERE value % 3 = 0 ORDER BY id"


def put(key: int, value: int) -> str:
    """Return an UPDATE that does not depend on what was there."""
    return f"UPDATE test SET value = {value} WHERE id = {key}"


def insert(key: int, value: int) -> str:
    """Return an INSERT."""
    return f"INSERT INTO test (id, value) VALUES ({key}, {value})"


class Seen(NamedTuple):
    """What a script left: the answers of each transaction's SELECTs, who committed, and the table."""

    answers: dict[int, list[list[tuple[int, ...]]]]
    committed: set[int]
    rows: dict[int, int]


class Anomaly(NamedTuple):
    """A script of (transaction, statement), and how the anomaly is known."""

    script: list[tuple[int, str]]
    happened: Callable[[Seen], bool]


ANOMALIES = {
    # two writers' rows get mixed
    "G0": Anomaly(
        [(1, put(1, 11)), (2, put(1, 12)), (1, put(2, 21)), (1, COMMIT), (2, put(2, 22)), (2, COMMIT)],
        lambda seen: (seen.rows[1], seen.rows[2]) not in {(11, 21), (12, 22), (10, 20)},
    ),
    # something is read that is rolled back
    "G1a": Anomaly(
        [(1, put(1, 101)), (2, FIRST), (1, ROLLBACK), (2, FIRST), (2, COMMIT)],
        lambda seen: [(101,)] in seen.answers[2],
    ),
    # something is read that its writer then replaces
    "G1b": Anomaly(
        [(1, put(1, 101)), (2, FIRST), (1, put(1, 11)), (1, COMMIT), (2, FIRST), (2, COMMIT)],
        lambda seen: [(101,)] in seen.answers[2],
    ),
    # each reads what the other has written
    "G1c": Anomaly(
        [(1, put(1, 11)), (2, put(2, 22)), (1, SECOND), (2, FIRST), (1, COMMIT), (2, COMMIT)],
        lambda seen: seen.answers[1] == [[(22,)]] and seen.answers[2] == [[(11,)]],
    ),
    # one of two rows that were written together is seen, the other one is gone already
    "OTV": Anomaly(
        [
            (1, put(1, 11)),
            (1, put(2, 19)),
            (2, put(1, 12)),
            (1, COMMIT),
            (3, BOTH),
            (2, put(2, 18)),
            (3, BOTH),
            (2, COMMIT),
            (3, COMMIT),
        ],
        lambda seen: [(1, 12), (2, 19)] in seen.answers[3],
    ),
    # the same condition finds other rows later
    "PMP": Anomaly(
        [(1, THIRDS), (2, insert(3, 30)), (2, COMMIT), (1, THIRDS), (1, COMMIT)],
        lambda seen: seen.answers[1][:1] == [[]] and [(3, 30)] in seen.answers[1],
    ),
    # two have read the same value, and the first one's update is lost
    "P4": Anomaly(
        [(1, FIRST), (2, FIRST), (1, put(1, 11)), (2, put(1, 11)), (1, COMMIT), (2, COMMIT)],
        lambda seen: seen.committed == {1, 2} and seen.answers[1] == seen.answers[2],
    ),
    # rows of before and after another's commit are seen together
    "G-single": Anomaly(
        [(1, FIRST), (2, put(1, 12)), (2, put(2, 18)), (2, COMMIT), (1, SECOND), (1, COMMIT)],
        lambda seen: seen.answers[1] == [[(10,)], [(18,)]],
    ),
    # write skew on rows: each decides by what the other changes
    "G2-item": Anomaly(
        [(1, BOTH), (2, BOTH), (1, put(1, 11)), (2, put(2, 21)), (1, COMMIT), (2, COMMIT)],
        lambda seen: seen.committed == {1, 2} and seen.answers[1] == seen.answers[2],
    ),
    # write skew on a condition: each adds a row that the other would have found
    "G2": Anomaly(
        [(1, THIRDS), (2, THIRDS), (1, insert(3, 30)), (2, insert(4, 42)), (1, COMMIT), (2, COMMIT)],
        lambda seen: seen.committed == {1, 2} and seen.answers[1] == seen.answers[2] == [[]],
    ),
}


class _UndoneError(Exception):
    """Raised to roll back."""


class _Player:
    """One transaction, which does what it is told, in a task of its own."""

    def __init__(self, manager: UnitOfWorkManager, isolation: Any) -> None:
        self.answers: list[list[tuple[int, ...]]] = []
        self.committed = False
        self.last: asyncio.Future[None] | None = None
        self.steps: asyncio.Queue[tuple[str, asyncio.Future[None]]] = asyncio.Queue()
        self.task = asyncio.create_task(self._play(manager, isolation))

    async def _play(self, manager: UnitOfWorkManager, isolation: Any) -> None:
        try:
            async with manager.begin(isolation=isolation) as unit:
                while True:
                    statement, done = await self.steps.get()
                    if statement == COMMIT:
                        break
                    if statement == ROLLBACK:
                        raise _UndoneError  # noqa: TRY301  # it has to pass the unit's end
                    result = await unit.session.execute(text(statement))
                    if result.returns_rows:
                        self.answers.append([tuple(row) for row in result])
                    done.set_result(None)
            self.committed = True
        except (ConflictError, _UndoneError):
            pass

    def tell(self, statement: str) -> None:
        """Hand it a step; one that has ended has nothing more to do."""
        done = self.last = asyncio.get_running_loop().create_future()
        self.steps.put_nowait((statement, done))
        self.task.add_done_callback(lambda _task: done.done() or done.set_result(None))


async def happens(db: Database, manager: UnitOfWorkManager, name: str, isolation: Any) -> bool:
    """Play one script at a level; say whether the anomaly was there."""
    anomaly = ANOMALIES[name]
    await db.run("DROP TABLE IF EXISTS test", "CREATE TABLE test (id INTEGER PRIMARY KEY, value INTEGER NOT NULL)")
    await db.run("INSERT INTO test VALUES (1, 10), (2, 20)")
    players = {number: _Player(manager, isolation) for number in {number for number, _ in anomaly.script}}
    async with asyncio.timeout(30):
        for number, statement in anomaly.script:
            players[number].tell(statement)
            await _done_or_waiting(db, players.values())
        await asyncio.gather(*(player.task for player in players.values()))
    rows = dict(await db.rows("SELECT id, value FROM test"))
    return anomaly.happened(
        Seen(
            {number: player.answers for number, player in players.items()},
            {number for number, player in players.items() if player.committed},
            rows,
        )
    )


async def _done_or_waiting(db: Database, players: Collection[_Player]) -> None:
    """Wait until each has done what it was told, or waits for a lock: so says the server."""

    def busy() -> list[asyncio.Future[None]]:
        return [player.last for player in players if player.last is not None and not player.last.done()]

    async def rest_waits() -> bool:
        return not busy() or await db.waiting() >= len(busy())

    if busy():
        # On SQLite one unit waits for another before it has a connection, however long one looks.
        # InnoDB renews innodb_trx only if nobody has read it for 0.1 s: before, it would tell what was.
        pause = {"sqlite": 0.02, "mysql": 0.11, "postgresql": 0.01}[db.family]
        await asyncio.wait(busy(), timeout=pause)
        if db.family != "sqlite":
            await until(rest_waits, pause=pause)
