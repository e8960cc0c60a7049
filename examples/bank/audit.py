"""What must be true of the bank before, and after, whatever was done at once."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, NamedTuple

from sqlalchemy import func, insert, inspect, select

from examples.bank.load import SHIFTS
from examples.bank.models import Account, Base, Doctor, Gap, Shift

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from sqlalchemy.engine import Connection
    from sqlalchemy.ext.asyncio import AsyncEngine

    from examples.bank.tally import Tally

__all__ = ["Finding", "TablesExistError", "inspect_books", "opened"]

START = 1_000_00
"""Cents on every account at the beginning."""


class TablesExistError(Exception):
    """The database has tables of an earlier run."""


class Finding(NamedTuple):
    """One rule, whether it holds, and by which figures."""

    rule: str
    holds: bool
    figures: str


@contextlib.asynccontextmanager
async def opened(engine: AsyncEngine, accounts: int, *, drop: bool) -> AsyncIterator[None]:
    """Create the tables and fill them.

    Args:
        engine: where.
        accounts: how many.
        drop: drop the tables at the end.

    Raises:
        TablesExistError: they are there already; nothing was touched.
    """
    ours = drop
    try:
        async with engine.begin() as connection:
            await connection.run_sync(_create)
            await connection.execute(insert(Account), [{"id": n, "balance": START} for n in range(accounts)])
            await connection.execute(insert(Shift), [{"id": n} for n in range(SHIFTS)])
            doctors = [{"id": n, "shift_id": n // 2, "on_call": True} for n in range(2 * SHIFTS)]
            await connection.execute(insert(Doctor), doctors)
        yield
    except TablesExistError:
        ours = False
        raise
    finally:
        if ours:
            async with engine.begin() as connection:
                await connection.run_sync(Base.metadata.drop_all)


def _create(connection: Connection) -> None:
    existing = sorted(set(Base.metadata.tables) & set(inspect(connection).get_table_names()))
    if existing:
        raise TablesExistError(", ".join(existing))
    Base.metadata.create_all(connection)


async def inspect_books(engine: AsyncEngine, accounts: int, tally: Tally) -> list[Finding]:
    """Look in the database, now that nobody else works there."""
    async with engine.connect() as connection:
        total = int(await connection.scalar(select(func.sum(Account.balance))) or 0)
        lowest = int(await connection.scalar(select(func.min(Account.balance))) or 0)
        found = int(await connection.scalar(select(func.count()).select_from(Gap)) or 0)
        staffed = select(Doctor.shift_id).where(Doctor.on_call)
        left = int(await connection.scalar(select(func.count()).where(Shift.id.not_in(staffed))) or 0)
    put_in = accounts * START + tally.deposited
    return [
        Finding(
            "no money appears or vanishes",
            put_in <= total <= put_in + tally.unknown,
            f"{accounts} accounts hold {_money(total)}; put in: {_money(accounts * START)} at the start "
            f"and {_money(tally.deposited)} by {tally.deposits:,} acknowledged deposits"
            + (f"; {_money(tally.unknown)} by deposits of unknown outcome" if tally.unknown else "")
            + (f"; off by {_money(total - put_in)}" if total != put_in else ""),
        ),
        Finding("no account is overdrawn", lowest >= 0, f"the lowest balance is {_money(lowest)}"),
        Finding(
            "no shift is without a doctor",
            not found and not left,
            f"{SHIFTS} shifts; {found} times one was found empty by a doctor coming back, {left} are empty now",
        ),
    ]


def _money(cents: int) -> str:
    return f"{cents / 100:,.2f}"
