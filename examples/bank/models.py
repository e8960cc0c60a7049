"""The tables.  Their names are long so that they meet no table of yours in a database passed with ``--url``."""

from __future__ import annotations

from sqlalchemy import BigInteger, ForeignKey
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

__all__ = ["Account", "Base", "Doctor", "Gap", "Shift"]


class Base(DeclarativeBase):
    """The metadata of the example."""


class Account(Base):
    """An account; its balance is in cents and must not be below 0."""

    __tablename__ = "sqla_uow_bank_account"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    balance: Mapped[int] = mapped_column(BigInteger)


class Shift(Base):
    """A shift; at least one of its doctors must be on call."""

    __tablename__ = "sqla_uow_bank_shift"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)


class Doctor(Base):
    """A doctor of one shift, on call or not."""

    __tablename__ = "sqla_uow_bank_doctor"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    shift_id: Mapped[int] = mapped_column(ForeignKey(Shift.id))
    on_call: Mapped[bool] = mapped_column(default=True)


class Gap(Base):
    """A shift that a doctor found empty when coming back; there must be none."""

    __tablename__ = "sqla_uow_bank_gap"
    id: Mapped[int] = mapped_column(primary_key=True)
    shift_id: Mapped[int] = mapped_column(ForeignKey(Shift.id))
