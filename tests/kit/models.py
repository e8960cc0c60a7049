"""The tables the tests work on."""

from __future__ import annotations

from sqlalchemy import ForeignKey, String, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship


class Base(DeclarativeBase):
    pass


class Account(Base):
    """Money; `transfer` between two of them must not lose any."""

    __tablename__ = "account"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    balance: Mapped[int] = mapped_column(default=0)
    notes: Mapped[list[Note]] = relationship(back_populates="account")


class Note(Base):
    """A child of an account."""

    __tablename__ = "note"
    id: Mapped[int] = mapped_column(primary_key=True)
    account_id: Mapped[int | None] = mapped_column(ForeignKey("account.id"))
    text: Mapped[str] = mapped_column(String(100), default="")
    account: Mapped[Account | None] = relationship(back_populates="notes")


class Doctor(Base):
    """On call or not; write skew would leave nobody on call."""

    __tablename__ = "doctor"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    shift: Mapped[int] = mapped_column(default=1)
    on_call: Mapped[bool] = mapped_column(default=True)


class Unique(Base):
    """A key that can be taken."""

    __tablename__ = "uniq"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(50))
    __table_args__ = (UniqueConstraint("name"),)


class Versioned(Base):
    """A row that SQLAlchemy itself checks for changes."""

    __tablename__ = "versioned"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    value: Mapped[int] = mapped_column(default=0)
    version: Mapped[int] = mapped_column(default=1)
    __mapper_args__ = {"version_id_col": version}  # SQLAlchemy's own spelling
