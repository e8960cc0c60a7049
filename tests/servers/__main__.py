"""Serve throwaway databases by hand: `python -m tests.servers postgresql mariadb`.

Prints one SQLAlchemy URL a line, in the order asked for, and serves until SIGINT or SIGTERM.
"""

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from types import FrameType
from typing import NoReturn

from . import MariaDB, PostgreSQL, Server, ServerError

_SERVERS: dict[str, type[Server]] = {"postgresql": PostgreSQL, "mariadb": MariaDB}
_MISUSE = 2  # the exit status of argparse, too


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(_MISUSE, f"{self.prog}: {message}\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Start the servers, print their URLs, wait for a signal, stop them."""
    parser = _Parser(prog="python -m tests.servers", description=__doc__)
    parser.add_argument("servers", metavar="SERVER", nargs="*", help=" or ".join(_SERVERS))
    parser.add_argument("--driver", action="append", default=[], help="of the URLs, one for each kind of server")
    options = parser.parse_args(arguments)
    chosen = _chosen(parser, options.servers, options.driver)
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, _leave)
    try:
        _serve(chosen)
    except ServerError as error:
        parser.error(str(error))


def _chosen(parser: _Parser, names: list[str], drivers: list[str]) -> list[tuple[type[Server], str]]:
    if not names:
        parser.error(f"no server named; choose {' or '.join(_SERVERS)}")
    for name in names:
        if name not in _SERVERS:
            parser.error(f"no server {name!r}; choose {' or '.join(_SERVERS)}")
    servers = [_SERVERS[name] for name in names]
    speaking = [driver for server in servers for driver in server.drivers]
    for driver in drivers:
        if driver not in speaking:
            parser.error(f"driver {driver!r} speaks to none of the servers; choose {' or '.join(speaking)}")
    for reason in filter(None, (server.unavailable() for server in servers)):
        parser.error(reason)
    return [
        (server, next((driver for driver in drivers if driver in server.drivers), server.drivers[0]))
        for server in servers
    ]


def _serve(chosen: Sequence[tuple[type[Server], str]]) -> None:
    with ExitStack() as servers:
        for server, driver in chosen:
            print(servers.enter_context(server()).url(driver), flush=True)  # noqa: T201  -- what it is for
        while True:
            time.sleep(1)  # not signal.pause(): a signal just before it would be slept through


def _leave(_signum: int, _frame: FrameType | None) -> NoReturn:
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)  # once is enough; a second one would interrupt the stopping
    sys.exit()


if __name__ == "__main__":
    main()
