"""What a URL says, and what of it may be printed: one that is read wrongly has parts of the password everywhere."""

from __future__ import annotations

import inspect
import re
from typing import TYPE_CHECKING, Any

from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

__all__ = ["UnreachableError", "parsed", "place_of", "refused_arguments"]

# As SQLAlchemy reads it: a password ends at the first @.
_AS_READ = re.compile(r"[\w+]+://(?:[^:/]*(?::[^@]*)?@)?(?P<rest>.*)", re.DOTALL)
_ESCAPE = "write %40 for an @ in the user or the password, %2F for a / and %3F for a ?"
_SSL_MODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")
_INSTEAD = {
    # Providers' URLs are often given to asyncpg as they are for libpq.
    "asyncpg": {
        "sslmode": "write ssl={mode}",
        "channel_binding": "leave it out",
        "connect_timeout": "pass connect_args={{'timeout': seconds}}",
        "application_name": "pass connect_args={{'server_settings': {{'application_name': ...}}}}",
        "options": "pass connect_args={{'server_settings': {{...}}}}",
        "sslrootcert": "pass connect_args={{'ssl': an ssl.SSLContext}}",
    },
    "psycopg": {"ssl": "write sslmode={mode}"},
}
"""What to do about an argument that a driver does not know, by driver and argument."""
_ELSE = "leave it out, or pass what it is called there in connect_args"


class UnreachableError(Exception):
    """There is nothing to examine: no connection, or no such URL."""


def parsed(url: str) -> URL:
    """Return what SQLAlchemy reads.

    Raises:
        UnreachableError: it is not a URL, or SQLAlchemy has cut its password off at an @.
    """
    try:
        read = make_url(url)
    except ArgumentError:
        raise UnreachableError("this is not a database URL; use one like postgresql+asyncpg://me@host/bank") from None
    except ValueError:
        raise UnreachableError(
            f"the URL was read with a port that is not a number; use one like postgresql+asyncpg://me@host/bank, "
            f"and {_ESCAPE}"
        ) from None
    if "@" in (read.host or ""):
        raise UnreachableError(f"the URL was read with an @ in its host, which is perhaps the password's; {_ESCAPE}")
    return read


def is_doubtful(url: str, read: URL) -> bool:
    """Say whether what is read as the place, the database or an argument may be of the password."""
    as_read = _AS_READ.match(url)
    return not read.drivername.startswith("sqlite") and as_read is not None and "@" in as_read["rest"]


def place_of(url: str, read: URL) -> str:
    """Return where it is, without user and password."""
    if is_doubtful(url, read):
        return f"{read.drivername} (perhaps not read as it was meant: {_ESCAPE})"
    where = read.host or read.database or "memory"
    return f"{read.drivername} at {where}{f':{read.port}' if read.port else ''}"


def refused_arguments(url: str, engine: AsyncEngine) -> str:
    """Return what to do about arguments in a URL's query that its driver does not know; empty where it knows all."""
    if is_doubtful(url, engine.url):
        return ""
    driver, query = engine.dialect.driver, engine.url.query
    known = _known(engine)
    said = [
        f"{name!r} is not an argument of {driver}; {_instead(driver, query[name], name)}"
        for name in engine.dialect.create_connect_args(engine.url)[1]
        if known and name in query and name not in known
    ]
    return "; ".join(said)


def _instead(driver: str, value: object, name: str) -> str:
    mode = value if value in _SSL_MODES else "require"
    return _INSTEAD.get(driver, {}).get(name, _ELSE).format(mode=mode)


def _known(engine: AsyncEngine) -> set[str]:
    """Return the names that a driver's connect() takes; none where that cannot be told."""
    dbapi: Any = engine.dialect.loaded_dbapi
    module: Any = getattr(dbapi, engine.dialect.driver, dbapi)
    if engine.dialect.driver.startswith("psycopg"):
        connect, extra = module.AsyncConnection.connect, module.pq.Conninfo.get_defaults()
        return {*inspect.signature(connect).parameters, *(option.keyword.decode() for option in extra)}
    parameters = inspect.signature(module.connect).parameters
    open_ended = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values())
    # These are SQLAlchemy's own, taken before the driver is called.
    return set() if open_ended else {*parameters, "async_fallback", "async_creator_fn", "prepared_statement_cache_size"}
