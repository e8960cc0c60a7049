"""touch() and __version_follows__: changes that are in none of the object's own columns."""

from __future__ import annotations

import asyncio
import contextlib

import pytest
from sqlalchemy import ForeignKey, Integer, select
from sqlalchemy.orm import DeclarativeBase, mapped_column, registry, relationship
from sqlalchemy.util import greenlet_spawn

from sqla_uow import errors
from sqla_uow._versions import follows as _follows
from sqla_uow.mixins import Versioned, expect_version, touch
from tests.kit.statements import statements
from tests.versioning import tables
from tests.versioning.others import version_of
from tests.versioning.tables import MATRIX, Customer, Line, Order, Plain, Remark


@pytest.fixture
async def orders(versioned):
    """Customer 1 with orders 1 and 2, customer 2 with order 3; lines 1 and 2, remark 1 of order 1; all at version 1."""
    async with versioned.begin() as unit:
        unit.session.add_all([Customer(id=1), Customer(id=2)])
        unit.session.add_all([Order(id=1, customer_id=1), Order(id=2, customer_id=1), Order(id=3, customer_id=2)])
        await unit.session.flush()
        unit.session.add_all([Line(id=1, order_id=1), Line(id=2, order_id=1), Remark(id=1, order_id=1)])
    async with versioned.engine.begin() as connection:
        for model in (Customer, Order):
            await connection.execute(model.__table__.update().values(version=1))
    return versioned


async def versions(db):
    """Return what is committed: the versions of the customers, and of the orders."""
    customers = [row[0] for row in await db.rows("SELECT version FROM customer ORDER BY id")]
    return customers, [row[0] for row in await db.rows("SELECT version FROM order_ ORDER BY id")]


async def test_touch_counts_one_change(db, versioned):
    """V4: in every mapping; of an object that is expired; once, with another change in the same flush; not a new one's."""
    models = [*MATRIX, tables.ByXmin] if db.family == "postgresql" else MATRIX
    for model in models:
        async with versioned.begin() as unit:
            row = model(id=1)
            unit.session.add(row)
            touch(row)
        seen = [row.version]
        for expired, changed in ((False, False), (True, False), (False, True)):
            async with versioned.begin() as unit:
                row = await unit.session.get_one(model, 1)
                if expired:
                    unit.session.expire(row)
                touch(row)
                touch(row)
                if changed:
                    row.value = 5
                await unit.session.flush()
                await unit.session.flush()
            seen.append(row.version)
        assert len(set(seen)) == 4, model
        if isinstance(seen[0], int) and model is not tables.ByXmin:
            assert seen == [1, 2, 3, 4], model
        assert await version_of(db, model) == seen[-1]


async def test_touch_checks(db, versioned):
    """V4, V2: it is an UPDATE with the version in its WHERE; a read-only unit refuses it."""
    async with versioned.begin() as unit:
        unit.session.add(Plain(id=1))
    with pytest.raises(errors.StaleVersionError):
        async with versioned.begin() as unit:
            row = await unit.session.get_one(Plain, 1)
            await (await unit.session.connection()).execute(Plain.__table__.update().values(version=9))
            touch(row)
    with pytest.raises(errors.ReadOnlyError, match=r"touch\(\) was called for Plain\(1\)"):
        async with versioned.begin(read_only=True) as unit:
            touch(await unit.session.get_one(Plain, 1))
    assert await version_of(db, Plain) == 1


async def add(session, _order):
    """Add a part by its foreign key."""
    session.add(Line(id=9, order_id=1))


async def append(session, order):
    """Add a part to the collection."""
    (await order.awaitable_attrs.lines).append(Line(id=9))


async def append_without_a_way_back(session, order):
    """Add a part to the collection, that knows of none."""
    (await order.awaitable_attrs.remarks).append(Remark(id=9))


async def change(session, _order):
    """Change a part."""
    (await session.get_one(Line, 1)).amount = 5


async def remove(session, _order):
    """Delete a part."""
    await session.delete(await session.get_one(Line, 1))


async def take_out(session, order):
    """Take a part out of the collection, which deletes it as an orphan."""
    (await order.awaitable_attrs.lines).pop()


async def several(session, order):
    """Do several of these, and change the whole as well."""
    with session.no_autoflush:
        for step in (add, change, append_without_a_way_back):
            await step(session, order)
    order.name = "x"


@pytest.mark.parametrize("step", [add, append, append_without_a_way_back, change, remove, take_out, several])
async def test_a_change_of_a_part_counts_once(db, orders, step):
    """V4: for the whole, and for the whole of that, which is not in memory; for no other."""
    async with orders.begin() as unit:
        order = await unit.session.get_one(Order, 1)
        await step(unit.session, order)
    assert order.version == 2
    assert await versions(db) == ([2, 1], [2, 1, 1])


async def test_wholes_that_are_not_in_memory(db, orders):
    """V4: counted without a check."""
    async with orders.begin() as unit:
        line = await unit.session.get_one(Line, 1)
        line.amount = 4
    assert await versions(db) == ([2, 1], [2, 1, 1])
    async with orders.begin() as unit:
        remark = await unit.session.get_one(Remark, 1)
        remark.text = "x"
        unit.session.add(Remark(id=2))
    assert await versions(db) == ([3, 1], [3, 1, 1])


async def move_by_key(session, line):
    """Change the foreign key."""
    line.order_id = 3


async def move_by_relationship(session, line):
    """Change the way back."""
    line.order = await session.get_one(Order, 3)


async def move_by_collection(session, line):
    """Change the new whole's collection."""
    order = await session.get_one(Order, 3)
    (await order.awaitable_attrs.lines).append(line)


async def move_expired(session, line):
    """Change a foreign key that is not in memory."""
    session.expire(line)
    line.order_id = 3


@pytest.mark.parametrize("loaded", [True, False])
@pytest.mark.parametrize("step", [move_by_key, move_by_relationship, move_by_collection, move_expired])
async def test_a_part_that_moves(db, orders, step, loaded):
    """V4: both wholes, the old one and the new one, and theirs."""
    async with orders.begin() as unit:
        line = await unit.session.get_one(Line, 1)
        kept = [await unit.session.get_one(Order, key) for key in (1, 3)] if loaded else []
        await step(unit.session, line)
    assert await versions(db) == ([2, 2], [2, 1, 2])
    assert [order.version for order in kept] == [2, 2] * loaded or not loaded


async def test_a_remark_that_moves_by_its_collection(db, orders):
    """V4: without a way back nothing but its foreign key tells where it was."""
    async with orders.begin() as unit:
        remark = await unit.session.get_one(Remark, 1)
        order = await unit.session.get_one(Order, 2)
        (await order.awaitable_attrs.remarks).append(remark)
    assert await versions(db) == ([2, 1], [2, 2, 1])
    async with orders.begin() as unit:
        remark = await unit.session.get_one(Remark, 1)
        order = Order(id=7, remarks=[remark])
        unit.session.add(order)
    assert order.version == 1
    assert await versions(db) == ([3, 1], [2, 3, 1, 1])


async def test_the_whole_is_deleted_with_its_parts(db, orders):
    """V4: it is not counted any more, but its own whole is."""
    async with orders.begin() as unit:
        order = await unit.session.get_one(Order, 1)
        await order.awaitable_attrs.remarks
        await unit.session.delete(order)
    assert await versions(db) == ([2, 1], [1, 1])


async def test_a_touched_part_counts_for_its_whole(db, orders):
    """V4: chains are followed from what is touched too."""
    async with orders.begin() as unit:
        touch(await unit.session.get_one(Order, 3))
    assert await versions(db) == ([1, 2], [1, 1, 2])


async def test_once_per_flush_and_wholes_first(db, orders):
    """V4: two flushes count twice; wholes are written in the order of their keys, before the parts."""
    sent = statements(orders.engine, lambda one: one.startswith(("UPDATE", "INSERT")))
    async with orders.begin() as unit:
        unit.session.add_all([Line(id=8, order_id=2), Line(id=9, order_id=1)])
        await unit.session.flush()
        (await unit.session.get_one(Line, 8)).amount = 2
    assert await versions(db) == ([3, 1], [2, 3, 1])
    written = [statement.split()[1 if statement.startswith("UPDATE") else 2] for statement in sent]
    assert written[:3] == ["customer", "order_", "line"]


async def test_nothing_changed_counts_nothing(db, orders):
    """V4: reading parts, and setting what is there already."""
    async with orders.begin() as unit:
        line = await unit.session.get_one(Line, 1)
        line.amount = line.amount
        await unit.session.flush()
        unit.session.add(Plain(id=1))
    assert await versions(db) == ([1, 1], [1, 1, 1])


async def test_a_client_sees_a_change_of_a_part(db, orders):
    """V4, V2: who saw the order before the line was changed may not change it."""
    async with orders.begin() as unit:
        (await unit.session.get_one(Line, 1)).amount = 5
    with pytest.raises(errors.StaleVersionError):
        async with orders.begin() as unit:
            expect_version(await unit.session.get_one(Order, 1), 1)


@pytest.mark.drivers("asyncpg", "psycopg", "asyncmy", "aiomysql")
async def test_many_units_change_parts_of_the_same_wholes(db, orders):
    """V4: without retries: no deadlock and no false conflict where the wholes are not in memory."""
    async with orders.begin() as unit:
        unit.session.add_all([Line(id=key, order_id=key % 3 + 1) for key in range(10, 30)])
    before = await versions(db)

    chosen = [(key, 10 + key % 20, 10 + (key + 7) % 20) for key in range(10, 30)]

    async def work(first):
        for keys in chosen[first::4]:
            async with orders.begin(isolation="READ COMMITTED") as unit:
                for line in (await unit.session.scalars(select(Line).where(Line.id.in_(keys)))).all():
                    line.amount += 1

    await asyncio.gather(*(work(first) for first in range(4)))
    touched = [{key % 3 + 1 for key in keys} for keys in chosen]
    of_orders = [sum(order in each for each in touched) for order in (1, 2, 3)]
    of_customers = [sum(bool(each & {1, 2}) for each in touched), of_orders[2]]
    after = await versions(db)
    assert after[0] == [old + new for old, new in zip(before[0], of_customers, strict=True)]
    assert after[1] == [old + new for old, new in zip(before[1], of_orders, strict=True)]


@pytest.mark.drivers("asyncpg", "psycopg", "asyncmy", "aiomysql")
async def test_wholes_in_memory_and_others_are_locked_in_one_order(db, orders):
    """V4: each of two units has another one of the two wholes in memory; one of them is stale, none is a deadlock."""
    await db.run("UPDATE order_ SET customer_id = NULL", "UPDATE line SET order_id = 3 WHERE id = 2")
    barrier, stale = asyncio.Barrier(2), []

    async def work(in_memory):
        try:
            async with orders.begin(isolation="READ COMMITTED") as unit:
                order = await unit.session.get_one(Order, in_memory)  # kept, or it would not stay in memory
                lines = (await unit.session.scalars(select(Line))).all()
                await barrier.wait()
                for line in lines:
                    line.amount += order.version
        except errors.StaleVersionError as error:
            stale.append(error.key == (in_memory,))

    for _ in range(10):
        await asyncio.gather(work(1), work(3))
    assert stale == [True] * 10


@contextlib.contextmanager
def mapped(follows, **more):
    """Map and configure a model that follows `follows`; it is forgotten again."""

    class Base(DeclarativeBase):
        registry = registry()

    namespace = {
        "__tablename__": "whole",
        "__version_follows__": follows,
        "id": mapped_column(Integer, primary_key=True),
    }
    try:
        whole = type("Whole", (Versioned, Base), namespace | {name: make() for name, make in more.items()})
        part = {"__tablename__": "part", "id": mapped_column(Integer, primary_key=True)}
        part |= {"whole_id": mapped_column(ForeignKey("whole.id")), "other": mapped_column(Integer)}
        type("Part", (Base,), part)
        Base.registry.configure()
        yield whole
    finally:
        Base.registry.dispose()


@pytest.mark.drivers("sqlite")
@pytest.mark.parametrize(
    ("follows", "more", "message"),
    [
        ("parts", {}, "Whole.__version_follows__ is 'parts'; make it a tuple of names of relationships, as ('lines',)"),
        (
            ("id",),
            {},
            (
                "Whole.id, named in __version_follows__, is not a one-to-many relationship; name one, whose objects have a "
                "foreign key to it"
            ),
        ),
        (
            ("parts",),
            {
                "code": lambda: mapped_column(Integer),
                "parts": lambda: relationship(
                    "Part", primaryjoin="foreign(Part.other) == Whole.code", overlaps="whole", viewonly=True
                ),
            },
            (
                "Whole.parts, named in __version_follows__, does not refer to the primary key; only a relationship by it can "
                "be followed"
            ),
        ),
    ],
)
def test_what_cannot_be_followed_is_refused(driver, follows, more, message):
    """V4: where the model is mapped or its relationships are resolved."""
    with pytest.raises(TypeError) as caught, mapped(follows, **more):
        pass
    assert str(caught.value) == message


@pytest.mark.drivers("sqlite")
async def test_a_relationship_that_does_not_exist(driver, versioned):
    """V4: another model's backref may still make it, so it is missed with the first flush."""
    try:
        with mapped(("nothing",)):
            with pytest.raises(TypeError) as caught:
                async with versioned.begin() as unit:
                    unit.session.add(Plain(id=1))
            assert str(caught.value) == (
                "Whole.__version_follows__ names 'nothing', which is not a relationship of it; name one"
            )
    finally:
        _follows._undefined.clear()


async def test_a_session_of_the_units_class_made_by_hand(db, versioned):
    """It belongs to no unit, so nothing is counted in it; it flushes as SQLAlchemy's does."""
    async with versioned.begin() as unit:
        unit.session.add(Customer(id=1))
        kind = type(unit.session.sync_session)

    def add_order():
        with kind(versioned.engine.sync_engine) as session:
            session.add(Order(id=1, customer_id=1))
            session.commit()

    await greenlet_spawn(add_order)
    assert await db.rows("SELECT id, customer_id FROM order_") == [(1, 1)]
    assert await version_of(db, Customer) == 1
