"""Serve throwaway databases and brokers by hand: `python -m tests.servers postgresql nats`.

Prints one URL a line, in the order asked for, and serves until SIGINT or SIGTERM; a database's is SQLAlchemy's.
"""

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from types import FrameType
from typing import NoReturn

from . import NATS, MariaDB, PostgreSQL, RabbitMQ, Redis, Server, ServerError
from .broker import Broker
from .database import DatabaseServer

_SERVERS: dict[str, type[DatabaseServer] | type[Broker]] = {
    "postgresql": PostgreSQL,
    "mariadb": MariaDB,
    "nats": NATS,
    "rabbitmq": RabbitMQ,
    "redis": Redis,
}
_CHOICE = f"{', '.join(list(_SERVERS)[:-1])} or {list(_SERVERS)[-1]}"
_MISUSE = 2  # the exit status of argparse, too


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(_MISUSE, f"{self.prog}: {message}\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Start the servers, print their URLs, wait for a signal, stop them."""
    parser = _Parser(prog="python -m tests.servers", description=__doc__)
    parser.add_argument("servers", metavar="SERVER", nargs="*", help=_CHOICE)
    parser.add_argument("--driver", action="append", default=[], help="of the URLs, one for each kind of database")
    options = parser.parse_args(arguments)
    chosen = _chosen(parser, options.servers, options.driver)
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, _leave)
    try:
        _serve(chosen)
    except ServerError as error:
        parser.error(str(error))


def _chosen(parser: _Parser, names: list[str], drivers: list[str]) -> list[tuple[Server, str]]:
    """Return each server with its URL."""
    if not names:
        parser.error(f"no server named; choose {_CHOICE}")
    for name in names:
        if name not in _SERVERS:
            parser.error(f"no server {name!r}; choose {_CHOICE}")
    kinds = [_SERVERS[name] for name in names]
    speaking = [driver for kind in kinds if issubclass(kind, DatabaseServer) for driver in kind.drivers]
    for driver in drivers:
        if driver not in speaking:
            known = f"choose {' or '.join(speaking)}" if speaking else "brokers have none"
            parser.error(f"driver {driver!r} speaks to none of the servers; {known}")
    for reason in filter(None, (kind.unavailable() for kind in kinds)):
        parser.error(reason)
    return [(server, _url(server, drivers)) for server in (kind() for kind in kinds)]


def _url(server: DatabaseServer | Broker, drivers: list[str]) -> str:
    if isinstance(server, Broker):
        return server.url()
    return server.url(next((driver for driver in drivers if driver in server.drivers), server.drivers[0]))


def _serve(chosen: Sequence[tuple[Server, str]]) -> None:
    with ExitStack() as servers:
        for server, url in chosen:
            servers.enter_context(server)
            print(url, flush=True)  # noqa: T201  -- what it is for
        while True:
            time.sleep(1)  # not signal.pause(): a signal just before it would be slept through


def _leave(_signum: int, _frame: FrameType | None) -> NoReturn:
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)  # once is enough; a second one would interrupt the stopping
    sys.exit()


if __name__ == "__main__":
    main()
