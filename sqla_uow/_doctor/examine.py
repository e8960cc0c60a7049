"""The doctor: runs every check that fits the database, each with a time limit, and leaves nothing behind."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy.exc import ArgumentError, InvalidRequestError, NoSuchModuleError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from sqla_uow._api.manager import UnitOfWorkManager, setup_of
from sqla_uow._databases.database import driver_named
from sqla_uow._databases.failures import classify
from sqla_uow._doctor.mariadb import CHECKS as MARIADB
from sqla_uow._doctor.postgresql import CHECKS as POSTGRESQL
from sqla_uow._doctor.postgresql import DISTRIBUTED
from sqla_uow._doctor.report import Finding
from sqla_uow._doctor.sqlite import CHECKS as SQLITE
from sqla_uow._doctor.subject import Subject
from sqla_uow._doctor.trials import try_levels
from sqla_uow._doctor.url import UnreachableError, parsed, place_of, refused_arguments

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sqlalchemy import URL
    from sqlalchemy.engine import Connection

    from sqla_uow._doctor.subject import Check

__all__ = ["Examination", "UnreachableError", "examine"]

_CHECKS: dict[str, Sequence[Check]] = {
    "PostgreSQL": POSTGRESQL,
    "CockroachDB": DISTRIBUTED,
    "YugabyteDB": DISTRIBUTED,
    "MariaDB": MARIADB,
    "MySQL": MARIADB,
    "SQLite": SQLITE,
}
_DRIVERS = {
    "postgresql": "postgresql+asyncpg or postgresql+psycopg",
    "cockroachdb": "cockroachdb+asyncpg or cockroachdb+psycopg, of sqlalchemy-cockroachdb",
    "mysql": "mysql+asyncmy or mysql+aiomysql",
    "mariadb": "mariadb+asyncmy or mariadb+aiomysql",
    "sqlite": "sqlite+aiosqlite",
}


class Examination(NamedTuple):
    """What the doctor is to look at.

    Attributes:
        read_only: make no table.
        pool_size: connections of one process.
        processes: how many there will be.
        replicas: their URLs.
        seconds: for each check.
    """

    read_only: bool = False
    pool_size: int = 15
    processes: int = 1
    replicas: tuple[str, ...] = ()
    seconds: float = 10


async def examine(url: str, wanted: Examination) -> list[Finding]:
    """Connect, and run every check that fits the database.

    Args:
        url: of the database.
        wanted: what to look at.

    Raises:
        UnreachableError: it cannot be connected to; never with the password.
    """
    engine = _engine(url)
    try:
        manager = UnitOfWorkManager(engine, timeout=wanted.seconds)
        subject = Subject(engine, manager, wanted.pool_size * wanted.processes)
        await _connect(engine, url, wanted.seconds, setup_of(manager).database.recognise)
        checks = [*_CHECKS[setup_of(manager).database.system.title], *([] if wanted.read_only else [try_levels])]
        found = [
            Finding("driver", _driver(engine)),
            *[one for check in checks for one in await _run(check, subject, wanted)],
        ]
        if wanted.read_only:
            found.append(Finding("isolation levels", "not tried: --read-only", "note"))
        for number, replica in enumerate(wanted.replicas, 1):
            found.append(await _replica(number, replica, engine, wanted))
        return found
    finally:
        await engine.dispose()


def _engine(url: str) -> AsyncEngine:
    read = parsed(url)
    try:
        options: dict[str, Any] = {"pool_size": 3, "max_overflow": 0} if _has_pool(read) else {}
        # Prepared statements fail behind a pooler; whether there is one is to be found out.
        connect_args = driver_named(read.drivername.partition("+")[2]).unprepared
        return create_async_engine(read, connect_args=connect_args, **options)
    except (NoSuchModuleError, ImportError, InvalidRequestError) as error:
        raise UnreachableError(_unknown_driver(read, error)) from None
    except (ArgumentError, TypeError, ValueError) as error:
        raise UnreachableError(f"{read.drivername} does not take this URL: {type(error).__name__}") from None


def _has_pool(url: URL) -> bool:
    return not (url.drivername.startswith("sqlite") and url.database in (None, "", ":memory:"))


def _unknown_driver(url: URL, error: Exception) -> str:
    name = url.get_backend_name()
    if name not in _DRIVERS:
        return f"sqla_uow does not know the database {name!r}; use {', '.join(_DRIVERS)}"
    if isinstance(error, ImportError):
        return f"the driver of {url.drivername!r} is not installed ({error.name}); pip install it"
    return f"{url.drivername!r} is not an asyncio driver; use {_DRIVERS[name]}"


async def _connect(
    engine: AsyncEngine, url: str, seconds: float, look: Callable[[Connection], None] | None = None
) -> None:
    try:
        async with asyncio.timeout(seconds), engine.connect() as connection:
            if look is not None:
                await connection.run_sync(look)
    except Exception as error:
        wrong = refused_arguments(url, engine) or _what(error)
        raise UnreachableError(f"{place_of(url, engine.url)} does not let us in: {wrong}") from None


def _what(error: BaseException) -> str:
    """Return the class and code of an error: its text may have anything in it."""
    original: BaseException = getattr(error, "orig", None) or error
    failure = classify(error, connecting=True)
    code = "" if failure is None or failure.code is None else f" {failure.code}"
    return f"{type(original).__name__}{code}"


def _driver(engine: AsyncEngine) -> str:
    dbapi = engine.dialect.dbapi
    module = getattr(dbapi, engine.dialect.driver, None) or dbapi
    return f"{engine.dialect.name}+{engine.dialect.driver} {getattr(module, '__version__', '')}".strip()


async def _run(check: Check, subject: Subject, wanted: Examination) -> list[Finding]:
    """Run one check; what it meets is a finding too."""
    try:
        async with asyncio.timeout(wanted.seconds):
            return await check(subject)
    except Exception as error:
        name = check.__name__.strip("_").replace("_", " ")
        return [Finding(name, f"could not be looked at: {_what(error)}", "note")]


async def _replica(number: int, url: str, primary: AsyncEngine, wanted: Examination) -> Finding:
    name = f"replica {number}"
    engine = _engine(url)
    try:
        await _connect(engine, url, wanted.seconds)
        manager = UnitOfWorkManager(primary, replicas=[engine])
        async with manager.scope(position=""), manager.begin(read_only=True) as unit:
            await unit.session.connection()
            served = unit._transaction.replica is not None
    except (UnreachableError, ValueError) as error:
        return Finding(name, str(error), "warning")
    finally:
        await engine.dispose()
    return (
        Finding(name, "in step")
        if served
        else Finding(name, "not usable", "warning", "it takes part in no replication")
    )
