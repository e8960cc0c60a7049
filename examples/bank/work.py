"""What the bank does, on any session.

`services` runs these functions with the library, `plain` runs the very same without it.  Each reads, decides and writes,
which is right when it has the database to itself, and only then.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import func, select

from examples.bank.models import Account, Doctor, Gap

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession

__all__ = ["deposit", "swap_on_call", "transfer"]


async def transfer(session: AsyncSession, source: int, target: int, amount: int) -> bool:
    """Move money between two accounts, unless the first has too little.

    Returns:
        Whether it was moved.  A refusal is no exception, because it is an answer too: at SERIALIZABLE what was read is
        true only if the transaction commits.
    """
    payer = await session.get_one(Account, source)
    payee = await session.get_one(Account, target)
    if payer.balance < amount:
        return False
    payer.balance -= amount
    payee.balance += amount
    return True


async def deposit(session: AsyncSession, account: int, amount: int) -> bool:
    """Put money into an account."""
    payee = await session.get_one(Account, account)
    payee.balance += amount
    return True


async def swap_on_call(session: AsyncSession, doctor: int) -> bool:
    """Take a doctor off call, but only if another one of the shift stays; or take one who is off back on call.

    Two who leave at once each see the other one stay: write skew, where nobody overwrites anybody.

    Returns:
        Whether the doctor could leave or came back.
    """
    me = await session.get_one(Doctor, doctor)
    others = await session.scalar(
        select(func.count()).where(Doctor.shift_id == me.shift_id, Doctor.id != me.id, Doctor.on_call)
    )
    if not me.on_call:
        me.on_call = True
        if not others:
            session.add(Gap(shift_id=me.shift_id))
    elif others:
        me.on_call = False
    else:
        return False
    return True
