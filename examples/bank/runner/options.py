"""What can be said on the command line."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, NoReturn

from examples.bank.runner.places import SERVERS

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["USAGE", "parse"]

USAGE = 2
"""The exit status for options that cannot be."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"{self.prog}: {message}\n")


def _whole(least: int, most: int) -> Callable[[str], int]:
    def parse_word(word: str) -> int:
        try:
            number = int(word)
        except ValueError:
            number = least - 1
        if not least <= number <= most:
            raise argparse.ArgumentTypeError(f"{word!r} cannot be; use a whole number from {least} to {most}")
        return number

    return parse_word


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the options, or end with one line about what is wrong with them."""
    parser = _Parser(
        prog="python -m examples.bank", description=sys.modules["examples.bank"].__doc__, allow_abbrev=False
    )
    add = parser.add_argument
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--database", choices=("sqlite", *SERVERS), default="sqlite", help="a temporary one of this kind"
    )
    where.add_argument("--url", help="your own database; tables named sqla_uow_bank_* are made in it, and dropped")
    add("--calls", type=_whole(0, 10_000_000), default=1500, metavar="N", help="0 only serves; default: 1500")
    add("--workers", type=_whole(1, 1000), default=16, metavar="N", help="calls at once; default: 16")
    add("--accounts", type=_whole(2, 10_000), default=20, metavar="N", help="fewer make more conflicts; default: 20")
    add("--seed", type=_whole(0, 2**63), default=1, metavar="N", help="draws the calls; default: 1")
    add("--port", type=_whole(0, 65535), default=0, metavar="N", help="of the page; default: any that is free")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--once", action="store_true", help="end after the load")
    how.add_argument(
        "--without-library",
        action="store_true",
        help="the same load on the same endpoints in a plain 'async with Session.begin()'; no page",
    )
    return parser.parse_args(argv)
