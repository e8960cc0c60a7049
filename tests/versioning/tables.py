"""Versioned models in every way that SQLAlchemy has of mapping one."""

from __future__ import annotations

from datetime import datetime  # noqa: TC003  # SQLAlchemy reads the annotations
from typing import Annotated
from uuid import UUID  # noqa: TC003  # likewise

from sqlalchemy import BigInteger, Column, ForeignKey, Integer, String, Table
from sqlalchemy.ext.asyncio import AsyncAttrs
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    MappedAsDataclass,
    mapped_column,
    registry,
    relationship,
)

from sqla_uow.mixins import Versioned, VersionedByTimestamp, VersionedByUUID, VersionedByXmin


class Base(AsyncAttrs, DeclarativeBase):
    pass


class Plain(Versioned, Base):
    __tablename__ = "plain"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    value: Mapped[int] = mapped_column(default=0)
    other: Mapped[int] = mapped_column(default=0)


class ByUUID(VersionedByUUID, Base):
    __tablename__ = "by_uuid"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    value: Mapped[int] = mapped_column(default=0)


class ByTimestamp(VersionedByTimestamp, Base):
    __tablename__ = "by_timestamp"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    value: Mapped[int] = mapped_column(default=0)


class XminBase(DeclarativeBase):
    """Apart: other databases than PostgreSQL cannot create its tables."""


class ByXmin(VersionedByXmin, XminBase):
    __tablename__ = "by_xmin"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    value: Mapped[int] = mapped_column(default=0)


class Abstract(Versioned, Base):
    __abstract__ = True


class OfAbstract(Abstract):
    __tablename__ = "of_abstract"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    value: Mapped[int] = mapped_column(default=0)


class Single(Versioned, Base):
    __tablename__ = "single"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    kind: Mapped[str] = mapped_column(String(10))
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "parent"}


class SingleChild(Single):
    value: Mapped[int | None] = mapped_column(default=0)
    __mapper_args__ = {"polymorphic_identity": "child"}


class Joined(Versioned, Base):
    __tablename__ = "joined"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    kind: Mapped[str] = mapped_column(String(10))
    name: Mapped[str] = mapped_column(String(10), default="")
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "parent"}


class JoinedChild(Joined):
    """Its version stands in the parent's table; an UPDATE of its own table alone must count there."""

    __tablename__ = "joined_child"
    id: Mapped[int] = mapped_column(ForeignKey("joined.id"), primary_key=True, autoincrement=False)
    value: Mapped[int] = mapped_column(default=0)
    __mapper_args__ = {"polymorphic_identity": "child"}


class OwnArguments(Versioned, Base):
    """A naive mixin's check is lost here."""

    __tablename__ = "own_arguments"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    value: Mapped[int] = mapped_column(default=0)
    __mapper_args__ = {"eager_defaults": True}


class DataclassBase(MappedAsDataclass, DeclarativeBase):
    pass


class Dataclass(Versioned, DataclassBase):
    __tablename__ = "dataclass"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    value: Mapped[int] = mapped_column(default=0)


counter = Annotated[int, mapped_column(BigInteger)]


class OfAnnotated(Versioned, Base):
    __tablename__ = "of_annotated"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    value: Mapped[int] = mapped_column(default=0)
    version: Mapped[counter]


class OtherColumn(Versioned, Base):
    __tablename__ = "other_column"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    value: Mapped[int] = mapped_column(default=0)
    version: Mapped[int] = mapped_column("lock_version")


class OtherAttribute(Versioned, Base):
    __tablename__ = "other_attribute"
    __version_attr__ = "rev"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    value: Mapped[int] = mapped_column(default=0)


class OtherAttributeDeclared(VersionedByUUID, Base):
    __tablename__ = "other_attribute_declared"
    __version_attr__ = "rev"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    value: Mapped[int] = mapped_column(default=0)
    rev: Mapped[UUID]


class Composite(Versioned, Base):
    __tablename__ = "composite"
    left: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    right: Mapped[str] = mapped_column(String(10), primary_key=True)
    value: Mapped[int] = mapped_column(default=0)


class PostUpdate(Versioned, Base):
    """Two rows that may point at each other; SQLAlchemy writes the pointer in a second UPDATE."""

    __tablename__ = "post_update"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    value: Mapped[int] = mapped_column(default=0)
    favourite_id: Mapped[int | None] = mapped_column(ForeignKey("post_update.id"))
    favourite: Mapped[PostUpdate | None] = relationship(remote_side="PostUpdate.id", post_update=True)


imperative = Table(
    "imperative",
    Base.metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("value", Integer, nullable=False),
    Column("version", Integer),
)


class Imperative(Versioned):
    def __init__(self, *, id: int, value: int = 0):  # noqa: A002  # the attribute's name
        self.id = id
        self.value = value


registry(metadata=Base.metadata).map_imperatively(Imperative, imperative)


class Stamp(Versioned, Base):
    """A type of the model's own, and one column that it did not think of."""

    __tablename__ = "stamp"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    value: Mapped[int] = mapped_column(default=0)
    at: Mapped[datetime | None]


MATRIX = (
    Plain, ByUUID, ByTimestamp, OfAbstract, SingleChild, JoinedChild, OwnArguments, Dataclass, OfAnnotated, OtherColumn,
    OtherAttribute, OtherAttributeDeclared, PostUpdate, Imperative,
)  # fmt: skip


class Customer(Versioned, Base):
    """The top of a chain: its orders count, and so do their lines."""

    __tablename__ = "customer"
    __version_follows__ = ("orders",)
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    name: Mapped[str] = mapped_column(String(10), default="")
    orders: Mapped[list[Order]] = relationship(back_populates="customer")


class Order(Versioned, Base):
    __tablename__ = "order_"
    __version_follows__ = ("lines", "remarks")
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    customer_id: Mapped[int | None] = mapped_column(ForeignKey("customer.id"))
    name: Mapped[str] = mapped_column(String(10), default="")
    customer: Mapped[Customer | None] = relationship(back_populates="orders")
    lines: Mapped[list[Line]] = relationship(back_populates="order", cascade="all, delete-orphan")
    remarks: Mapped[list[Remark]] = relationship(order_by="Remark.id")


class Line(Base):
    """A part with a way back to its order; it has no version of its own."""

    __tablename__ = "line"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    order_id: Mapped[int] = mapped_column(ForeignKey("order_.id"))
    amount: Mapped[int] = mapped_column(default=0)
    order: Mapped[Order] = relationship(back_populates="lines")


class Remark(Base):
    """A part without a way back."""

    __tablename__ = "remark"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    order_id: Mapped[int | None] = mapped_column(ForeignKey("order_.id"))
    text: Mapped[str] = mapped_column(String(10), default="")
