"""V6: the version that is compared is of the moment at which the data were read; V7: each stale write says so."""

from __future__ import annotations

import pickle

import pytest
from sqlalchemy import DateTime, String, event, inspect, select, text, update
from sqlalchemy.dialects import sqlite
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    defer,
    load_only,
    make_transient_to_detached,
    mapped_column,
    registry,
    selectin_polymorphic,
    selectinload,
)

from sqla_uow import Status, errors
from sqla_uow._versions.kinds import UtcTimestamp, Xid
from sqla_uow.mixins import Versioned, VersionedByTimestamp, expect_version, get_versioned, touch
from tests.kit.models import Account
from tests.kit.statements import statements
from tests.versioning import test_edges as edges_tables
from tests.versioning.others import execute_outside, overtake, version_of, written
from tests.versioning.tables import ByTimestamp, ByUUID, Customer, JoinedChild, Order, OtherAttribute, Plain

edges = edges_tables.edges
MODELS = [Plain, ByUUID, ByTimestamp, OtherAttribute, JoinedChild]


def weakest(db):
    """Return the level at which nothing but the version stands against a lost update."""
    return "SERIALIZABLE" if db.family == "sqlite" else "READ COMMITTED"


@pytest.fixture
async def one(versioned):
    """Row 1 of each model."""
    async with versioned.begin() as unit:
        unit.session.add_all([model(id=1) for model in MODELS])
    return versioned


# -- loading in parts


@pytest.mark.parametrize("write", ["update", "delete"])
async def test_an_object_that_is_loaded_in_part(db, one, write):
    """Its version is loaded with it, whatever the options say, and compared."""
    for model in MODELS:
        version = inspect(model).attrs[model.__version_attr__].class_attribute
        for options in ([load_only(model.value)], [defer(version)], [load_only(model.value, raiseload=True)]):
            with pytest.raises(errors.StaleVersionError):
                async with one.begin(isolation=weakest(db)) as unit:
                    row = await unit.session.get_one(model, 1, options=options)
                    await overtake(db, unit.session, model)
                    if write == "update":
                        row.value = 5
                    else:
                        await unit.session.delete(row)
            assert await db.scalar(f"SELECT value FROM {inspect(model).local_table.name}") == 0


async def test_a_version_that_is_mapped_deferred(db, versioned):
    """It is loaded all the same."""

    class Own(DeclarativeBase):
        registry = registry()

    class Lazy(Versioned, Own):
        __tablename__ = "lazy"
        id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
        value: Mapped[int] = mapped_column(default=0)
        version: Mapped[int] = mapped_column(deferred=True, deferred_raiseload=True)

    async with versioned.engine.begin() as connection:
        await connection.run_sync(Own.metadata.create_all)
    async with versioned.begin() as unit:
        unit.session.add(Lazy(id=1))
    with pytest.raises(errors.StaleVersionError):
        async with versioned.begin(isolation=weakest(db)) as unit:
            row = (await unit.session.scalars(select(Lazy))).one()
            assert row.version == 1
            await overtake(db, unit.session, Lazy)
            row.value = 5


@pytest.mark.parametrize("later", [None, "the child's columns", "all"])
async def test_data_that_are_read_before_their_version(db, edges, later):
    """A base query reads the parent's table; what it has read is compared, where the child's version came too late."""
    async with edges.begin() as unit:
        unit.session.add(edges_tables.Dog(id=1))
    for overtaken in (False, True):
        with pytest.raises(errors.StaleVersionError) if overtaken and later != "all" else no_error():
            async with edges.begin(isolation=weakest(db)) as unit:
                row = (await unit.session.scalars(select(edges_tables.Animal))).one()
                if overtaken:
                    await change_name(db, unit.session)
                if later == "the child's columns":
                    await unit.session.execute(select(edges_tables.Dog))
                if later == "all":
                    await unit.session.refresh(row)
                row.name = f"{row.name}!"
    assert await db.scalar("SELECT name FROM animal") == (
        "other!" if later == "all" else "!" if db.family == "sqlite" else "other"
    )


def no_error():
    """Return a context that expects nothing."""
    return pytest.MonkeyPatch.context()


async def change_name(db, session):
    """Have somebody else change what the base query has read, and count."""
    for statement in ("UPDATE animal SET name = 'other'", "UPDATE dog SET version = version + 1"):
        if db.family == "sqlite":
            await (await session.connection()).execute(text(statement))
        else:
            await execute_outside(db, text(statement))


async def test_what_is_read_in_two_statements_of_one_load(db, edges):
    """selectin_polymorphic() reads the version a moment later: one SELECT more compares the data."""
    async with edges.begin() as unit:
        unit.session.add(edges_tables.Dog(id=1))
    async with edges.begin() as unit:
        both = select(edges_tables.Animal).options(selectin_polymorphic(edges_tables.Animal, [edges_tables.Dog]))
        row = (await unit.session.scalars(both)).one()
        row.name = "x"
    assert await db.rows("SELECT name, version FROM animal JOIN dog USING (id)") == [("x", 2)]


async def test_an_object_that_was_never_read(db, one):
    """Nothing tells which version it was: its write is refused, unless there is something to compare."""
    async with one.begin() as unit:
        row = Plain(id=1, value=0)
        make_transient_to_detached(row)
        unit.session.add(row)
        row.other = 3
    assert await db.rows("SELECT value, other, version FROM plain") == [(0, 3, 2)]
    with pytest.raises(errors.StaleVersionError) as caught:
        async with one.begin() as unit:
            row = Plain(id=1, value=7)
            make_transient_to_detached(row)
            unit.session.add(row)
            row.other = 4
    assert str(caught.value) == "Plain(1) is at version 2, and its value is not what was read before; read it again"
    assert (caught.value.model, caught.value.key, caught.value.found) == (Plain, (1,), 2)
    with pytest.raises(InvalidRequestError) as refused:
        async with one.begin() as unit:
            row = Plain(id=1)
            make_transient_to_detached(row)
            unit.session.add(row)
            row.other = 4
    assert str(refused.value) == (
        "Plain(1) is to be written, and nothing tells at which version its data were read; refresh() it first, or "
        "write it by an update()"
    )


async def test_an_object_that_was_never_read_in_a_savepoint(db, one):
    """Its version is read later than its data: the savepoint's rollback expires them, and must not put that version back."""
    with pytest.raises(InvalidRequestError, match="nothing tells at which version its data were read"):
        async with one.begin(isolation=weakest(db)) as unit:
            row = Plain(id=1, value=7)  # as somebody has seen it, before the row became 0
            make_transient_to_detached(row)
            unit.session.add(row)
            assert await unit.session.run_sync(lambda _: row.other) == 0  # and reads the version with it
            async with unit.session.begin_nested() as savepoint:
                row.other = 4
                await savepoint.rollback()
            row.value = 8
    assert await db.rows("SELECT value, other FROM plain") == [(0, 0)]


@pytest.mark.drivers("asyncpg", "psycopg", "asyncmy", "aiomysql")
async def test_loading_sends_no_more_than_before(db, one):
    """The version comes with the object, and a write of it sends one UPDATE."""
    sent = statements(one.engine, lambda statement: statement.startswith(("SELECT", "UPDATE")))
    async with one.begin() as unit:
        row = (await unit.session.scalars(select(Plain).options(load_only(Plain.value)))).one()
        row.value = 1
    assert [statement.split()[0] for statement in sent] == ["SELECT", "UPDATE"]


# -- what happens in memory


async def expire(session, row):
    """Expire it."""
    session.expire(row)


async def expire_all(session, _row):
    """Expire all."""
    session.expire_all()


async def expire_version(session, row):
    """Expire the version alone, and read it."""
    session.expire(row, ["version"])
    await session.run_sync(lambda _: row.version)


async def refresh_value(session, row):
    """Refresh one attribute."""
    await session.refresh(row, ["value"])


async def populate_in_part(session, _row):
    """Query one column over what is in memory."""
    some = select(Plain).options(load_only(Plain.other)).execution_options(populate_existing=True)
    await session.execute(some)


async def roll_back(session, row):
    """Roll a write back to a savepoint."""
    savepoint = await session.begin_nested()
    row.other = 3
    await session.flush()
    await savepoint.rollback()


@pytest.mark.drivers("asyncpg", "psycopg", "asyncmy", "aiomysql")
@pytest.mark.parametrize("step", [expire, expire_all, expire_version, refresh_value, populate_in_part])
async def test_what_has_not_been_read_anew(db, one, step):
    """An object that was not read again as a whole is of the version at which it was read first."""
    with pytest.raises(errors.StaleVersionError):
        async with one.begin(isolation="READ COMMITTED") as unit:
            row = await unit.session.get_one(Plain, 1)
            seen = row.value
            await execute_outside(db, update(Plain.__table__).values(value=100, version=2))
            await step(unit.session, row)
            row.value = seen + 1
    assert await db.rows("SELECT value, version FROM plain") == [(100, 2)]


@pytest.mark.parametrize("names", [None, ["version"], ["value", "version"]])
async def test_a_refresh_of_the_version_is_one_of_all(db, one, names):
    """The version stands for the whole row."""
    async with one.begin(isolation=weakest(db)) as unit:
        row = await unit.session.get_one(Plain, 1)
        other = text("UPDATE plain SET value = 100, other = 100, version = 2")
        if db.family == "sqlite":
            await (await unit.session.connection()).execute(other)
        else:
            await execute_outside(db, other)
        await unit.session.refresh(row, names)
        assert (row.value, row.other, row.version) == (100, 100, 2)
        row.other += 1
    assert await db.rows("SELECT value, other, version FROM plain") == [(100, 101, 3)]


@pytest.mark.drivers("asyncpg", "psycopg", "asyncmy", "aiomysql")
async def test_pickled_and_detached(db, one):
    """The version goes with the object, and so does that of data that were expired."""
    for expires in (False, True):
        before = await version_of(db, Plain)
        async with one.begin() as unit:
            row = (await unit.session.scalars(select(Plain).options(load_only(Plain.value)))).one()
            if expires:
                unit.session.expire(row)
            unit.session.expunge(row)
        sent = pickle.dumps(row)
        await execute_outside(db, written(Plain))
        with pytest.raises(errors.StaleVersionError) as caught:
            async with one.begin(isolation="READ COMMITTED") as unit:
                row = pickle.loads(sent)  # noqa: S301  # ours
                unit.session.add(row)
                row.value = 9
        assert (caught.value.model, caught.value.key) == (Plain, (1,))
        assert (caught.value.expected, caught.value.found) == (before, before + 1)


# -- expectations

REFRESHES = {
    "refresh": lambda session, row: session.refresh(row),
    "with a lock": lambda session, row: session.refresh(row, with_for_update=True),
    "populate": lambda session, _: session.execute(select(Plain).execution_options(populate_existing=True)),
    "savepoint": roll_back,
}


@pytest.mark.drivers("asyncpg", "psycopg", "asyncmy", "aiomysql")
@pytest.mark.parametrize("how", [*REFRESHES, "expire"])
@pytest.mark.parametrize("end", ["write", "delete", "nothing"])
async def test_only_the_units_own_write_moves_an_expectation_on(db, one, how, end):
    """Not a refresh with a flush of something else behind it."""
    with pytest.raises(errors.StaleVersionError) as caught:
        async with one.begin(isolation="READ COMMITTED") as unit:
            row = await get_versioned(unit.session, Plain, 1, version=1)
            await execute_outside(db, update(Plain.__table__).values(value=100, version=2))
            if how == "expire":
                unit.session.expire_all()
                await unit.session.refresh(row, ["value"])
            elif how == "savepoint":
                unit.session.expire(row)
                await unit.session.run_sync(lambda _: row.value)
                savepoint = await unit.session.begin_nested()
                await savepoint.rollback()
            else:
                await REFRESHES[how](unit.session, row)
            unit.session.add(Account(id=7))
            await unit.session.flush()
            if end == "write":
                row.value = 5
            if end == "delete":
                await unit.session.delete(row)
    assert (caught.value.model, caught.value.key, caught.value.expected, caught.value.found) == (Plain, (1,), 1, 2)
    assert await db.rows("SELECT value, version FROM plain") == [(100, 2)]
    assert await db.rows("SELECT id FROM account") == []


async def test_an_expectation_that_a_savepoint_has_checked(db, one):
    """With the savepoint the lock is gone on PostgreSQL; the check goes with it."""
    if db.family != "postgresql":
        return
    with pytest.raises(errors.StaleVersionError):
        async with one.begin(isolation="READ COMMITTED") as unit:
            row = await get_versioned(unit.session, Plain, 1, version=1)
            savepoint = await unit.session.begin_nested()
            await unit.session.execute(update(Plain).values(value=1))
            await savepoint.rollback()
            await execute_outside(db, written(Plain))
            del row


# -- versions in memory after a statement


@pytest.mark.drivers("asyncpg", "psycopg", "asyncmy", "aiomysql")
@pytest.mark.parametrize("form", ["auto", "evaluate", "fetch", False])
async def test_a_statement_that_matches_in_memory_only(db, versioned, form):
    """Somebody has closed the row meanwhile: no row of the database is changed, and the object stays stale."""
    async with versioned.begin() as unit:
        unit.session.add(Plain(id=1, other=10))
    with pytest.raises(errors.StaleVersionError):
        async with versioned.begin(isolation="READ COMMITTED") as unit:
            row = await unit.session.get_one(Plain, 1)
            await execute_outside(db, update(Plain.__table__).values(value=1, other=1, version=2))
            held = update(Plain).where(Plain.value == 0).values(value=2)
            await unit.session.execute(held, execution_options={"synchronize_session": form})
            row.other = row.other - 5
    assert await db.rows("SELECT value, other, version FROM plain") == [(1, 1, 2)]


# -- stale writes that come out of no flush


async def stale_merge(session):
    """Merge what a client has sent."""
    await session.merge(Plain(id=1, version=1, value=5))


async def stale_merge_of_an_expired(session):
    """The same over an object that was expired."""
    row = await session.get_one(Plain, 1)
    session.expire(row)
    await session.merge(Plain(id=1, version=1, value=5))


async def stale_list(session):
    """A list by key, with the version."""
    await session.execute(update(Plain), [{"id": 1, "version": 1, "value": 5}])


async def stale_list_by_column(session):
    """One key twice, of the same version."""
    await session.execute(update(Plain), [{"id": 1, "value": 5, "version": 2}, {"id": 1, "value": 5, "version": 2}])


STALE = {
    stale_merge: (1, 2),
    stale_merge_of_an_expired: (1, 2),
    stale_list: (1, 2),
    stale_list_by_column: (2, 3),
}


@pytest.mark.parametrize("write", STALE)
async def test_each_stale_write_is_named(db, one, write):
    """It is retried as others are, and then names model, key and versions."""
    await db.run("UPDATE plain SET version = 2")
    runs = []
    with pytest.raises(errors.StaleVersionError) as caught:
        async for attempt in one.attempts(retries=1):
            async with attempt as unit:
                runs.append(unit)
                await write(unit.session)
    assert len(runs) == 2
    assert (caught.value.model, caught.value.key) == (Plain, (1,))
    assert (caught.value.expected, caught.value.found) == STALE[write]
    assert caught.value.attempts == 2
    assert await db.rows("SELECT value, version FROM plain") == [(0, 2)]


@pytest.mark.parametrize("write", STALE)
async def test_a_stale_write_that_is_swallowed(db, one, write):
    """It dooms the unit, which is run again."""
    await db.run("UPDATE plain SET version = 2")
    with pytest.raises(errors.StaleVersionError):
        async with one.begin() as unit:
            with pytest.raises(errors.StaleDataError):
                await write(unit.session)
    assert unit.status is Status.ROLLED_BACK
    assert await db.rows("SELECT value, version FROM plain") == [(0, 2)]


async def test_a_stale_write_that_leaves_a_savepoint(db, one):
    """The savepoint's rollback takes it back, but the error that leaves the body is still ours."""
    with pytest.raises(errors.StaleVersionError) as caught:
        async with one.begin(isolation=weakest(db)) as unit:
            row = await unit.session.get_one(Plain, 1)
            await overtake(db, unit.session, Plain)
            async with unit.session.begin_nested():
                row.value = 1
    if db.family != "sqlite":  # where the other's change was the unit's own
        assert caught.value.model is Plain


@pytest.mark.drivers("sqlite", "psycopg", "asyncmy", "aiomysql")  # asyncpg does not count a batch
async def test_a_list_of_a_model_without_version(db, one):
    """SQLAlchemy's own refusal of a missing row counts as stale too: never a commit of the others."""
    await db.run("INSERT INTO account (id, balance) VALUES (1, 0)")
    rows = [{"id": 1, "balance": 5}, {"id": 9, "balance": 5}]
    with pytest.raises(errors.StaleVersionError):
        async with one.begin() as unit:
            await unit.session.execute(update(Account), rows)
    with pytest.raises(errors.StaleVersionError):
        async with one.begin() as unit:
            with pytest.raises(errors.StaleDataError):
                await unit.session.execute(update(Account), rows)
    assert await db.rows("SELECT balance FROM account") == [(0,)]


async def test_merges_that_are_right(db, one):
    """Of the version there is, without one, and of a new row."""
    async with one.begin() as unit:
        await unit.session.merge(Plain(id=1, version=1, value=5))
        await unit.session.merge(Plain(id=2, value=6))
    async with one.begin() as unit:
        await unit.session.merge(Plain(id=1, value=7))
    assert await db.rows("SELECT id, value, version FROM plain ORDER BY id") == [(1, 7, 3), (2, 6, 1)]


# -- keys


async def test_a_touch_and_another_key(db, edges):
    """A key that is changed in the same flush makes one UPDATE, which finds its row."""
    async with edges.begin() as unit:
        unit.session.add_all([Plain(id=1), edges_tables.Composite(left=1, right="a")])
    async with edges.begin() as unit:
        row = await unit.session.get_one(Plain, 1)
        touch(row)
        row.id = 5
        composite = await unit.session.get_one(edges_tables.Composite, (1, "a"))
        composite.right = "b"
        touch(composite)
    assert await db.rows("SELECT id, version FROM plain") == [(5, 2)]
    assert await db.rows(
        "SELECT version FROM composite WHERE " + ("`right`" if db.family == "mysql" else '"right"') + " = 'b'"
    ) == [(2,)]


async def test_a_part_and_another_key(db, versioned):
    """The same where a new part counts for a whole whose key is changed in the same flush."""
    async with versioned.begin() as unit:
        unit.session.add(Customer(id=1))
    sent = statements(versioned.engine, lambda statement: statement.startswith("UPDATE"))
    async with versioned.begin() as unit:
        customer = await unit.session.get_one(Customer, 1, options=[selectinload(Customer.orders)])
        customer.id = 5
        customer.orders.append(Order(id=1))
    assert await db.rows("SELECT id, version FROM customer") == [(5, 2)]
    assert await db.rows("SELECT id, customer_id FROM order_") == [(1, 5)]
    assert len(sent) == 1


async def test_a_key_of_another_case(db, versioned):
    """A list finds the row that the database finds."""

    class Own(DeclarativeBase):
        registry = registry()

    class Named(Versioned, Own):
        __tablename__ = "named"
        name: Mapped[str] = mapped_column(String(10), primary_key=True)
        value: Mapped[int] = mapped_column(default=0)
        version: Mapped[int] = mapped_column("lock_version")

    async with versioned.engine.begin() as connection:
        await connection.run_sync(Own.metadata.create_all)
    async with versioned.begin() as unit:
        unit.session.add(Named(name="abc"))
    if db.family == "mysql":
        async with versioned.begin() as unit:
            row = await unit.session.get_one(Named, "abc")
            await unit.session.execute(update(Named), [{"name": "ABC", "value": 5}])
            assert row.version == 2
            row.value = 6
        assert await db.rows("SELECT value, lock_version FROM named") == [(6, 3)]
    with pytest.raises(errors.StaleVersionError):  # the column's name is the version's too
        async with versioned.begin() as unit:
            await unit.session.execute(update(Named), [{"name": "abc", "value": 5, "lock_version": 9}])


# -- events and mappings


async def test_expectations_in_a_flush(db, one):
    """A statement in a flush's event moves on what it has counted, and what the flush writes is its own."""
    async with one.begin() as unit:
        row = await get_versioned(unit.session, Plain, 1, version=1)

        def count(session, _context):
            session.execute(update(Plain).where(Plain.id == 1).values(other=Plain.other + 1))

        event.listen(unit.session.sync_session, "after_flush", count, once=True)
        row.value = 1
        await unit.session.flush()
        assert row.version == 3
        row.value = 2
    assert await db.rows("SELECT value, other, version FROM plain") == [(2, 1, 4)]


async def test_a_column_of_the_models_own_as_version_by_timestamp(db, versioned):
    """One with a time zone counts on every database; one without is refused at mapping."""

    class Own(DeclarativeBase):
        registry = registry()

    class Changed(VersionedByTimestamp, Own):
        __tablename__ = "changed"
        __version_attr__ = "updated_at"
        id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
        value: Mapped[int] = mapped_column(default=0)
        updated_at = mapped_column(DateTime(timezone=True))

    assert isinstance(Changed.__table__.c.updated_at.type, UtcTimestamp)
    async with versioned.engine.begin() as connection:
        await connection.run_sync(Own.metadata.create_all)
    async with versioned.begin() as unit:
        unit.session.add(Changed(id=1))
    before = await version_of(db, Changed)
    async with versioned.begin() as unit:
        row = await unit.session.get_one(Changed, 1)
        row.value = 1
        expect_version(row, before)
    assert await version_of(db, Changed) == row.updated_at > before
    with pytest.raises(TypeError) as caught:

        class Naive(VersionedByTimestamp, Own):
            __tablename__ = "naive"
            __version_attr__ = "updated_at"
            id: Mapped[int] = mapped_column(primary_key=True)
            updated_at = mapped_column(DateTime)

    assert str(caught.value) == (
        "Naive maps its version to 'updated_at', which is declared without a time zone; declare it as "
        "mapped_column(DateTime(timezone=True))"
    )


@pytest.mark.drivers("sqlite")
def test_factories_can_ask_for_the_type_of_xmin(driver):
    """Polyfactory and its like look at `python_type`."""
    assert Xid().python_type is int
    assert Xid().compile(dialect=sqlite.dialect()) == "xid"
