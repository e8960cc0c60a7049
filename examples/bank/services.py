"""What the bank does.  No engine, no session handed around, no retry loop, no HTTP in sight.

Each function is a transaction when it is called alone, and a part of one when another transactional function calls it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from sqlalchemy import func, or_, select

from examples.bank.feed import FEED
from examples.bank.models import Account, Clerk, Entry
from sqla_uow import after_commit, current_session, transactional

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

__all__ = [
    "RETRIES",
    "News",
    "NoAccountError",
    "NoClerkError",
    "account",
    "accounts",
    "clerks",
    "deposit",
    "edit",
    "entries",
    "news",
    "open_account",
    "set_duty",
    "transfer",
]

RETRIES = 20  # many calls at once fight for a few accounts here; a service that meets a conflict now and then needs 5


class NoAccountError(Exception):
    """There is no account of that number."""

    def __init__(self, number: int) -> None:
        super().__init__(f"there is no account {number}")


class NoClerkError(Exception):
    """There is no clerk of that number."""

    def __init__(self, number: int) -> None:
        super().__init__(f"there is no clerk {number}")


class News(NamedTuple):
    """What one transaction saw of some accounts and some of the ledger."""

    accounts: Sequence[Account]
    entries: Sequence[Entry]


@transactional(retries=RETRIES)
async def open_account(owner: str, credit: int) -> Account:
    """Open an account with nothing on it."""
    opened = Account(owner=owner, credit=credit)
    current_session().add(opened)
    await current_session().flush()
    after_commit(FEED.publish, accounts=[opened.id])
    return opened


@transactional(retries=RETRIES, isolation="SERIALIZABLE")
async def transfer(source: int, target: int, amount: int, reference: str) -> Entry | None:
    """Move money between two accounts.

    Returns:
        The ledger's entry, or None where the payer has too little.  That is no exception, because it is an answer too:
        at SERIALIZABLE, what was read is true only if the transaction commits.
    """
    payer, payee = await account(source), await account(target)
    if payer.balance + payer.credit < amount:
        return None
    payer.balance -= amount
    payee.balance += amount
    return await _book(Entry(source=source, target=target, amount=amount, reference=reference))


@transactional(retries=RETRIES, isolation="SERIALIZABLE")
async def deposit(target: int, amount: int, reference: str) -> Entry:
    """Put money into an account."""
    payee = await account(target)
    payee.balance += amount
    return await _book(Entry(target=target, amount=amount, reference=reference))


async def _book(entry: Entry) -> Entry:
    current_session().add(entry)
    await current_session().flush()  # from here on it has a number
    touched = [number for number in (entry.source, entry.target) if number is not None]
    after_commit(FEED.publish, accounts=touched, entry=entry.id)  # once, whatever the attempts; never if it fails
    return entry


@transactional(retries=RETRIES, isolation="SERIALIZABLE")
async def edit(number: int, owner: str, credit: int, *, check: Callable[[Account], object]) -> Account | None:
    """Change what a person may change of an account.

    Args:
        number: of the account.
        owner: the new name.
        credit: the new credit.
        check: gets the account before it is changed, and raises if that is not what the caller has seen.

    Returns:
        The account, or None where it is overdrawn by more than the new credit.
    """
    changed = await account(number)
    check(changed)
    if changed.balance + credit < 0:
        return None
    changed.owner, changed.credit = owner, credit
    await current_session().flush()  # from here on it has its new version
    after_commit(FEED.publish, accounts=[number])
    return changed


@transactional(retries=RETRIES, isolation="SERIALIZABLE")
async def set_duty(number: int, *, on_duty: bool) -> Clerk | None:
    """Let a clerk come on duty, or leave while another one stays.

    Two who leave at once write a row each, their own, so no row's version or lock tells them of each other: write skew.
    Only SERIALIZABLE sees that each has counted what the other one changes.

    Returns:
        The clerk, or None where nobody would be left on duty.

    Raises:
        NoClerkError: there is none.
    """
    session = current_session()
    clerk = await session.get(Clerk, number)
    if clerk is None:
        raise NoClerkError(number)
    there = await session.scalar(select(func.count()).where(Clerk.on_duty)) or 0
    if not on_duty and clerk.on_duty and there == 1:
        return None
    if on_duty and not there:
        clerk.found_nobody += 1
    clerk.on_duty = on_duty
    return clerk


@transactional(read_only=True, retries=RETRIES)
async def clerks() -> Sequence[Clerk]:
    """Return the clerks."""
    return (await current_session().scalars(select(Clerk).order_by(Clerk.number))).all()


async def account(number: int) -> Account:
    """Return an account, of whatever unit is open: a transactional function's, or the request's for reading.

    Raises:
        NoAccountError: there is none.
    """
    found = await current_session().get(Account, number)
    if found is None:
        raise NoAccountError(number)
    return found


@transactional(read_only=True, retries=RETRIES)
async def accounts(after: int, most: int) -> Sequence[Account]:
    """Return the accounts that come after a number."""
    found = await current_session().scalars(select(Account).where(Account.id > after).order_by(Account.id).limit(most))
    return found.all()


@transactional(read_only=True, retries=RETRIES)
async def entries(number: int, after: int, most: int) -> Sequence[Entry]:
    """Return the entries of an account that come after one."""
    of_account = or_(Entry.source == number, Entry.target == number)
    found = await current_session().scalars(
        select(Entry).where(of_account, Entry.id > after).order_by(Entry.id).limit(most)
    )
    return found.all()


@transactional(read_only=True, retries=RETRIES)
async def news(of_accounts: Collection[int], of_entries: Collection[int]) -> News:
    """Return these accounts and entries."""
    session = current_session()
    changed = await session.scalars(select(Account).where(Account.id.in_(of_accounts)).order_by(Account.id))
    booked = await session.scalars(select(Entry).where(Entry.id.in_(of_entries)).order_by(Entry.id))
    return News(changed.all(), booked.all())
