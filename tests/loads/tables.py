"""A blog: a relationship in a relationship, a tree, subclasses, and every way to map what is loaded later."""

from __future__ import annotations

from sqlalchemy import ForeignKey, String, func
from sqlalchemy.ext.asyncio import AsyncAttrs
from sqlalchemy.orm import DeclarativeBase, DynamicMapped, Mapped, WriteOnlyMapped, mapped_column, relationship

from sqla_uow.mixins import Versioned

NAME = String(30)


class Base(AsyncAttrs, DeclarativeBase):
    pass


class User(Base):
    __tablename__ = "blog_user"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    name: Mapped[str] = mapped_column(NAME, default="")
    bio: Mapped[str] = mapped_column(NAME, default="", deferred=True)
    posts: Mapped[list[Post]] = relationship(back_populates="user", cascade="all, delete-orphan")


class Post(Base):
    __tablename__ = "blog_post"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    user_id: Mapped[int] = mapped_column(ForeignKey("blog_user.id"))
    text: Mapped[str] = mapped_column(NAME, default="", deferred=True)
    user: Mapped[User] = relationship(back_populates="posts")
    tags: Mapped[list[Tag]] = relationship(cascade="all")


class Tag(Base):
    __tablename__ = "blog_tag"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    post_id: Mapped[int] = mapped_column(ForeignKey("blog_post.id"))
    post: Mapped[Post] = relationship(viewonly=True)


class Shelf(Base):
    """One relationship in the ways in which a user may have mapped it."""

    __tablename__ = "blog_shelf"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    selected: Mapped[list[Book]] = relationship(viewonly=True, lazy="selectin")
    joined: Mapped[list[Book]] = relationship(viewonly=True, lazy="joined")
    guarded: Mapped[list[Book]] = relationship(viewonly=True, lazy="raise")
    written: WriteOnlyMapped[Book] = relationship()
    followed: DynamicMapped[Book] = relationship(viewonly=True)


class Book(Base):
    __tablename__ = "blog_book"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    shelf_id: Mapped[int] = mapped_column(ForeignKey("blog_shelf.id"))


class Pair(Base):
    """A key of two columns."""

    __tablename__ = "blog_pair"
    one: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    two: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)


class Node(Base):
    """A tree."""

    __tablename__ = "blog_node"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    parent_id: Mapped[int | None] = mapped_column(ForeignKey("blog_node.id"))
    children: Mapped[list[Node]] = relationship()


class Company(Base):
    __tablename__ = "blog_company"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    people: Mapped[list[Person]] = relationship()


class Person(Base):
    __tablename__ = "blog_person"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    kind: Mapped[str] = mapped_column(NAME)
    company_id: Mapped[int | None] = mapped_column(ForeignKey("blog_company.id"))
    __mapper_args__ = {"polymorphic_on": kind, "polymorphic_identity": "person"}


class Manager(Person):
    __tablename__ = "blog_manager"
    id: Mapped[int] = mapped_column(ForeignKey("blog_person.id"), primary_key=True)
    title: Mapped[str] = mapped_column(NAME, default="")
    papers: Mapped[list[Paper]] = relationship()
    __mapper_args__ = {"polymorphic_identity": "manager", "polymorphic_load": "selectin"}


class Staff(Person):
    """Loaded with its own columns only if it is asked for."""

    __tablename__ = "blog_staff"
    id: Mapped[int] = mapped_column(ForeignKey("blog_person.id"), primary_key=True)
    room: Mapped[str] = mapped_column(NAME, default="")
    phone: Mapped[str] = mapped_column(NAME, default="")
    __mapper_args__ = {"polymorphic_identity": "staff"}


class Trainee(Person):
    """Likewise, without a table of its own."""

    mentor: Mapped[str | None] = mapped_column(NAME)
    __mapper_args__ = {"polymorphic_identity": "trainee"}


class Visitor(Person):
    """What it adds is made by the database."""

    __tablename__ = "blog_visitor"
    id: Mapped[int] = mapped_column(ForeignKey("blog_person.id"), primary_key=True)
    badge: Mapped[str] = mapped_column(NAME, server_default="new")
    seen: Mapped[str] = mapped_column(NAME, server_default="0", onupdate=func.lower("X"))
    __mapper_args__ = {"polymorphic_identity": "visitor", "eager_defaults": False}


class Paper(Base):
    __tablename__ = "blog_paper"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    manager_id: Mapped[int] = mapped_column(ForeignKey("blog_manager.id"))


class Order(Versioned, Base):
    """Its version follows its lines."""

    __tablename__ = "blog_order"
    __version_follows__ = ("lines",)
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    lines: Mapped[list[Line]] = relationship(back_populates="order")


class Line(Base):
    __tablename__ = "blog_line"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    order_id: Mapped[int] = mapped_column(ForeignKey("blog_order.id"))
    amount: Mapped[int] = mapped_column(default=0)
    order: Mapped[Order] = relationship(back_populates="lines")
