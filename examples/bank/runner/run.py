"""The command: serve the bank, load it, look at the books, leave the page open; Ctrl-C and the exit status."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import sys
import time
from typing import TYPE_CHECKING, Any

from alembic.util import CommandError
from rich.console import Console
from sqlalchemy.exc import SQLAlchemyError

from examples.bank.branches import settings_for
from examples.bank.plain import create_plain_app
from examples.bank.runner import audit, load, report, schema
from examples.bank.runner.options import USAGE, parse
from examples.bank.runner.places import Place, UnavailableError, engine_of, name_of, place
from examples.bank.runner.serving import PortTakenError, served
from examples.bank.runner.tally import Tally
from examples.bank.web import create_app
from sqla_uow import UnitOfWorkManager
from sqla_uow.errors import UnitOfWorkError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

__all__ = ["main"]

HOLDS, BROKEN, INTERRUPTED = 0, 1, 130


def main(argv: list[str] | None = None) -> int:
    """Run the example and return its exit status.

    Returns:
        0: the rules hold, or were broken without the library, as shown.  1: they are broken.  2: it could not run.
        130: interrupted by Ctrl-C in the load, and the rules hold.
    """
    options = parse(argv)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    try:
        with place(options.database, options.url) as where:
            return asyncio.run(_Run(options, where, console).main())
    except UnavailableError as error:
        print(f"python -m examples.bank: {error}", file=sys.stderr)
        return USAGE
    except (KeyboardInterrupt, asyncio.CancelledError):
        console.print("interrupted; nothing is left behind")
        return INTERRUPTED


class _Run:
    """One run on one database."""

    def __init__(self, options: argparse.Namespace, where: Place, console: Console) -> None:
        self.options = options
        self.where = where
        self.console = console
        self.tally = Tally()
        engine = engine_of(where, options.workers)
        self.manager = UnitOfWorkManager(engine, **settings_for(engine))
        self.loading: asyncio.Task[None] | None = None
        self.interrupted = False
        self.stopping = False

    async def main(self) -> int:
        """Open the bank and run it; whatever happens, leave nothing behind."""
        self._listen_to_signals()
        self._listen_to_logs()
        try:
            async with schema.opened(self.manager, self.options.accounts, keep=self.where.ours):
                return await self._serve()
        except schema.TablesExistError as error:
            raise UnavailableError(
                f"{self.where.name} has tables of another run ({error}); drop them, or wait until it is over"
            ) from error
        except CommandError as error:  # Alembic's, whose message says what and how
            raise UnavailableError(f"{self.where.name} cannot be migrated: {error}") from error
        except PortTakenError as error:
            raise UnavailableError(f"{error}; use another --port") from error
        except (SQLAlchemyError, UnitOfWorkError, OSError) as error:
            raise UnavailableError(
                f"{self.where.name} cannot be used ({name_of(error)}); see that it runs and that its URL is right"
            ) from error
        finally:
            await self.manager.engine.dispose()

    def _listen_to_signals(self) -> None:
        # Not asyncio's own way with Ctrl-C, which would cancel this task: it still has to look and to clean up.
        with contextlib.suppress(NotImplementedError):  # Windows
            loop, main = asyncio.get_running_loop(), asyncio.current_task()
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, self._interrupt, main)

    def _interrupt(self, main: asyncio.Task[Any] | None) -> None:
        """Ctrl-C: cut off the calls and go on to the report; outside the load, or the second time, stop at once."""
        if self.loading is not None and not self.loading.done() and not self.interrupted:
            self.loading.cancel()
        elif main is not None and not self.stopping:  # once: what is closing by now takes seconds at most
            self.stopping = True
            main.cancel()
        self.interrupted = True

    def _listen_to_logs(self) -> None:
        logger = logging.getLogger("sqla_uow")
        logger.setLevel(logging.INFO)
        logger.addHandler(self.tally)
        logger.propagate = False
        # psycopg warns about each pipeline that a conflict ends; the conflict itself is counted.
        logging.getLogger("psycopg").addHandler(logging.NullHandler())
        # asyncmy passes on MariaDB's note that it has no name for Alembic's primary key.
        logging.getLogger("asyncmy").addHandler(logging.NullHandler())

    async def _serve(self) -> int:
        options = self.options
        plain = options.without_library
        app = create_plain_app(self.manager.engine) if plain else create_app(self.manager)
        async with served(app, options.port) as address:
            status = await self._load(address) if options.calls else HOLDS
            if status == HOLDS and not plain and not options.once:
                await self._leave_open(address)
            return status

    async def _leave_open(self, address: str) -> None:
        self.console.print(f"the bank is open at {address}/  (Ctrl-C closes it)")
        with contextlib.suppress(asyncio.CancelledError):  # Ctrl-C, which is how this is meant to end
            await asyncio.Event().wait()
        self.console.print("closed")

    async def _load(self, address: str) -> int:
        options, console = self.options, self.console
        how = "without the library" if options.without_library else "through @transactional"
        console.print(
            f"{self.where.name}: {options.calls} calls {how}, {options.workers} at once, on {options.accounts} accounts, "
            f"over HTTP to {address}"
        )
        begun = time.monotonic()
        with report.progress(console, options.calls) as done:
            self.loading = asyncio.create_task(self._call(address, done))
            await asyncio.wait({self.loading})
        seconds = time.monotonic() - begun
        if not self.loading.cancelled():
            self.loading.result()
        if self.interrupted:
            console.print("interrupted; the calls in flight were cut off, and this is what there is:")
        with self.manager.activate():
            found = await audit.inspect_books(self.tally)
        done_in_all = sum(row.done for row in self.tally.rows.values())
        console.print(report.table(self.tally))
        console.print(f"{done_in_all} done in {seconds:.1f} s: {done_in_all / seconds:.0f} a second")
        for line in report.findings(found):
            console.print(line, style="bold red" if line.startswith("BROKEN") else None)
        return self._verdict(holds=all(finding.holds for finding in found))

    async def _call(self, address: str, done: Callable[[], object]) -> None:
        options = self.options
        todo = load.calls(options.calls, accounts=options.accounts, seed=options.seed)
        async with load.client_of(address, options.workers) as client:
            await load.run(client, todo, self.tally, workers=options.workers, done=done)

    def _verdict(self, *, holds: bool) -> int:
        if not self.options.without_library:
            self.console.print("every rule holds" if holds else "a rule is broken: this is a bug, please report it")
            return BROKEN if not holds else INTERRUPTED if self.interrupted else HOLDS
        for line in report.without(self.manager.engine.dialect.name, holds=holds):
            self.console.print(line)
        return INTERRUPTED if self.interrupted else HOLDS
