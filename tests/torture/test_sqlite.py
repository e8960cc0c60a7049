"""The bank on SQLite: in several processes, which are killed at random, and on a disk that is full."""

from __future__ import annotations

import asyncio
import random
import signal
import sqlite3
import sys
import time
from contextlib import closing

import pytest
from sqlalchemy.ext.asyncio import create_async_engine

from tests.conftest import ROOT
from tests.kit.waiting import until
from tests.servers import SmallDisk
from tests.servers.keeper import Keeper
from tests.torture.bank import Bank
from tests.torture.harm import LONG, NO_ROOM, SEED, fill, modes

pytestmark = [pytest.mark.drivers("sqlite"), pytest.mark.timeout(LONG * 4 + 120)]
journals = pytest.mark.parametrize("journal", ["wal", "delete"])

BRANCHES = 4


@pytest.fixture
def disk():
    """A small disk."""
    if (reason := SmallDisk.unavailable()) is not None:
        pytest.skip(reason)
    with closing(Keeper("uow-sqlite-")) as keeper:
        disk = SmallDisk(128)
        disk.mount(keeper, keeper.folder / "data", None)
        yield disk


def _found(file, journal):
    """Make the file, in a journal mode."""
    with closing(sqlite3.connect(file)) as connection:
        connection.execute(f"PRAGMA journal_mode = {journal}")
        connection.executescript(";".join(Bank.tables()))


def _check(bank, file):
    """See that what was told is what is in the file."""
    with closing(sqlite3.connect(file)) as connection:
        ledger = [receipt for (receipt,) in connection.execute("SELECT id FROM bank_ledger")]
        bank.check(ledger, *connection.execute("SELECT sum(balance) FROM bank_account").fetchone())
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


class Branches:
    """The processes, and what their callers were told.

    Args:
        folder: of the file and the record.
        journal: SQLite's journal mode.
        mode: what becomes of a COMMIT whose outcome is unknown.
    """

    def __init__(self, folder, journal, mode):
        self._file, self._record, self._mode = folder / "bank.db", folder / "record", mode
        self._record.touch()
        self._chance = random.Random(SEED)
        self._processes = []
        _found(self._file, journal)

    async def open(self):
        """Start another one, and wait until it works."""
        arguments = [self._file, self._record, self._mode, self._chance.randrange(1_000_000)]
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.torture.branch", *map(str, arguments), cwd=ROOT, stdout=asyncio.subprocess.PIPE
        )
        assert await process.stdout.readline() == b"open\n"
        self._processes.append(process)

    async def kill_one(self):
        """Kill one of them, wherever it is, as soon as there are others."""
        await until(lambda: len(self._processes) > 1, seconds=30)
        process = self._processes.pop(self._chance.randrange(len(self._processes)))
        process.kill()
        assert await process.wait() == -signal.SIGKILL, "it had ended by itself"

    async def close(self):
        """Let them come to an end; return what they were told, in a bank of its own, and see that it is there."""
        for process in self._processes:
            process.terminate()
        assert [await process.wait() for process in self._processes] == [0] * len(self._processes)
        bank = self._told()
        _check(bank, self._file)
        return bank

    def _told(self):
        bank = Bank(ambiguous_commit=self._mode)
        calls = {}
        for line in self._record.read_text().splitlines():
            word, receipt, at = line.split()
            calls[receipt] = word
            bank.attempts += word == "begun"
            if word == "acknowledged":
                bank.acknowledged_at.append(float(at))
        for receipt, word in calls.items():
            # killed before its caller was told anything
            getattr(bank, "unknown" if word == "begun" else word).append(receipt)
        return bank


@modes
@journals
async def test_processes_are_killed(driver, tmp_path, journal, mode):
    """One after the other, in a transaction as a rule; the others go on within two seconds."""
    branches, killed = Branches(tmp_path, journal, mode), []
    opening = [asyncio.create_task(branches.open()) for _ in range(BRANCHES)]
    end = time.monotonic() + LONG
    while time.monotonic() < end:
        await asyncio.sleep(0.5)
        await branches.kill_one()
        killed.append(time.monotonic())
        opening.append(asyncio.create_task(branches.open()))
    await asyncio.gather(*opening)
    await asyncio.sleep(2)
    bank = await branches.close()
    longest = bank.longest_wait_after(killed)
    print(f"\nseed {SEED}: {bank}\n{len(killed)} killed; going on after {longest:.2f} s at most")  # noqa: T201
    assert bank.acknowledged
    assert longest < 2


@modes
@journals
async def test_the_disk_is_full(driver, disk, journal, mode):
    """Statements or COMMITs are refused; calls fail with that, and go on as soon as there is room."""
    file, up = disk.folder / "bank.db", []
    _found(file, journal)
    engine = create_async_engine(f"sqlite+aiosqlite:///{file}")
    bank = Bank(engine, ambiguous_commit=mode, seed=SEED, note="x" * 8_000, permanent=NO_ROOM)
    work = asyncio.create_task(bank.work())
    try:
        end = time.monotonic() + LONG / 2
        while time.monotonic() < end:
            await asyncio.sleep(0.5)
            await fill(disk, bank)
            await asyncio.to_thread(disk.free)
            up.append(time.monotonic())
        await asyncio.sleep(2)
    finally:
        bank.stop()
        await work
        await engine.dispose()
    longest = bank.longest_wait_after(up)
    print(f"\nseed {SEED}: {bank}\n{len(up)} times full; going on after {longest:.2f} s at most")  # noqa: T201
    _check(bank, file)
    assert longest < 2
    assert bank.unknown == []
