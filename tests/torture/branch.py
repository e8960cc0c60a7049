"""A branch of the bank: a process of its own on an SQLite file, which writes down what its callers are told.

    python -m tests.torture.branch FILE RECORD MODE SEED

It ends at SIGTERM, when each worker has finished its call, or at SIGKILL, wherever it is.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time

from sqlalchemy import event
from sqlalchemy.ext.asyncio import create_async_engine

from tests.torture.bank import Bank

WORKERS = 4
NOTE = "x" * 40_000  # ten pages
OUTCOMES = ("acknowledged", "failed", "unknown", "strange")


class Branch(Bank):
    """A bank that keeps its record in a file, which outlives it.

    Args:
        record: descriptor of the file, to which other processes append as well.
        engine: of the bank's database.
        options: as for every bank.
    """

    def __init__(self, record, engine, **options):
        super().__init__(engine, **options)
        self._record = record

    async def _call(self, receipt):
        self._note("begun", receipt)
        await super()._call(receipt)
        outcome = next(name for name in OUTCOMES if self._is_last(name, receipt))
        self._note(outcome, receipt)

    def _is_last(self, outcome, receipt):
        if outcome == "strange":
            raise ExceptionGroup("callers were told what the contract does not name", self.strange)
        return getattr(self, outcome)[-1:] == [receipt]

    def _note(self, word, receipt):
        os.write(self._record, f"{word} {receipt} {time.monotonic()}\n".encode())


async def main(file, record, mode, seed):
    """Transfer until SIGTERM."""
    engine = create_async_engine(f"sqlite+aiosqlite:///{file}")
    event.listen(engine.sync_engine, "connect", _write_early)
    options = {"ambiguous_commit": mode, "seed": int(seed), "note": NOTE, "workers": WORKERS}
    branch = Branch(os.open(record, os.O_WRONLY | os.O_APPEND), engine, **options)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, branch.stop)
    work = asyncio.create_task(branch.work())
    print("open", flush=True)  # noqa: T201  # what the parent waits for
    await work
    await engine.dispose()


def _write_early(connection, _record):
    """Have no cache to speak of, so that half a transaction is in the files when it is killed."""
    connection.execute("PRAGMA cache_size = 2")


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
