"""The command: options, the run, Ctrl-C and the exit status."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import signal
import sys
import time
from typing import TYPE_CHECKING, Any, NoReturn

from rich.console import Console
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import async_sessionmaker

from examples.bank import audit, load, report, services
from examples.bank.places import SERVERS, Place, UnavailableError, engine_of, place
from examples.bank.plain import PlainBank
from examples.bank.tally import Tally, name_of
from sqla_uow import UnitOfWorkManager

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy.ext.asyncio import AsyncEngine

__all__ = ["main"]

HOLDS, BROKEN, USAGE, INTERRUPTED = 0, 1, 2, 130


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"{self.prog}: {message}\n")


def _whole(least: int, most: int) -> Callable[[str], int]:
    def parse(word: str) -> int:
        try:
            number = int(word)
        except ValueError:
            number = least - 1
        if not least <= number <= most:
            raise argparse.ArgumentTypeError(f"{word!r} cannot be; use a whole number from {least} to {most}")
        return number

    return parse


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = _Parser(
        prog="python -m examples.bank", description=sys.modules["examples.bank"].__doc__, allow_abbrev=False
    )
    add = parser.add_argument
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--database", choices=("sqlite", *SERVERS), default="sqlite", help="a temporary one of this kind"
    )
    where.add_argument("--url", help="your own database; tables named sqla_uow_bank_* are made in it, and dropped")
    add("--calls", type=_whole(1, 10_000_000), default=3000, metavar="N", help="default: 3000")
    add("--workers", type=_whole(1, 1000), default=16, metavar="N", help="calls at once; default: 16")
    add("--accounts", type=_whole(2, 10_000), default=20, metavar="N", help="fewer make more conflicts; default: 20")
    add("--seed", type=_whole(0, 2**63), default=1, metavar="N", help="draws the calls; default: 1")
    add("--without-library", action="store_true", help="the same calls in a plain 'async with Session.begin()'")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the example and return its exit status.

    Returns:
        0: the rules hold, or were broken without the library, as shown.  1: they are broken.  2: it could not run.
        130: interrupted by Ctrl-C, and the rules hold.
    """
    options = _options(argv)
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
        self.loading: asyncio.Task[None] | None = None
        self.interrupted = False

    async def main(self) -> int:
        """Open the bank, load it, look at the books; whatever happens, leave nothing behind."""
        engine = engine_of(self.where, self.options.workers)
        # Not asyncio's own way with Ctrl-C, which would cancel this task: it still has to look and to clean up.
        with contextlib.suppress(NotImplementedError):  # Windows
            asyncio.get_running_loop().add_signal_handler(signal.SIGINT, self.interrupt, asyncio.current_task())
        try:
            async with audit.opened(engine, self.options.accounts, drop=not self.where.ours):
                return await self._run(engine)
        except audit.TablesExistError as error:
            raise UnavailableError(
                f"{self.where.name} has tables of another run ({error}); drop them, or wait until it is over"
            ) from error
        except (SQLAlchemyError, OSError) as error:
            raise UnavailableError(
                f"{self.where.name} cannot be used ({name_of(error)}); see that it runs and that its URL is right"
            ) from error
        finally:
            await engine.dispose()

    def interrupt(self, main: asyncio.Task[Any] | None) -> None:
        """Ctrl-C: cut off the calls and go on to the report; outside the load, or the second time, stop at once."""
        if self.loading is None or self.loading.done() or self.interrupted:
            if main is not None:
                main.cancel()
        else:
            self.loading.cancel()
        self.interrupted = True

    async def _run(self, engine: AsyncEngine) -> int:
        options, console = self.options, self.console
        how = "without the library" if options.without_library else "through @transactional"
        console.print(
            f"{self.where.name}: {options.calls} calls {how}, {options.workers} at once, on {options.accounts} accounts"
        )
        begun = time.monotonic()
        with report.progress(console, options.calls) as done:
            self.loading = asyncio.create_task(self._load(engine, done))
            await asyncio.wait({self.loading})
        seconds = time.monotonic() - begun
        if not self.loading.cancelled():
            self.loading.result()
        if self.interrupted:
            console.print("interrupted; the calls in flight were cancelled, and this is what there is:")
        found = await audit.inspect_books(engine, options.accounts, self.tally)
        commits = sum(row.commits for row in self.tally.rows.values())
        console.print(report.table(self.tally))
        console.print(f"{commits} commits in {seconds:.1f} s: {commits / seconds:.0f} a second")
        for line in report.findings(found):
            console.print(line, style="bold red" if line.startswith("BROKEN") else None)
        return self._verdict(engine.dialect.name, holds=all(finding.holds for finding in found))

    async def _load(self, engine: AsyncEngine, done: Callable[[], object]) -> None:
        options, tally = self.options, self.tally
        todo = load.calls(options.calls, accounts=options.accounts, seed=options.seed, acknowledge=tally.acknowledge)
        if options.without_library:
            plain = PlainBank(async_sessionmaker(engine, expire_on_commit=False))
            await load.run(plain, todo, tally, workers=options.workers, done=done)
            return
        logger = logging.getLogger("sqla_uow")
        logger.setLevel(logging.INFO)
        logger.addHandler(tally)
        logger.propagate = False
        # psycopg warns about each pipeline that a conflict ends; the conflict itself is counted.
        logging.getLogger("psycopg").addHandler(logging.NullHandler())
        with UnitOfWorkManager(engine).activate():
            await load.run(services, todo, tally, workers=options.workers, done=done)

    def _verdict(self, dialect: str, *, holds: bool) -> int:
        if not self.options.without_library:
            self.console.print("every rule holds" if holds else "a rule is broken: this is a bug, please report it")
            return BROKEN if not holds else INTERRUPTED if self.interrupted else HOLDS
        if holds:
            self.console.print("nothing broke this time; more --calls or --workers, or fewer --accounts, will do it")
        else:
            self.console.print(
                f"it broke, and no call was told so. {report.WHY.get(dialect, '')} Two calls read the same balance, and "
                "the later write undoes the earlier one (lost update); two doctors leave, each because the other stays "
                "(write skew). The same load without --without-library keeps every rule."
            )
        return INTERRUPTED if self.interrupted else HOLDS
