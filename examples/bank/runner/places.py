"""Where the bank is: a temporary SQLite file, a server of our own, or the user's database."""

from __future__ import annotations

import contextlib
import importlib.util
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy import URL, event, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["SERVERS", "Place", "UnavailableError", "engine_of", "name_of", "place"]

_FOR_PEOPLE = 10
"""Connections beyond those of the load, for the page and its feed."""
_MOST_CONNECTIONS = 40  # MariaDB lets in 151, PostgreSQL 100 by default; calls without one wait for it
SERVERS = {"postgresql": ("PostgreSQL", ("asyncpg", "psycopg")), "mariadb": ("MariaDB", ("asyncmy", "aiomysql"))}
_EXTRAS = {"PostgreSQL": "postgresql", "MariaDB": "mysql"}


_PATIENCE = 30
"""Seconds.  SQLite lets in one writer at a time, and on a busy machine its own 5 s are too few for a queue of 16."""


class UnavailableError(Exception):
    """The database cannot be had; the message is one line: what is missing; how to get it."""


class Place(NamedTuple):
    """A database: its URL, how to call it, and whether it is ours to throw away."""

    url: str
    name: str
    ours: bool


@contextlib.contextmanager
def place(database: str, url: str | None) -> Iterator[Place]:
    """Provide a database, and remove it afterwards if it was made here.

    Raises:
        UnavailableError: there is none.
    """
    if url is not None:
        yield Place(url, "your database", ours=False)
    elif database == "sqlite":
        with tempfile.TemporaryDirectory(prefix="sqla-uow-bank-") as folder:
            yield Place(f"sqlite+aiosqlite:///{Path(folder, 'bank.db')}", "SQLite", ours=True)
    else:
        name, drivers = SERVERS[database]
        with _server(name) as server:
            driver = _installed(name, drivers)
            yield Place(server.url(driver), f"{name} on port {server.port} by {driver}", ours=True)


def _installed(name: str, drivers: tuple[str, ...]) -> str:
    for driver in drivers:
        if importlib.util.find_spec(driver) is not None:
            return driver
    raise UnavailableError(f"no driver for {name} is installed; pip install -e '.[{_EXTRAS[name]}]'")


@contextlib.contextmanager
def _server(name: str) -> Iterator[Any]:
    _installed(name, next(drivers for known, drivers in SERVERS.values() if known == name))
    try:
        from tests import servers  # noqa: PLC0415  # for linux, and for a checkout
    except ImportError as error:
        raise UnavailableError(
            f"{name} cannot be started here ({error}); run from a checkout on linux, or pass --url"
        ) from error
    kind = getattr(servers, name)
    reason = kind.unavailable()
    if reason is not None:
        raise UnavailableError(f"{reason}, or pass --url")
    server = kind()
    try:
        server.start()
    except servers.ServerError as error:
        raise UnavailableError(f"{name} did not start ({error}); pass --url of one that runs") from error
    try:
        yield server
    finally:
        server.stop()


def engine_of(where: Place, workers: int) -> AsyncEngine:
    """Make the engine.

    Raises:
        UnavailableError: the URL cannot be used.
    """
    url = _checked(where.url)
    sqlite = url.get_backend_name() == "sqlite"
    room = {"pool_size": min(workers, _MOST_CONNECTIONS), "max_overflow": _FOR_PEOPLE}
    patience = {"connect_args": {"timeout": _PATIENCE}} if sqlite else {}
    try:
        engine = create_async_engine(url, **room, **patience)
    except ModuleNotFoundError as error:
        raise UnavailableError(f"driver {error.name!r} is not installed; pip install {error.name}") from error
    if sqlite:
        event.listen(engine.sync_engine, "connect", _set_up_ours if where.ours else _set_up)
    return engine


def _checked(text: str) -> URL:
    try:
        url = make_url(text)
    except (ArgumentError, ValueError) as error:
        raise UnavailableError(
            "--url is no SQLAlchemy URL; write it as postgresql+asyncpg://user@host/database"
        ) from error
    try:
        is_async = url.get_dialect().get_async_dialect_cls(url).is_async
    except NoSuchModuleError as error:
        raise UnavailableError(f"SQLAlchemy does not know {url.drivername!r}; use postgresql+asyncpg, say") from error
    if not is_async:
        raise UnavailableError(
            f"driver {url.drivername!r} is not asynchronous; use sqlite+aiosqlite, postgresql+asyncpg or mysql+asyncmy"
        )
    if url.get_backend_name() == "sqlite":
        _check_file(url.database or ":memory:")
    return url


def _check_file(file: str) -> None:
    if not file.startswith("file:") and not Path(file).parent.is_dir():
        raise UnavailableError(f"folder {str(Path(file).parent)!r} of the SQLite file is not there; make it first")
    if file == ":memory:":
        raise UnavailableError(
            "a SQLite database in memory is seen by one connection only, and not by the migrations; name a file"
        )


def _set_up(dbapi_connection: Any, _record: Any) -> None:
    """Have SQLite check foreign keys; it forgets that with each connection."""
    cursor = dbapi_connection.cursor()
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.close()


def _set_up_ours(dbapi_connection: Any, record: Any) -> None:
    """Use write-ahead logging too, so that readers and a writer do not wait for each other; the file remembers it."""
    _set_up(dbapi_connection, record)
    cursor = dbapi_connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=NORMAL")
    cursor.close()


def name_of(error: BaseException) -> str:
    """Return the error's class and the database's own code: neither has a word of the URL."""
    origin = error.orig if isinstance(error, DBAPIError) else None
    first = origin.args[0] if origin is not None and origin.args else None
    code = (
        getattr(origin, "sqlite_errorname", None)
        or (first if isinstance(first, int) else None)
        or getattr(origin, "sqlstate", None)
    )
    return type(error).__name__ if code is None else f"{type(error).__name__} {code}"
