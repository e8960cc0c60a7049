"""Every way of mapping a model keeps the check, and what cannot is an error where it is mapped."""

from __future__ import annotations

from datetime import UTC, datetime
from uuid import UUID

import pytest
from sqlalchemy import BigInteger, Column, ForeignKey, Integer, Table, inspect, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, registry

from sqla_uow import errors
from sqla_uow.mixins import Versioned, VersionedByUUID
from tests.versioning import tables
from tests.versioning.others import execute_outside, overtake, version_of


def models(db):
    """Return the models that this database can have."""
    return [*tables.MATRIX, tables.ByXmin] if db.family == "postgresql" else tables.MATRIX


async def add(manager, model, **values):
    """Commit row 1 of a model."""
    async with manager.begin() as unit:
        instance = model(id=1, **values)
        unit.session.add(instance)
    return instance


async def test_each_mapping_counts_each_change(db, versioned):
    """V1: each change gives another version, in memory as in the database; reading gives none."""
    for model in models(db):
        seen = [(await add(versioned, model)).version]
        for value in (1, 2):
            async with versioned.begin() as unit:
                instance = await unit.session.get_one(model, 1)
                assert instance.version == seen[-1], model
                instance.value = value
            seen.append(instance.version)
            assert await version_of(db, model) == seen[-1], model
        assert len(set(seen)) == 3, model
        if isinstance(seen[0], int) and model is not tables.ByXmin:
            assert seen == [1, 2, 3], model


async def set_value(_session, instance):
    """Change the object."""
    instance.value = 100


async def delete(session, instance):
    """Delete the object."""
    await session.delete(instance)


@pytest.mark.parametrize("change", [set_value, delete])
async def test_each_mapping_checks_each_change(db, versioned, change):
    """V1: an UPDATE or a DELETE of a row that somebody else has changed since is refused, however the model is mapped."""
    for model in models(db):
        await add(versioned, model)
        with pytest.raises(errors.StaleVersionError) as caught:
            async with versioned.begin() as unit:
                instance = await unit.session.get_one(model, 1)
                await overtake(db, unit.session, model)
                await change(unit.session, instance)
        assert caught.value.reason == "stale version"
        async with versioned.begin() as unit:
            assert (await unit.session.get_one(model, 1)).value == 0, model


async def test_a_composite_key(db, versioned):
    """V1, V2: a key of two columns."""
    async with versioned.begin() as unit:
        unit.session.add(tables.Composite(left=1, right="a"))
    async with versioned.begin() as unit:
        row = await unit.session.get_one(tables.Composite, (1, "a"))
        row.value = 5
    assert row.version == 2
    with pytest.raises(errors.StaleVersionError):
        async with versioned.begin() as unit:
            row = await unit.session.get_one(tables.Composite, (1, "a"))
            await overtake(db, unit.session, tables.Composite)
            row.value = 6
    assert await db.rows("SELECT value, version FROM composite") == [(5, 2 if db.family == "sqlite" else 3)]


async def test_post_update_counts_and_checks(db, versioned):
    """V1, T35: a pointer that SQLAlchemy writes in a second UPDATE is checked, with another change and alone."""
    async with versioned.begin() as unit:
        first, second = tables.PostUpdate(id=1), tables.PostUpdate(id=2)
        unit.session.add_all([first, second])
        first.favourite, second.favourite = second, first
    async with versioned.begin() as unit:
        first = await unit.session.get_one(tables.PostUpdate, 1)
        before = first.version
        first.value, first.favourite = 1, None
    assert first.version > before
    assert await version_of(db, tables.PostUpdate) == first.version
    async with versioned.begin() as unit:
        first = await unit.session.get_one(tables.PostUpdate, 1)
        first.favourite = first
    assert await db.rows("SELECT favourite_id, version FROM post_update WHERE id = 1") == [(1, first.version)]
    with pytest.raises(errors.StaleVersionError):
        async with versioned.begin() as unit:
            first = await unit.session.get_one(tables.PostUpdate, 1)
            await overtake(db, unit.session, tables.PostUpdate)
            first.favourite = None


@pytest.mark.drivers("sqlite")
async def test_columns(db, versioned):
    """V1: NOT NULL, with a default and a constant server default, and marked; also a column that the model wrote itself."""
    for model in tables.MATRIX:
        column = inspect(model).version_id_col
        kind = dict(zip((int, UUID, datetime), ("integer", "uuid", "timestamp"), strict=True))
        assert column.info["sqla_uow.version"] == kind[model.__version_kind__.python_type]
        assert not column.nullable
        assert column.default is not None
        assert isinstance(column.server_default.arg, str)
    assert inspect(tables.OtherColumn).version_id_col.name == "lock_version"
    assert isinstance(inspect(tables.OfAnnotated).version_id_col.type, BigInteger)
    assert inspect(tables.OtherAttribute).version_id_col.name == "rev"
    for model in (tables.SingleChild, tables.JoinedChild):
        assert inspect(model).version_id_col is inspect(model).inherits.version_id_col


async def test_rows_of_the_server_default_can_be_changed(db, versioned):
    """V1: rows that were there before the column, or were made past the ORM, have a version that the check knows."""
    for model in (tables.OwnArguments, tables.ByUUID, tables.ByTimestamp):
        await execute_outside(db, text(f"INSERT INTO {model.__tablename__} (id, value) VALUES (1, 0)"))
        async with versioned.begin() as unit:
            row = await unit.session.get_one(model, 1)
            before, row.value = row.version, 1
        assert row.version != before


async def test_timestamps_are_aware_and_strictly_increasing(db, versioned):
    """V1: aware, in UTC, to the microsecond, and later than the last one although the clock was set back."""
    row = await add(versioned, tables.ByTimestamp)
    assert row.version.tzinfo is UTC
    assert abs((datetime.now(UTC) - row.version).total_seconds()) < 60
    ahead = datetime(2100, 1, 1, 0, 0, 0, 999_999, UTC)
    async with versioned.begin() as unit:
        table = tables.ByTimestamp.__table__
        await (await unit.session.connection()).execute(table.update().values(version=ahead))
    async with versioned.begin() as unit:
        row = await unit.session.get_one(tables.ByTimestamp, 1)
        assert row.version == ahead
        row.value = 1
    assert row.version == datetime(2100, 1, 1, 0, 0, 1, 0, UTC)
    assert await version_of(db, tables.ByTimestamp) == row.version


async def test_a_constructor_argument_is_ignored(db, versioned):
    """V2: what the first version is, is not the caller's to say."""
    assert (await add(versioned, tables.Plain, version=7)).version == 1
    assert (await add(versioned, tables.OtherAttribute, rev=7)).rev == 1
    if db.family == "postgresql":
        assert (await add(versioned, tables.ByXmin, version=7)).version > 7


@pytest.mark.drivers("asyncmy")
async def test_xmin_is_postgresqls(db, versioned):
    """V1: a table versioned by xmin is refused elsewhere, before it is made."""
    async with versioned.engine.begin() as connection:
        with pytest.raises(TypeError) as caught:
            await connection.run_sync(tables.XminBase.metadata.create_all)
    assert str(caught.value) == (
        "table 'by_xmin' is versioned by xmin, which MariaDB does not have; use Versioned, VersionedByUUID or "
        "VersionedByTimestamp"
    )


def of_a_fresh_base(body):
    """Run a mapping in a registry of its own, and return the message of its TypeError."""

    class Base(DeclarativeBase):
        pass

    class Parent(Base):
        __tablename__ = "parent"
        id: Mapped[int] = mapped_column(primary_key=True)

    class VersionedParent(Versioned, Base):
        __tablename__ = "versioned_parent"
        id: Mapped[int] = mapped_column(primary_key=True)

    with pytest.raises(TypeError) as caught:
        body(Base, Parent, VersionedParent)
    return str(caught.value)


def single_child(_base, parent, _versioned):
    """Put the mixin on a class without a table of its own."""
    type("Child", (Versioned, parent), {})


def concrete_child(_base, _parent, versioned):
    """Give a versioned parent a child with another table."""
    type("Child", (versioned,), {
        "__tablename__": "child", "__mapper_args__": {"concrete": True}, "id": mapped_column(Integer, primary_key=True),
        "version": mapped_column(Integer),
    })  # fmt: skip


def excluded(base, _parent, _versioned):
    """Leave the version out of the mapping."""
    type("Child", (Versioned, base), {
        "__tablename__": "child", "__mapper_args__": {"exclude_properties": ["version"]},
        "id": mapped_column(Integer, primary_key=True),
    })  # fmt: skip


def nullable(base, _parent, _versioned):
    """Make the version a column that may be NULL."""
    type("Child", (Versioned, base), {
        "__tablename__": "child", "id": mapped_column(Integer, primary_key=True),
        "version": mapped_column(Integer, nullable=True),
    })  # fmt: skip


def two_columns(base, _parent, _versioned):
    """Name another column as the version."""
    other = mapped_column(Integer)
    type("Child", (Versioned, base), {
        "__tablename__": "child", "id": mapped_column(Integer, primary_key=True), "other": other,
        "__mapper_args__": {"version_id_col": other},
    })  # fmt: skip


def two_versions(_base, _parent, versioned):
    """Give the child of a versioned parent a version too."""
    type("Child", (VersionedByUUID, versioned), {
        "__tablename__": "child", "__version_attr__": "rev",
        "id": mapped_column(ForeignKey("versioned_parent.id"), primary_key=True), "rev": mapped_column(Integer),
    })  # fmt: skip


def no_column(_base, _parent, _versioned):
    """Leave the version out of an imperative mapping."""

    class Model(Versioned):
        pass

    table = Table("t", registry().metadata, Column("id", Integer, primary_key=True), Column("version", Integer))
    registry().map_imperatively(Model, table, exclude_properties=["version"])


# SQLAlchemy 2.1 has its own word on the excluded column
@pytest.mark.filterwarnings("ignore:Attribute 'version' declared on class:sqlalchemy.exc.SADeprecationWarning")
@pytest.mark.drivers("sqlite")
@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        (
            single_child,
            "Child has a version mixin but shares the table of Parent, which has none; put the mixin on Parent",
        ),
        (
            concrete_child,
            (
                "Child is a concrete child of VersionedParent, whose version is in another table; make it a joined or "
                "single-table child, or a model of its own with the mixin"
            ),
        ),
        (
            excluded,
            (
                "Child has a version mixin but does not map 'version' to a column; take it out of exclude_properties, or name "
                "the attribute in __version_attr__"
            ),
        ),
        (
            nullable,
            "Child maps its version to the nullable column 'version', and NULL equals no version; declare it NOT NULL",
        ),
        (
            two_columns,
            "Child has a version mixin and another version_id_col, 'other', in its __mapper_args__; leave one of them out",
        ),
        (
            two_versions,
            (
                "Child has a version of its own, but inherits that of VersionedParent; leave the mixin, the column and "
                "__version_attr__ to the parent"
            ),
        ),
        (
            no_column,
            (
                "Model has a version mixin but does not map 'version' to a column; take it out of exclude_properties, or name "
                "the attribute in __version_attr__"
            ),
        ),
    ],
)
def test_what_cannot_be_checked_is_refused_at_mapping(driver, mapping, message):
    """V1: no mapping goes unchecked in silence."""
    assert of_a_fresh_base(mapping) == message
