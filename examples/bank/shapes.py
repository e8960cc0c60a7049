"""What the rows look like in JSON."""

from __future__ import annotations

from datetime import UTC
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from examples.bank.models import Account, Clerk, Entry

__all__ = ["account_json", "clerk_json", "entry_json", "statement_line"]


def account_json(account: Account) -> dict[str, Any]:
    """Show an account."""
    return {
        "id": account.id,
        "owner": account.owner,
        "credit": account.credit,
        "balance": account.balance,
        "version": account.version,
    }


def clerk_json(clerk: Clerk) -> dict[str, Any]:
    """Show a clerk."""
    return {"number": clerk.number, "on_duty": clerk.on_duty}


def entry_json(entry: Entry) -> dict[str, Any]:
    """Show an entry of the ledger."""
    return {
        "id": entry.id,
        "source": entry.source,
        "target": entry.target,
        "amount": entry.amount,
        "reference": entry.reference,
        "at": _moment(entry),
    }


def statement_line(entry: Entry, account: int) -> dict[str, Any]:
    """Show an entry as its account sees it: what came is positive, what went is negative."""
    came = entry.target == account
    return {
        "entry": entry.id,
        "at": _moment(entry),
        "with": entry.source if came else entry.target,
        "amount": entry.amount if came else -entry.amount,
        "reference": entry.reference,
    }


def _moment(entry: Entry) -> str:
    """Return the time in UTC; SQLite and MariaDB store no time zone, and what was stored is UTC."""
    at = entry.at.astimezone(UTC) if entry.at.tzinfo else entry.at.replace(tzinfo=UTC)
    return at.isoformat()
