"""The bank in several processes on one SQLite file, which are killed at random: what was acknowledged is there once."""

from __future__ import annotations

import asyncio
import random
import signal
import sqlite3
import sys
import time
from contextlib import closing

import pytest

from tests.conftest import ROOT
from tests.torture.bank import Bank
from tests.torture.harm import LONG, SEED, modes
from tests.waiting import until

pytestmark = [pytest.mark.drivers("sqlite"), pytest.mark.timeout(LONG * 4 + 120)]

BRANCHES = 4


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
        with closing(sqlite3.connect(self._file)) as connection:
            connection.execute(f"PRAGMA journal_mode = {journal}")
            connection.executescript(";".join(Bank.tables()))

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
        with closing(sqlite3.connect(self._file)) as connection:
            ledger = [receipt for (receipt,) in connection.execute("SELECT id FROM bank_ledger")]
            bank.check(ledger, *connection.execute("SELECT sum(balance) FROM bank_account").fetchone())
            assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
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
@pytest.mark.parametrize("journal", ["wal", "delete"])
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
