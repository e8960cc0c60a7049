"""Letters to payees: what is done after the response, and takes its time."""

from __future__ import annotations

from collections import deque
from typing import TypedDict

from examples.bank.branches import branch
from examples.bank.models import Account, Entry
from sqla_uow import current_session, transactional

__all__ = ["SENT", "Letter", "notify"]


class Letter(TypedDict):
    """A letter."""

    entry: int
    to: str
    text: str


SENT: deque[tuple[str, Letter]] = deque(maxlen=50)
"""The latest letters, and the branch that has written each; a real bank would hand them to a mail server."""


async def notify(entry: int) -> None:
    """Write to the payee of a transfer.

    It runs as a background task.  If it fails, the money has been moved all the same.
    """
    SENT.append((branch.get(), await _letter(entry)))


@transactional(read_only=True, retries=5)
async def _letter(number: int) -> Letter:
    """Look up in a unit of its own what to write: the request's are closed by now."""
    session = current_session()
    entry = await session.get_one(Entry, number)
    payer, payee = await session.get_one(Account, entry.source), await session.get_one(Account, entry.target)
    cents = f"{entry.amount / 100:,.2f}"
    text = f"{payer.owner} has sent you {cents}" + (f": {entry.reference}" if entry.reference else "")
    return Letter(entry=entry.id, to=payee.owner, text=text)
