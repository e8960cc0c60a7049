"""The program ``python -m sqla_uow``.

* ``doctor URL``: what a database really gives.  Exit status: 0 well, 1 something is not, 2 no answer.
* ``purge URL``: remove the idempotency keys that have expired.  Exit status: 0 done, 2 no answer.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import re
import sys
from typing import TYPE_CHECKING, NoReturn

from sqlalchemy.exc import SQLAlchemyError

from sqla_uow._doctor.examine import Examination, UnreachableError, examine
from sqla_uow._doctor.report import as_json, as_table
from sqla_uow._doctor.url import parsed, place_of
from sqla_uow._idempotency.command import purge_at
from sqla_uow.errors import UnitOfWorkError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main"]

_WELL, _NOT_WELL, _NO_ANSWER = 0, 1, 2
_OPTION = re.compile(r"--[a-z-]+")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status.

    Args:
        arguments: those behind the program's name; None is those of this process.
    """
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if rest:  # argparse would print it, and it may be the end of a password with a space in it
        names = [one for one in (argument.partition("=")[0] for argument in rest) if _OPTION.fullmatch(one)]
        parser.error(f"not understood: {', '.join(names) or 'more than one URL'}; put the URL in quotes")
    answer: int = options.answer(options)
    return answer


def _examine(options: argparse.Namespace) -> int:
    logging.getLogger("sqla_uow").addHandler(logging.NullHandler())  # conflicts are made on purpose
    wanted = Examination(
        read_only=options.read_only,
        pool_size=options.pool_size,
        processes=options.processes,
        replicas=tuple(options.replica),
        seconds=options.seconds,
    )
    try:
        findings = asyncio.run(examine(options.url, wanted))
    except UnreachableError as error:
        print(f"sqla_uow doctor: {error}", file=sys.stderr)  # noqa: T201  # a program's answer
        return _NO_ANSWER
    except KeyboardInterrupt:
        print("sqla_uow doctor: interrupted; nothing is left behind", file=sys.stderr)  # noqa: T201  # a program's answer
        return _NO_ANSWER
    print(as_json(findings) if options.json else as_table(findings))  # noqa: T201  # a program's answer
    return _NOT_WELL if any(finding.level == "warning" for finding in findings) else _WELL


def _purge(options: argparse.Namespace) -> int:
    try:
        url = parsed(options.url)
    except UnreachableError as error:
        print(f"sqla_uow purge: {error}", file=sys.stderr)  # noqa: T201  # a program's answer
        return _NO_ANSWER
    try:
        removed = asyncio.run(purge_at(url, options.table, options.limit))
    except (SQLAlchemyError, UnitOfWorkError, ImportError, OSError) as error:  # its text may have the URL in it
        what = f"{place_of(options.url, url)} did not do it ({type(error).__name__})"
        print(f"sqla_uow purge: {what}; ask 'python -m sqla_uow doctor'", file=sys.stderr)  # noqa: T201  # likewise
        return _NO_ANSWER
    print(f"removed {removed} expired keys")  # noqa: T201  # likewise
    return _WELL


class _Parser(argparse.ArgumentParser):
    """Never shows what it was given: a URL may stand anywhere, where the command or a number is to be."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, and end."""
        what, is_shown, _ = message.partition("'")
        super().error(f"{what}what was given, which is not shown" if is_shown else message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(allow_abbrev=False, prog="python -m sqla_uow", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="doctor|purge")
    doctor = commands.add_parser(
        "doctor", allow_abbrev=False, help="connect, try what units depend on, and give advice"
    )
    doctor.add_argument("url", help="as for create_async_engine(), such as postgresql+asyncpg://me@host/bank")
    doctor.add_argument("--replica", action="append", default=[], metavar="URL", help="of a replica; may be repeated")
    doctor.add_argument("--pool-size", type=_positive, default=15, help="connections of one process, with max_overflow")
    doctor.add_argument("--processes", type=_positive, default=1, help="how many processes there will be")
    doctor.add_argument("--read-only", action="store_true", help="make no table, so isolation levels are not tried")
    doctor.add_argument("--seconds", type=_positive, default=10, help="for each check; default: 10")
    doctor.add_argument("--json", action="store_true", help="for programs")
    doctor.set_defaults(answer=_examine)
    purge = commands.add_parser("purge", allow_abbrev=False, help="remove the idempotency keys that have expired")
    purge.add_argument("url", help="as for create_async_engine()")
    purge.add_argument("--table", default="uow_idempotency", help="of the keys; default: uow_idempotency")
    purge.add_argument("--limit", type=_positive, default=1000, help="rows in one transaction; default: 1000")
    purge.set_defaults(answer=_purge)
    return parser


def _positive(text: str) -> int:
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError("use a whole number, 1 or more")
    return number


if __name__ == "__main__":
    sys.exit(main())
