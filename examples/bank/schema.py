"""The tables and what is in them at the beginning."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from sqlalchemy import inspect

from examples.bank.models import Account, Base, Clerk, Entry

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from sqlalchemy.engine import Connection
    from sqlalchemy.ext.asyncio import AsyncEngine

    from sqla_uow import UnitOfWorkManager

__all__ = ["CLERKS", "START", "TablesExistError", "create", "drop", "fill", "opened"]

START = 200_00
"""Cents on every account at the beginning."""
CLERKS = 2
"""Both are on duty at the beginning."""
_OWNERS = ("Ada", "Alan", "Barbara", "Edsger", "Emmy", "Frances", "Grace", "John", "Katherine", "Tony")


class TablesExistError(Exception):
    """The database has tables of an earlier run."""


async def create(engine: AsyncEngine) -> None:
    """Make the tables.

    Raises:
        TablesExistError: they are there already; nothing was touched.
    """
    async with engine.begin() as connection:
        await connection.run_sync(_create)


def _create(connection: Connection) -> None:
    existing = sorted(set(Base.metadata.tables) & set(inspect(connection).get_table_names()))
    if existing:
        raise TablesExistError(", ".join(existing))
    Base.metadata.create_all(connection)


async def drop(engine: AsyncEngine) -> None:
    """Drop the tables."""
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.drop_all)


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
