"""The tables and what is in them at the beginning."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from alembic.config import Config
from sqlalchemy import MetaData, Table, inspect
from sqlalchemy.schema import DropTable

from alembic import command
from examples.bank.models import VERSION_TABLE, Account, Base, Clerk, Entry
from examples.bank.runner.waiting import to_the_end

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from sqlalchemy.engine import Connection
    from sqlalchemy.ext.asyncio import AsyncEngine

    from sqla_uow import UnitOfWorkManager

__all__ = ["CLERKS", "START", "TablesExistError", "create", "drop", "fill", "opened"]

START = 200_00
"""Cents on every account at the beginning."""
CLERKS = 2
"""Both are on duty at the beginning."""
_MIGRATIONS = Path(__file__).parents[1] / "migrations"
_OWNERS = ("Ada", "Alan", "Barbara", "Edsger", "Emmy", "Frances", "Grace", "John", "Katherine", "Tony")


class TablesExistError(Exception):
    """The database has tables of an earlier run."""


async def create(engine: AsyncEngine) -> None:
    """Make the tables, by the migrations.

    Raises:
        TablesExistError: they are there already; nothing was touched.
    """
    async with engine.connect() as connection:
        existing = await connection.run_sync(_existing)
    if existing:
        raise TablesExistError(", ".join(existing))
    config = _config(engine)
    try:
        await _run(command.upgrade, config, "head")
    except asyncio.CancelledError:
        if config.attributes["applied"]:
            await drop(engine)
        raise
    if not config.attributes["applied"]:
        raise TablesExistError("made at this moment")


def _existing(connection: Connection) -> list[str]:
    return sorted({*Base.metadata.tables, VERSION_TABLE} & set(inspect(connection).get_table_names()))


async def drop(engine: AsyncEngine) -> None:
    """Drop the tables, and the triggers with them."""
    await _run(command.downgrade, _config(engine), "base")
    async with engine.begin() as connection:
        await connection.execute(DropTable(Table(VERSION_TABLE, MetaData())))


def _config(engine: AsyncEngine) -> Config:
    config = Config(_MIGRATIONS / "alembic.ini")
    config.attributes["url"] = engine.url.render_as_string(hide_password=False)
    config.attributes["applied"] = []
    return config


async def _run(what: Callable[[Config, str], None], config: Config, revision: str) -> None:
    """Run a command of Alembic's in a thread, because ``env.py`` begins an event loop of its own."""
    await to_the_end(asyncio.create_task(asyncio.to_thread(what, config, revision)))


async def fill(manager: UnitOfWorkManager, accounts: int) -> None:
    """Open accounts, with an entry in the ledger for what is on them, and put the clerks on duty."""
    async with manager.begin() as unit:
        opening = [Account(owner=_owner(n), balance=START) for n in range(accounts)]
        unit.session.add_all(opening)
        unit.session.add_all(Clerk(number=number) for number in range(1, CLERKS + 1))
        await unit.session.flush()
        unit.session.add_all(Entry(target=account.id, amount=START, reference="opening") for account in opening)


def _owner(number: int) -> str:
    times, which = divmod(number, len(_OWNERS))
    return f"{_OWNERS[which]} {times + 1}" if times else _OWNERS[which]


@contextlib.asynccontextmanager
async def opened(manager: UnitOfWorkManager, accounts: int, *, keep: bool) -> AsyncIterator[None]:
    """Make the tables and fill them.

    Args:
        manager: of the database.
        accounts: how many.
        keep: leave the tables there at the end, because the database goes anyway.

    Raises:
        TablesExistError: they are there already; nothing was touched.
    """
    await create(manager.engine)
    try:
        await fill(manager, accounts)
        yield
    finally:
        if not keep:
            await drop(manager.engine)
