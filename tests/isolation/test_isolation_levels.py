"""P4: what each level of each database really prevents, through the public API.

The table in docs/reference/isolation.md is what is expected: it is read here, so that it cannot be wrong.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from itertools import count
from pathlib import Path

import pytest
from sqlalchemy import text

from sqla_uow import UnitOfWorkManager, current_session, errors, transactional
from tests.isolation.anomalies import ANOMALIES, happens
from tests.isolation.appends import Append, History, Read, anomaly
from tests.kit.losses import COMMIT
from tests.kit.waiting import until
from tests.servers import Proxy

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "isolation.md"
NAMES = {"postgresql": "PostgreSQL", "mysql": "MariaDB", "sqlite": "SQLite"}

one_driver_each = pytest.mark.drivers("sqlite", "asyncpg", "asyncmy")  # the level is the server's


def published():
    """Return the table: for each row's name the anomalies that can happen."""
    lines = [line.strip("|").split("|") for line in PAGE.read_text().splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line] for line in lines]
    start = next(number for number, row in enumerate(cells) if "G-single" in row)
    header, table = cells[start], {}
    assert header[1:] == list(ANOMALIES)
    for row in cells[start + 2 :]:
        if len(row) != len(header):
            break
        assert set(row[1:]) <= {"", "possible"}
        table[row[0]] = {name for name, cell in zip(header[1:], row[1:], strict=True) if cell}
    return table


@one_driver_each
@pytest.mark.parametrize("level", ["READ UNCOMMITTED", "READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"])
async def test_the_published_table_is_what_happens(db, level):
    """P4: ten interleavings at each level; what the database lacks is not in the table, and refused."""
    manager, name = UnitOfWorkManager(db.engine()), f"{NAMES[db.family]} {level}"
    if name not in published():
        with pytest.raises(ValueError, match=r"which .* does not have"):
            manager.begin(isolation=level)
        return
    assert {one for one in ANOMALIES if await happens(db, manager, one, level)} == published()[name]


@pytest.mark.drivers("asyncmy")
async def test_the_published_table_with_snapshot_isolation(db):
    """P4: MariaDB's REPEATABLE READ with the setting that makes it refuse what is stale."""
    manager = UnitOfWorkManager(db.engine(connect_args={"init_command": "SET innodb_snapshot_isolation = ON"}))
    found = {one for one in ANOMALIES if await happens(db, manager, one, "REPEATABLE READ")}
    assert found == published()["MariaDB REPEATABLE READ with `innodb_snapshot_isolation=ON`"]


# -- histories


async def history(db, level, transactions, random_, *, port=None, at_end=None):
    """Let eight workers read and append to three lists; return what they did, and how many attempts it took."""
    manager = UnitOfWorkManager(db.engine(pool_size=8, port=port))
    joined = "concat(list, :more)" if db.family == "mysql" else "list || :more"
    append = text(f"UPDATE lists SET list = {joined} WHERE id = :key")
    read = text("SELECT list FROM lists WHERE id = :key")
    await db.run("CREATE TABLE lists (id INTEGER PRIMARY KEY, list VARCHAR(8000) NOT NULL)")
    await db.run("INSERT INTO lists VALUES (0, ''), (1, ''), (2, '')")
    values, numbers, attempts, committed, unknown = count(1), count(), [], {}, {}

    @transactional(using=manager, retries=100, isolation=level)
    async def run(number, plan):
        attempts.append(1)
        done = unknown[number] = []  # until it is known
        for key, writes in plan:
            if writes:
                done.append(Append(key, next(values)))
                await current_session().execute(append, {"key": key, "more": f",{done[-1].value}"})
            else:
                done.append(Read(key, parsed(await current_session().scalar(read, {"key": key}))))
        if at_end is not None:
            at_end(number)

    async def worker():
        for number in numbers:
            if number >= transactions:
                return
            plan = [(random_.randrange(3), random_.random() < 0.5) for _ in range(4)]
            with contextlib.suppress(errors.AmbiguousCommitError):
                await run(number, plan)
                committed[number] = unknown.pop(number)

    await asyncio.gather(*(worker() for _ in range(8)))
    await until(db.is_idle)  # what was cut off may still be on its way
    final = {key: parsed(values) for key, values in await db.rows("SELECT id, list FROM lists")}
    await db.run("DROP TABLE lists")
    return History(committed, unknown, final), len(attempts)


def parsed(values):
    """Return the numbers of a list."""
    return tuple(int(value) for value in values.split(",") if value)


@one_driver_each
async def test_serializable_histories_are(db):
    """P4: 150 transactions of four operations on three lists, in a serial order that all of them agree with."""
    found, attempts = await history(db, "SERIALIZABLE", 150, random.Random(1))
    assert (len(found.committed), found.unknown) == (150, {})
    assert sum(len(values) for values in found.final.values()) > 200
    assert attempts > 150 or db.family == "sqlite"  # there, they wait for each other
    assert anomaly(found) is None


@pytest.mark.drivers("asyncpg", "asyncmy")
@pytest.mark.parametrize("applied", [True, False])
async def test_histories_with_commits_of_unknown_outcome(db, applied):
    """P4, C1: every tenth COMMIT loses its answer, or itself; it counts as it turns out, and all is in a serial order.

    Seldom, the answer that is lost says that the server has refused to commit: PostgreSQL may find out as late as that.
    """
    cuts = []
    with Proxy("127.0.0.1", db.server.port) as proxy:

        def cut_the_next(number):
            if number % 10 == 9:
                cuts.append(proxy.on_client_bytes(COMMIT[db.driver], "cut", after_server=applied))

        found, _ = await history(db, "SERIALIZABLE", 150, random.Random(1), port=proxy.port, at_end=cut_the_next)
    assert len(found.committed) + len(found.unknown) == 150
    assert len(found.unknown) >= 5
    assert anomaly(found) is None
    seen = {value for values in found.final.values() for value in values}
    writers = [[one.value for one in each if isinstance(one, Append)] for each in found.unknown.values()]
    there = [[value in seen for value in values] for values in writers if values]
    assert there
    assert all(len({*each}) == 1 for each in there)
    refused = sum(b"C40001" in cut.answer for cut in cuts)
    if applied:
        assert sum(not each[0] for each in there) <= refused
    else:
        assert not any(each[0] for each in there)
    if applied:  # the control: were they not counted, somebody would have read what nobody wrote
        assert "written by nobody" in anomaly(found._replace(unknown={}))


@pytest.mark.drivers("asyncpg", "asyncmy")
@pytest.mark.parametrize("level", ["READ COMMITTED", "REPEATABLE READ"])
async def test_weaker_histories_are_not(db, level):
    """P4, the control: the same transactions below SERIALIZABLE."""
    for seed in range(5):
        found, _attempts = await history(db, level, 150, random.Random(seed))
        if anomaly(found) is not None:
            return
    pytest.fail("no anomaly in five histories: they do not overlap")


@pytest.mark.parametrize(
    ("committed", "unknown", "final", "expected"),
    [
        ({1: [Append(0, 1)], 2: [Read(0, (1,))]}, {}, {0: (1,)}, None),
        ({1: [Append(0, 1)]}, {}, {0: ()}, "lost: 1 is not in the list of 0"),
        ({1: [Append(0, 1)], 2: [Read(0, (2,))]}, {}, {0: (1,)}, "(2,) of 0 was read, which is no beginning of (1,)"),
        ({2: [Read(0, (1,))]}, {}, {0: (1,)}, "aborted: [1] of 0 were written by nobody who committed"),
        # G0: each wrote over the other
        (
            {1: [Append(0, 1), Append(1, 3)], 2: [Append(0, 2), Append(1, 4)]},
            {},
            {0: (1, 2), 1: (4, 3)},
            "cycle of [1, 2]",
        ),
        # G1c: each has read what the other wrote
        (
            {1: [Append(0, 1), Read(1, (2,))], 2: [Append(1, 2), Read(0, (1,))]},
            {},
            {0: (1,), 1: (2,)},
            "cycle of [1, 2]",
        ),
        # write skew: neither has
        (
            {1: [Append(0, 1), Read(1, ())], 2: [Append(1, 2), Read(0, ())]},
            {},
            {0: (1,), 1: (2,)},
            "cycle of [1, 2]",
        ),
        # an intermediate value
        ({1: [Append(0, 1), Append(0, 2)], 2: [Read(0, (1,))]}, {}, {0: (1, 2)}, "cycle of [1, 2]"),
        # who is not known to have committed may have, or not
        ({2: [Read(0, (1,))]}, {1: [Append(0, 1)]}, {0: (1,)}, None),
        ({2: [Read(0, ())]}, {1: [Append(0, 1)]}, {0: ()}, None),
    ],
)
def test_the_checker_tells(committed, unknown, final, expected):
    """Each kind of anomaly is found in a history made by hand."""
    assert anomaly(History(committed, unknown, final)) == expected
