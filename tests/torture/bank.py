"""Sixteen workers who move money and note each transfer in the same transaction, and who remember what they were told."""

from __future__ import annotations

import asyncio
import collections
import random
import time
import uuid
from itertools import pairwise

from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import AsyncAdaptedQueuePool

from sqla_uow import RetryPolicy, Status, UnitOfWorkManager, current_unit, transactional
from sqla_uow._databases.failures import code_of
from sqla_uow.errors import AmbiguousCommitError, ConflictError, TransactionTimeoutError

WORKERS = 16
ACCOUNTS = 40
SECONDS = 15.0
"""How long one call may take."""


class Bank:
    """The load, and its record.

    Args:
        engines: of the database in trouble; the workers are spread over them.
        ambiguous_commit: what becomes of a COMMIT whose answer was lost.
        seed: of what is transferred.
        accounts: how many of them; few are hot.
        note: written with each receipt, to take up room.
        permanent: the drivers' codes of what cannot be helped by a retry; such an error reaches the caller as it is.
        workers: how many of them.
        timeout: seconds that one call may take.
    """

    def __init__(
        self, *engines, ambiguous_commit, seed=0, accounts=ACCOUNTS, note="", permanent=(),
        workers=WORKERS, timeout=SECONDS, retry=RetryPolicy(base=0.01, cap=0.2),
    ):  # fmt: skip
        self.engines = engines
        self.managers = [
            UnitOfWorkManager(engine, ambiguous_commit=ambiguous_commit, retry=retry) for engine in engines
        ]
        self.accounts = accounts
        self.note = note
        self.calls = {}
        self.lent = 0
        self._workers = workers
        self._transfer = transactional(retries=1000, timeout=timeout)(transfer)
        self._permanent = permanent
        self._random = random.Random(seed)
        self._stopping = False
        self.forget()

    def forget(self):
        """Begin a new record."""
        self.acknowledged = []
        self.failed = []
        self.unknown = []
        self.strange = []
        self.attempts = 0
        self.acknowledged_at = []
        self.longest_call = 0.0
        self.reasons = collections.Counter()

    @staticmethod
    def tables(accounts=ACCOUNTS):
        """Return the statements that make the tables."""
        accounts = ", ".join(f"({number}, 0)" for number in range(accounts))
        return [
            "CREATE TABLE bank_account (id INTEGER PRIMARY KEY, balance INTEGER NOT NULL)",
            "CREATE TABLE bank_ledger (id VARCHAR(36) PRIMARY KEY, note VARCHAR(4000) NOT NULL)",
            f"INSERT INTO bank_account VALUES {accounts}",
        ]

    async def work(self):
        """Transfer until `stop` is called, whatever happens."""
        self._stopping = False
        await asyncio.gather(
            *(self._worker(self.managers[number % len(self.managers)]) for number in range(self._workers))
        )
        pools = [engine.pool for engine in self.engines if isinstance(engine.pool, AsyncAdaptedQueuePool)]
        self.lent = sum(pool.checkedout() for pool in pools)  # now: an engine that is disposed of has a new pool

    def stop(self):
        """Let each worker finish its call."""
        self._stopping = True

    async def _worker(self, manager):
        with manager.activate():
            while not self._stopping:
                receipt = str(uuid.UUID(int=self._random.getrandbits(128)))
                call = asyncio.create_task(self._call(receipt))
                self.calls[call] = receipt
                await asyncio.wait({call})
                del self.calls[call]

    async def _call(self, receipt):
        """Make one transfer, and remember what its caller was told."""
        units, began = [], time.monotonic()
        try:
            await self._transfer(self, receipt, units)
        except AmbiguousCommitError:
            self.unknown.append(receipt)
            self.reasons["unknown"] += 1
        except (ConflictError, TransactionTimeoutError) as error:
            self.failed.append(receipt)
            self.reasons[getattr(error, "reason", "timeout")] += 1
        except asyncio.CancelledError:
            self._cancelled(receipt, units)
        except Exception as error:  # noqa: BLE001  # that is what is looked for
            self._refused(receipt, error)
        else:
            self._acknowledge(receipt)
        self.longest_call = max(self.longest_call, time.monotonic() - began)

    def _refused(self, receipt, error):
        code = code_of(error.orig) if isinstance(error, DBAPIError) else None
        if code in self._permanent:
            self.failed.append(receipt)
            self.reasons[code] += 1
        else:
            self.strange.append(error)

    def _cancelled(self, receipt, units):
        status = units[-1].status if units else Status.ROLLED_BACK
        if status is Status.COMMITTED:
            self._acknowledge(receipt)
        elif status is Status.AMBIGUOUS:
            self.unknown.append(receipt)
        else:
            self.failed.append(receipt)

    def _acknowledge(self, receipt):
        self.acknowledged.append(receipt)
        self.acknowledged_at.append(time.monotonic())

    def longest_wait_after(self, moments):
        """Return for how long nobody was told of a success, at most, behind one of these moments."""
        waits = []
        for moment in moments:
            later = [at for at in self.acknowledged_at if at >= moment]
            waits.append(later[0] - moment if later else float("inf"))
        return max(waits)

    def longest_gap_after(self, moment):
        """Return for how long nobody was told of a success, at most, since then."""
        later = [at for at in self.acknowledged_at if at >= moment]
        return max(after - before for before, after in pairwise([moment, *later]))

    def check(self, ledger, total):
        """See that what was told is what is there.

        Args:
            ledger: the receipts in the database.
            total: of all balances.
        """
        if self.strange:
            raise ExceptionGroup("callers were told what the contract does not name", self.strange)
        assert len(ledger) == len(set(ledger))
        there = set(ledger)
        assert set(self.acknowledged) <= there, "acknowledged and lost"
        assert not set(self.failed) & there, "reported as failed, and there"
        assert there <= {*self.acknowledged, *self.unknown}, "there, and nobody knows of it"
        assert total == 0
        assert self.lent == 0, "connections stay checked out"

    def __str__(self):
        return (
            f"{len(self.acknowledged)} acknowledged, {len(self.failed)} failed {dict(self.reasons)}, "
            f"{len(self.unknown)} unknown, {self.attempts} attempts, the longest call {self.longest_call:.1f} s"
        )


async def transfer(bank, receipt, units):
    """Move money between two accounts."""
    unit = current_unit()
    units.append(unit)
    bank.attempts += 1
    chance = random.Random(receipt)
    source, target = sorted(chance.sample(range(bank.accounts), 2))
    amount = chance.randrange(-100, 100)
    change = text("UPDATE bank_account SET balance = balance + :amount WHERE id = :id")
    await unit.session.execute(change, {"id": source, "amount": -amount})
    entry = text("INSERT INTO bank_ledger (id, note) VALUES (:id, :note)")
    await unit.session.execute(entry, {"id": receipt, "note": bank.note})
    await unit.session.execute(change, {"id": target, "amount": amount})
