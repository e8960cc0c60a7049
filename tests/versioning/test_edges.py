"""Mappings and uses of versioned models that are rare, and must not be wrong."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import Column, ForeignKey, ForeignKeyConstraint, Integer, String, Table, select, text, update
from sqlalchemy.dialects import sqlite
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, registry, relationship

from sqla_uow import Status, errors
from sqla_uow._versions.kinds import UtcTimestamp
from sqla_uow.mixins import Versioned, VersionedByTimestamp, VersionedByUUID, VersionedByXmin, expect_version, touch
from tests.versioning.others import overtake, version_of
from tests.versioning.tables import ByTimestamp, Composite, Customer, Order, Plain


class Base(DeclarativeBase):
    pass


class Animal(Base):
    """A parent without a version, whose children have one each."""

    __tablename__ = "animal"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    kind: Mapped[str] = mapped_column(String(10))
    name: Mapped[str] = mapped_column(String(10), default="")
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "animal"}


class Dog(Versioned, Animal):
    __tablename__ = "dog"
    id: Mapped[int] = mapped_column(ForeignKey("animal.id"), primary_key=True, autoincrement=False)
    value: Mapped[int] = mapped_column(default=0)
    __mapper_args__ = {"polymorphic_identity": "dog"}


class Puppy(Dog):
    """Its key goes by another name, and its version stands in the middle."""

    __tablename__ = "puppy"
    puppy_id: Mapped[int] = mapped_column(ForeignKey("dog.id"), primary_key=True, autoincrement=False)
    age: Mapped[int] = mapped_column(default=0)
    __mapper_args__ = {"polymorphic_identity": "puppy"}


class Root(Versioned, Base):
    """A composite key through joined inheritance, and parts of parts of itself."""

    __tablename__ = "root"
    __version_follows__ = ("parts",)
    left: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    right: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    kind: Mapped[str] = mapped_column(String(10))
    parts: Mapped[list[Part]] = relationship()
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "root"}


class Branch(Root):
    __tablename__ = "branch"
    left: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    right: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    value: Mapped[int] = mapped_column(default=0)
    __table_args__ = (ForeignKeyConstraint(["left", "right"], ["root.left", "root.right"]),)
    __mapper_args__ = {"polymorphic_identity": "branch"}


class Part(Base):
    __tablename__ = "part"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    left: Mapped[int]
    right: Mapped[int]
    value: Mapped[int] = mapped_column(default=0)
    __table_args__ = (ForeignKeyConstraint(["left", "right"], ["root.left", "root.right"]),)


class Node(VersionedByUUID, Base):
    """A tree: each change counts for all above it."""

    __tablename__ = "node"
    __version_follows__ = ("children",)
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    parent_id: Mapped[int | None] = mapped_column(ForeignKey("node.id"))
    value: Mapped[int] = mapped_column(default=0)
    parent: Mapped[Node | None] = relationship(back_populates="children", remote_side="Node.id")
    children: Mapped[list[Node]] = relationship(back_populates="parent")


class Topic(VersionedByTimestamp, Base):
    """Its relationship is made by the other model's backref."""

    __tablename__ = "topic"
    __version_follows__ = ("posts",)
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)


class Post(Base):
    __tablename__ = "post"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    topic_id: Mapped[int] = mapped_column(ForeignKey("topic.id"))
    topic: Mapped[Topic] = relationship(backref="posts")


@pytest.fixture
async def edges(db, versioned):
    """The tables above."""
    async with versioned.engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    return versioned


@pytest.mark.parametrize("form", ["auto", "fetch", False])
async def test_a_version_in_the_middle_of_an_inheritance(db, edges, form):
    """V1, V3: changes of the parent's table, the own one and the child's count, by objects and by statements."""
    async with edges.begin() as unit:
        unit.session.add_all([Dog(id=1), Puppy(id=2), Puppy(id=3)])
    for attribute, value in (("name", "x"), ("value", 1), ("age", 2)):
        async with edges.begin() as unit:
            row = await unit.session.get_one(Puppy, 2)
            before = row.version
            setattr(row, attribute, value)
        assert row.version == before + 1, attribute
        assert await version_of(db, Dog, 2) == row.version
    async with edges.begin() as unit:
        row = await unit.session.get_one(Puppy, 2)
        statement = update(Puppy).where(Puppy.age == 2).values(age=3)
        result = await unit.session.execute(statement, execution_options={"synchronize_session": form})
        assert result.rowcount == 1
        assert row.version == 5
        if form:
            assert row.age == 3
        row.age = 4
    assert await db.rows("SELECT version FROM dog ORDER BY id") == [(1,), (6,), (1,)]
    with pytest.raises(errors.StaleVersionError):
        async with edges.begin() as unit:
            row = await unit.session.get_one(Puppy, 2)
            await unit.session.execute(text("UPDATE dog SET version = 9 WHERE id = 2"))
            row.name = "y"


async def test_a_composite_key_everywhere(db, edges):
    """V2, V3, V4: expectations, statements, lists and parts of a model whose key has two columns."""
    async with edges.begin() as unit:
        unit.session.add_all([Branch(left=1, right=2), Branch(left=2, right=1), Composite(left=1, right="a")])
        await unit.session.flush()
        unit.session.add(Part(id=1, left=1, right=2))
    async with edges.begin() as unit:
        (await unit.session.get_one(Part, 1)).value = 1
    assert await roots(edges) == [3, 1]
    async with edges.begin() as unit:
        row = await unit.session.get_one(Branch, (1, 2))
        expect_version(row, 3)
        await unit.session.execute(update(Branch).where(Branch.value == 0).values(value=7))
        assert (row.version, row.value) == (4, 7)
        await unit.session.execute(update(Branch), [{"left": 1, "right": 2, "value": 8, "version": 4}])
        assert (row.version, row.value) == (5, 8)
    assert await roots(edges) == [5, 2]
    async with edges.begin() as unit:
        expect_version(await unit.session.get_one(Composite, (1, "a")), 1)
    with pytest.raises(errors.StaleVersionError) as caught:
        async with edges.begin() as unit:
            expect_version(await unit.session.get_one(Composite, (1, "a")), 1)
            await overtake(db, unit.session, Composite)
    assert caught.value.key == (1, "a")


async def roots(manager):
    """Return the versions of the roots."""
    async with manager.begin(read_only=True) as unit:
        return (await unit.session.scalars(select(Root.version).order_by(Root.left))).all()


async def test_a_tree_counts_up_to_its_root(edges):
    """V4: chains of one model, in memory or not."""
    async with edges.begin() as unit:
        unit.session.add_all([Node(id=1), Node(id=2, parent_id=1), Node(id=3, parent_id=2), Node(id=4, parent_id=1)])
    before = await uuids(edges)
    async with edges.begin() as unit:
        (await unit.session.get_one(Node, 3)).value = 1
    after = await uuids(edges)
    assert [old != new for old, new in zip(before, after, strict=True)] == [True, True, True, False]


async def uuids(manager):
    """Return the versions of the nodes."""
    async with manager.begin(read_only=True) as unit:
        return (await unit.session.scalars(select(Node.version).order_by(Node.id))).all()


async def test_a_backref_can_be_followed(edges):
    """V4: it is made when the other model is configured."""
    async with edges.begin() as unit:
        topic = Topic(id=1)
        unit.session.add(topic)
        await unit.session.flush()
        before = topic.version
        unit.session.add(Post(id=1, topic_id=1))
        await unit.session.flush()
        assert topic.version > before


async def test_statements_of_rows_that_are_gone(db, edges):
    """V3: an object whose row somebody has deleted keeps its version, and is told when it is written."""
    async with edges.begin() as unit:
        unit.session.add_all([Plain(id=1), Plain(id=2)])
    with pytest.raises(errors.StaleVersionError):
        async with edges.begin() as unit:
            row = await unit.session.get_one(Plain, 1)
            await (await unit.session.connection()).execute(text("DELETE FROM plain WHERE id = 1"))
            options = {"synchronize_session": False}
            await unit.session.execute(update(Plain).values(value=1), execution_options=options)
            assert row.version == 1
            row.value = 2


async def test_what_is_no_orm_statement_is_left_alone(db, edges):
    """V3: a table, and a statement that asks for it; they count only by a trigger."""
    async with edges.begin() as unit:
        unit.session.add(Plain(id=1))
    async with edges.begin() as unit:
        await unit.session.execute(update(Plain.__table__).values(value=1))
        await unit.session.execute(update(Plain).values(value=2), execution_options={"dml_strategy": "core_only"})
        await unit.session.execute(update(Plain.__table__).values(version=5))
    assert await db.rows("SELECT value, version FROM plain") == [(2, 5)]


async def test_a_statement_without_autoflush(db, edges):
    """V3: what is pending is not flushed by it; its version is the row's afterwards all the same."""
    async with edges.begin() as unit:
        unit.session.add(Plain(id=1))
    async with edges.begin() as unit:
        row = await unit.session.get_one(Plain, 1)
        row.other = 3
        with unit.session.no_autoflush:
            await unit.session.execute(update(Plain).values(value=1))
        assert row.version == 2
    assert await db.rows("SELECT value, other, version FROM plain") == [(1, 3, 3)]


async def test_other_sessions_of_versioned_models(db, edges):
    """V1, V4: outside a unit they are counted and checked by SQLAlchemy alone, and nothing is followed."""
    async with AsyncSession(edges.engine, expire_on_commit=False) as session:
        async with session.begin():
            row = Plain(id=1)
            session.add_all([row, Customer(id=1), Order(id=1, customer_id=1)])
        async with session.begin():
            row.value = 1
        assert row.version == 2
        async with session.begin():
            await session.delete(row)
        async with session.begin_nested():
            pass
        with pytest.raises(errors.NoUnitError):
            touch(await session.get_one(Order, 1))
    assert await db.rows("SELECT version FROM customer") == [(1,)]


async def test_a_read_only_unit_follows_nothing(db, edges):
    """V4: its flush is refused, and says why."""
    async with edges.begin() as unit:
        unit.session.add_all([Customer(id=1)])
    with pytest.raises(errors.ReadOnlyError):
        async with edges.begin(read_only=True) as unit:
            unit.session.add(Order(id=1, customer_id=1))
            await unit.session.flush()
    assert unit.status is Status.ROLLED_BACK


async def test_a_generator_of_the_models_own(db, edges):
    """V1: it stays."""

    class Own(DeclarativeBase):
        registry = registry()

    class Stepped(Versioned, Own):
        __tablename__ = "stepped"
        id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
        value: Mapped[int] = mapped_column(default=0)
        version: Mapped[int] = mapped_column()
        __mapper_args__ = {"version_id_col": version, "version_id_generator": lambda old: (old or 0) + 10}

    async with edges.engine.begin() as connection:
        await connection.run_sync(Own.metadata.create_all)
    async with edges.begin() as unit:
        row = Stepped(id=1)
        unit.session.add(row)
        await unit.session.flush()
        assert row.version == 10
        row.value = 1
    assert row.version == 20


async def test_a_column_that_is_mapped_under_another_name_too(db, edges):
    """V1: without `__version_attr__` it still is the version: counted and checked."""
    own = registry()
    table = Table(
        "renamed",
        own.metadata,
        Column("id", Integer, primary_key=True, autoincrement=False),
        Column("value", Integer, default=0),
        Column("version", Integer, nullable=False),
    )

    class Renamed(Versioned):
        pass

    own.map_imperatively(Renamed, table, properties={"rev": table.c.version})
    async with edges.engine.begin() as connection:
        await connection.run_sync(own.metadata.create_all)
    async with edges.begin() as unit:
        row = Renamed()
        row.id = 1
        unit.session.add(row)
        await unit.session.flush()
        row.value = 1
    assert row.version == await version_of(db, Renamed) == 2
    with pytest.raises(errors.StaleVersionError):
        async with edges.begin() as unit:
            row = await unit.session.get_one(Renamed, 1)
            await overtake(db, unit.session, Renamed)
            row.value = 2


@pytest.mark.drivers("asyncpg", "psycopg")
async def test_xmin_of_what_has_no_other_column(db, edges):
    """V4: nothing could be set to make PostgreSQL write the row, so it is refused."""

    class Own(DeclarativeBase):
        registry = registry()

    class Keys(VersionedByXmin, Own):
        __tablename__ = "keys"
        __version_attr__ = "rev"
        id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)

    async with edges.engine.begin() as connection:
        await connection.run_sync(Own.metadata.create_all)
    with pytest.raises(TypeError) as caught:
        async with edges.begin() as unit:
            row = Keys(id=1)
            unit.session.add(row)
            await unit.session.flush()
            assert row.rev == row.version > 1
            touch(row)
    assert str(caught.value) == "Keys(1) has no column except its key, so nothing can be written to change xmin"


@pytest.mark.drivers("sqlite")
def test_a_version_of_another_table(driver):
    """V1: a mapping onto a join can say so by mistake."""
    own = registry()
    left = Table("left", own.metadata, Column("id", Integer, primary_key=True))
    right = Table(
        "right", own.metadata, Column("id", ForeignKey("left.id"), primary_key=True), Column("version", Integer)
    )

    class Both(Versioned):
        pass

    with pytest.raises(TypeError, match="maps 'version' to a column of another table, right; map it to its own"):
        own.map_imperatively(Both, left.join(right), properties={"id": [left.c.id, right.c.id]})


@pytest.mark.drivers("sqlite")
def test_timestamps_without_a_zone_are_refused(driver):
    """V1: nobody could compare them; what comes back is in UTC, or None from an outer join."""
    kind, dialect = UtcTimestamp(), sqlite.dialect()
    with pytest.raises(ValueError, match="a version timestamp has no time zone; use an aware one, in UTC"):
        kind.process_bind_param(datetime(2000, 1, 1), dialect)  # noqa: DTZ001  # the point
    assert kind.process_bind_param(None, dialect) is None
    assert kind.process_result_value(None, dialect) is None
    assert kind.process_result_value(datetime(2000, 1, 1), dialect) == datetime(2000, 1, 1, tzinfo=UTC)  # noqa: DTZ001  # likewise


async def test_bulk_timestamps_strictly_increase(db, edges):
    """V1, V3: also of a row whose version is ahead of this clock, and over the second's end."""
    ahead = datetime(2100, 1, 1, 0, 0, 0, 999_999, UTC)
    async with edges.begin() as unit:
        unit.session.add_all([ByTimestamp(id=1), ByTimestamp(id=2)])
        await unit.session.flush()
        table = ByTimestamp.__table__
        await (await unit.session.connection()).execute(table.update().where(table.c.id == 1).values(version=ahead))
    before = await version_of(db, ByTimestamp, 2)
    async with edges.begin() as unit:
        await unit.session.execute(update(ByTimestamp).values(value=1))
    assert await version_of(db, ByTimestamp, 1) == ahead + timedelta(microseconds=1)
    assert await version_of(db, ByTimestamp, 2) > before
