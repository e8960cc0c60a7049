"""What must be true of the bank, whatever was done at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy import func, select

from examples.bank.models import Account, Clerk, Entry
from sqla_uow import current_session, transactional

if TYPE_CHECKING:
    from sqlalchemy import Select
    from sqlalchemy.ext.asyncio import AsyncSession

    from examples.bank.runner.tally import Tally

__all__ = ["Finding", "inspect_books"]


class Finding(NamedTuple):
    """One rule, whether it holds, and by which figures."""

    rule: str
    holds: bool
    figures: str


@transactional(isolation="SERIALIZABLE", read_only=True, retries=20)
async def inspect_books(tally: Tally) -> list[Finding]:
    """Look at all of the database as it is at one moment, though others may be at work there."""
    session = current_session()
    return [
        await _money(session),
        await _overdrawn(session),
        await _duty(session),
        await _acknowledged(session, tally),
        await _edits(session, tally),
    ]


async def _money(session: AsyncSession) -> Finding:
    put_in = await _whole(session, select(func.sum(Entry.amount)).where(Entry.source.is_(None)))
    there = await _whole(session, select(func.sum(Account.balance)))
    came = select(func.coalesce(func.sum(Entry.amount), 0)).where(Entry.target == Account.id).scalar_subquery()
    went = select(func.coalesce(func.sum(Entry.amount), 0)).where(Entry.source == Account.id).scalar_subquery()
    wrong = await _whole(session, select(func.count()).where(Account.balance != came - went))
    accounts = await _whole(session, select(func.count()).select_from(Account))
    return Finding(
        "no money appears or vanishes",
        put_in == there and wrong == 0,
        f"{accounts} accounts hold {_cents(there)}, and {_cents(put_in)} were put in; "
        f"{wrong} of them hold something else than their entries add up to",
    )


async def _overdrawn(session: AsyncSession) -> Finding:
    lowest = await _whole(session, select(func.min(Account.balance + Account.credit)))
    return Finding(
        "no account is overdrawn", lowest >= 0, f"the least that one has left, credit included, is {_cents(lowest)}"
    )


async def _duty(session: AsyncSession) -> Finding:
    """Look who is there now, and whether anybody who came found nobody."""
    there = await _whole(session, select(func.count()).where(Clerk.on_duty))
    clerks = await _whole(session, select(func.count()).select_from(Clerk))
    nobody = await _whole(session, select(func.sum(Clerk.found_nobody)))
    return Finding(
        "somebody is on duty",
        there > 0 and nobody == 0,
        f"{there} of {clerks} clerks are; {nobody} times one who came found nobody",
    )


async def _acknowledged(session: AsyncSession, tally: Tally) -> Finding:
    booked = {row.id: row.reference for row in await session.execute(select(Entry.id, Entry.reference))}
    lost = len(tally.booked - booked.keys())
    refused = len(tally.refused.intersection(booked.values()))
    return Finding(
        "what was answered is so",
        not lost and not refused,
        f"{len(tally.booked):,} acknowledged entries, {lost} of them not in the ledger; "
        f"{len(tally.refused):,} refused, {refused} of them in it",
    )


async def _edits(session: AsyncSession, tally: Tally) -> Finding:
    """Compare: each edit raised a credit by one cent."""
    there = await _whole(session, select(func.sum(Account.credit)))
    return Finding(
        "no edit undoes another one unseen",
        tally.edits <= there <= tally.edits + tally.unknown_edits,
        f"{tally.edits:,} acknowledged edits"
        + (f" and {tally.unknown_edits} of unknown outcome" if tally.unknown_edits else "")
        + f", {there:,} to be seen in the accounts",
    )


async def _whole(session: AsyncSession, statement: Select[Any]) -> int:
    return int(await session.scalar(statement) or 0)


def _cents(cents: int) -> str:
    return f"{cents / 100:,.2f}"
