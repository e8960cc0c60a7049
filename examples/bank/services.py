"""The bank with the library: no engine, no session, no retry loop in sight."""

from __future__ import annotations

from typing import TYPE_CHECKING

from examples.bank import work
from sqla_uow import after_commit, current_session, transactional

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["deposit", "swap_on_call", "transfer"]

RETRIES = 20  # hundreds of calls fight for a few rows here; a service that meets a conflict now and then needs 5


@transactional(retries=RETRIES, isolation="SERIALIZABLE")
async def transfer(source: int, target: int, amount: int) -> bool:
    """Move money between two accounts, unless the first has too little."""
    return await work.transfer(current_session(), source, target, amount)


@transactional(retries=RETRIES, isolation="SERIALIZABLE")
async def deposit(account: int, amount: int, acknowledge: Callable[[int], object]) -> bool:
    """Put money into an account, and acknowledge it once it is there."""
    after_commit(acknowledge, amount)  # once, however many attempts it takes; never if it is not committed
    return await work.deposit(current_session(), account, amount)


@transactional(retries=RETRIES, isolation="SERIALIZABLE")
async def swap_on_call(doctor: int) -> bool:
    """Take a doctor off call, but only if another one of the shift stays; or take one who is off back on call."""
    return await work.swap_on_call(current_session(), doctor)
