"""The tables, which `migrations` make.  Their names are long so that they meet no table of yours in a database passed with ``--url``."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import BigInteger, DateTime, FetchedValue, ForeignKey, String
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from sqla_uow.idempotency import IdempotencyKeys
from sqla_uow.mixins import Versioned

__all__ = ["KEYS", "LONGEST", "VERSION_TABLE", "Account", "Base", "Clerk", "Entry", "now"]

LONGEST = 80
"""Characters of an owner's name, and of a reference."""
VERSION_TABLE = "sqla_uow_bank_revision"
"""Where Alembic notes which migrations were run; its usual `alembic_version` may be yours."""


def now() -> datetime:
    """Return the time in UTC, without what MariaDB's DATETIME would drop."""
    return datetime.now(UTC).replace(microsecond=0)


class Base(DeclarativeBase):
    """The metadata of the example."""

    # A MariaDB whose default is latin1 or utf8mb3 could not store every name.
    __table_args__: Any = ({"mysql_charset": "utf8mb4", "mariadb_charset": "utf8mb4"},)
    # Nobody reads what the database fills in.
    __mapper_args__: Any = {"eager_defaults": False}  # noqa: RUF012  # SQLAlchemy's name for it


class OfBranch:
    """A row that one branch sees; which, the database notes."""

    branch: Mapped[str] = mapped_column(String(20), server_default=FetchedValue(), deferred=True)


class Account(Versioned, OfBranch, Base):
    """An account; its amounts are in cents.

    Attributes:
        owner: whose it is.
        credit: how far below 0 the balance may go.
        balance: the sum of the account's entries.
        version: counts the changes of the row, from 1; the mixin's.
    """

    __tablename__ = "sqla_uow_bank_account"
    id: Mapped[int] = mapped_column(primary_key=True)
    owner: Mapped[str] = mapped_column(String(LONGEST))
    credit: Mapped[int] = mapped_column(BigInteger, default=0)
    balance: Mapped[int] = mapped_column(BigInteger, default=0)


class Entry(OfBranch, Base):
    """A line of the ledger: money that was moved, or paid in where it has no source.  Never changed."""

    __tablename__ = "sqla_uow_bank_entry"
    id: Mapped[int] = mapped_column(primary_key=True)
    source: Mapped[int | None] = mapped_column(ForeignKey(Account.id), index=True)
    target: Mapped[int] = mapped_column(ForeignKey(Account.id), index=True)
    amount: Mapped[int] = mapped_column(BigInteger)
    reference: Mapped[str] = mapped_column(String(LONGEST), default="")
    at: Mapped[datetime] = mapped_column(DateTime(timezone=True), default=now)


class Clerk(OfBranch, Base):
    """Somebody who serves at the counter, where one of them has to be at any time.

    Attributes:
        number: which clerk.
        on_duty: is at the counter.
        found_nobody: how often this clerk came on duty and nobody was there, which must not be.
    """

    __tablename__ = "sqla_uow_bank_clerk"
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    on_duty: Mapped[bool] = mapped_column(default=True)
    found_nobody: Mapped[int] = mapped_column(default=0)


KEYS = IdempotencyKeys(Base.metadata, name="sqla_uow_bank_key")
"""The keys of the transfers that were made, each with what was answered."""
