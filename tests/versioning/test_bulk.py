"""ORM statements: each row that an UPDATE changes is counted, in every form that SQLAlchemy has."""

from __future__ import annotations

import asyncio

import pytest
from sqlalchemy import bindparam, delete, event, func, insert, inspect, select, text, update
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.exc import SAWarning
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import aliased

from sqla_uow import errors
from sqla_uow.mixins import expect_version, next_version
from tests.kit.statements import statements
from tests.versioning import tables
from tests.versioning.others import overtake, version_of
from tests.versioning.tables import JoinedChild, OtherAttribute, Plain, SingleChild

FORMS = ["auto", "evaluate", "fetch", False]
MODELS = [
    Plain, tables.ByUUID, tables.ByTimestamp, SingleChild, JoinedChild, OtherAttribute, tables.OtherColumn, tables.Dataclass,
]  # fmt: skip


@pytest.fixture
async def three(versioned):
    """Rows 1, 2 and 3 of each model."""
    async with versioned.begin() as unit:
        for model in MODELS:
            unit.session.add_all([model(id=key) for key in (1, 2, 3)])
    return versioned


@pytest.mark.parametrize("form", FORMS)
async def test_update_where(db, three, form):
    """V3: one count for each row that matched, none for others; what is in memory equals the rows and can be saved."""
    for model in MODELS:
        async with three.begin() as unit:
            rows = [await unit.session.get_one(model, key) for key in (1, 2, 3)]
            before = [row.version for row in rows]
            result = await unit.session.execute(
                update(model).where(model.id <= 2).values(value=model.value + 5),
                execution_options={"synchronize_session": form},
            )
            assert result.rowcount == 2, model
            assert [row.version == old for row, old in zip(rows, before, strict=True)] == [False, False, True], model
            assert [await seen(unit.session, model, key) for key in (1, 2, 3)] == [row.version for row in rows], model
            if form is not False:
                assert [row.value for row in rows] == [5, 5, 0]
            for row in rows:
                row.value = 6
        assert [await version_of(db, model, key) for key in (1, 2, 3)] == [row.version for row in rows], model
        if model.__version_kind__.python_type is int:
            assert [row.version for row in rows] == [3, 3, 2]


async def seen(session, model, key):
    """Return the version of the row as the unit itself sees it."""
    column = inspect(model).version_id_col
    table = column.table
    return await session.scalar(select(column).where(next(iter(table.primary_key)) == key))


@pytest.mark.parametrize("form", FORMS)
async def test_update_of_rows_that_are_not_in_memory(db, three, form):
    """V3: nothing is read for them."""
    for model in MODELS:
        before = await version_of(db, model, 2)
        async with three.begin() as unit:
            statement = update(model).where(model.value == 0, model.id > 1).values(value=1)
            result = await unit.session.execute(statement, execution_options={"synchronize_session": form})
            assert result.rowcount == 2
        assert await version_of(db, model, 2) != before
        assert await version_of(db, model, 1) == (await fresh(three, model)).version
        async with three.engine.connect() as connection:
            assert await connection.scalar(select(func.sum(model.value)).select_from(inspect(model).local_table)) == 2


async def fresh(manager, model):
    """Return row 1, loaded in a unit of its own."""
    async with manager.begin(read_only=True) as unit:
        return await unit.session.get_one(model, 1)


async def test_update_returning(db, three):
    """V3: RETURNING gives the new version, of columns and of whole objects."""
    if db.family == "mysql":  # MariaDB has no UPDATE ... RETURNING
        return
    for model in (Plain, SingleChild, tables.ByUUID):
        async with three.begin() as unit:
            loaded = await unit.session.get_one(model, 1)
            versions = await unit.session.execute(update(model).values(value=3).returning(model.id, model.version))
            found = {row.id: row.version for row in versions}
            assert loaded.version == found[1]
            objects = (await unit.session.scalars(update(model).values(value=4).returning(model))).all()
            assert loaded in objects
            assert {row.value for row in objects} == {4}
            for row in objects:
                assert row.version == await seen(unit.session, model, row.id) != found[row.id]
                row.value = 5
    async with three.begin() as unit:
        result = await unit.session.execute(update(JoinedChild).values(value=3).returning(JoinedChild.id))
        assert sorted(result.scalars()) == [1, 2, 3]
    assert await version_of(db, JoinedChild, 3) == 2


async def test_a_joined_child_counts_in_the_parents_table(db, three):
    """V3: only the rows that matched, with criteria on the parent, the child or both, and never a cartesian UPDATE."""
    async with three.begin() as unit:
        await unit.session.execute(update(tables.Joined).where(tables.Joined.id == 1).values(name="x"))
    assert await db.rows("SELECT version FROM joined ORDER BY id") == [(2,), (1,), (1,)]
    sent = statements(three.engine, lambda one: "UPDATE" in one and not one.startswith("SELECT"))
    async with three.begin() as unit:
        statement = update(JoinedChild).where(JoinedChild.id >= 2).values(value=JoinedChild.value + 7)
        assert (await unit.session.execute(statement)).rowcount == 2
    assert await db.rows("SELECT value FROM joined_child ORDER BY id") == [(0,), (7,), (7,)]
    assert await db.rows("SELECT version FROM joined ORDER BY id") == [(2,), (2,), (2,)]
    assert len(sent) == (2 if db.family == "sqlite" else 1)
    async with three.begin() as unit:
        statement = update(JoinedChild).where(JoinedChild.id.in_([2, 9])).values(value=bindparam("much"))
        assert (await unit.session.execute(statement, {"much": 8})).rowcount == 1
    assert await db.rows("SELECT version FROM joined ORDER BY id") == [(2,), (3,), (2,)]


async def test_other_forms_of_update(db, three):
    """V3: values of the call, of a dict, ordered ones, an alias, many parameter sets, scalars()."""
    async with three.begin() as unit:
        session = unit.session
        await session.execute(update(Plain).where(Plain.id == 1), {"value": 1})
        assert await seen(session, Plain, 1) == 2
        await session.execute(update(Plain).where(Plain.id == 1).values({Plain.value: 2, "other": 1}))
        assert await seen(session, Plain, 1) == 3
        ordered = update(Plain).where(Plain.id == 1).ordered_values((Plain.value, 4), (Plain.other, Plain.value))
        await session.execute(ordered)
        assert await seen(session, Plain, 1) == 4
        many = update(Plain).where(Plain.id == bindparam("which")).values(value=bindparam("much"))
        await session.execute(
            many,
            [{"which": 1, "much": 5}, {"which": 2, "much": 6}],
            execution_options={"dml_strategy": "orm", "synchronize_session": False},
        )
        assert [await seen(session, Plain, key) for key in (1, 2, 3)] == [5, 2, 1]
        if db.family != "mysql":
            await session.scalars(update(Plain).where(Plain.id == 3).values(value=1).returning(Plain.id))
            assert await seen(session, Plain, 3) == 2
        other = aliased(Plain)
        await session.execute(
            update(other).where(other.id == 2).values(value=7), execution_options={"synchronize_session": False}
        )
        assert await seen(session, Plain, 2) == 3
    assert await db.scalar("SELECT value FROM plain WHERE id = 2") == 7


async def test_a_list_by_primary_key(db, three):
    """V3: the version in the list is the one expected; a row without one is counted unchecked; memory equals the rows."""
    for model in MODELS:
        async with three.begin() as unit:
            rows = [await unit.session.get_one(model, key) for key in (1, 2)]
            before = [row.version for row in rows]
            await unit.session.execute(
                update(model),
                [{"id": 1, "value": 1, "version": before[0]}, {"id": 2, "value": 2}, {"id": 3, "value": 3}],
            )
            assert [row.version == old for row, old in zip(rows, before, strict=True)] == [False, False], model
            assert [row.value for row in rows] == [1, 2]
            for row in rows:
                assert row.version == await seen(unit.session, model, row.id), model
                row.value += 1
        assert [await version_of(db, model, key) for key in (1, 2)] == [row.version for row in rows], model


async def test_a_stale_row_in_a_list(db, three):
    """V3, V2: named, before anything is written, and not retried."""
    for model in (Plain, JoinedChild):
        with pytest.raises(errors.StaleVersionError) as caught:
            async with three.begin() as unit:
                await unit.session.execute(
                    update(model), [{"id": 1, "value": 9, "version": 1}, {"id": 2, "value": 9, "version": 5}]
                )
        assert str(caught.value) == (
            f"{model.__name__}(2) is at version 1 where 5 was expected; read it again, and let the client decide"
        )
        with pytest.raises(errors.StaleVersionError) as caught:
            async with three.begin() as unit:
                await unit.session.execute(update(model), [{"id": 1, "value": 9}, {"id": 7, "value": 9}])
        assert str(caught.value) == (
            f"{model.__name__}(7) is gone where it was to be written; read it again, and let the client decide"
        )
        with pytest.raises(TypeError, match="is of type int, but '1' was expected"):
            async with three.begin() as unit:
                await unit.session.execute(update(model), [{"id": 1, "value": 9, "version": "1"}])
        assert (await fresh(three, model)).value == 0


@pytest.mark.parametrize("form", ["auto", "fetch", False])
async def test_a_stale_object_stays_stale(db, three, form):
    """V3: an UPDATE counts on top of somebody else's change; an object in memory must not pass for that."""
    for model in (Plain, tables.ByUUID, JoinedChild):
        with pytest.raises(errors.StaleVersionError):
            async with three.begin(isolation="SERIALIZABLE" if db.family == "sqlite" else "READ COMMITTED") as unit:
                row = await unit.session.get_one(model, 1)
                await overtake(db, unit.session, model)
                await unit.session.execute(
                    update(model).where(model.id == 1).values(value=model.value + 1),
                    execution_options={"synchronize_session": form},
                )
                row.value = 50
        for key in (1, 2):
            assert await db.scalar(f"SELECT value FROM {inspect(model).local_table.name} WHERE id = {key}") == 0


async def test_expectations_and_statements(db, three):
    """V2, V3: an expected row is compared before a statement that says nothing of versions; its own count moves it on."""
    async with three.begin() as unit:
        row = await unit.session.get_one(Plain, 1)
        expect_version(row, 1)
        await unit.session.execute(update(Plain).values(value=1))
        assert row.version == 2
        row.value = 2
    assert await version_of(db, Plain) == 3
    for statement in (update(Plain).values(value=7), delete(Plain)):
        with pytest.raises(errors.StaleVersionError) as caught:
            async with three.begin(isolation="SERIALIZABLE" if db.family == "sqlite" else "READ COMMITTED") as unit:
                row = await unit.session.get_one(Plain, 1)
                expect_version(row, row.version)
                await overtake(db, unit.session, Plain)
                await unit.session.execute(statement)
        assert caught.value.model is Plain
    async with three.begin() as unit:
        row = await unit.session.get_one(Plain, 1)
        expect_version(row, row.version)
        await unit.session.execute(delete(Plain).where(Plain.id == 1))
    assert await version_of(db, Plain) is None


async def test_a_savepoint_gives_back_what_a_statement_counted(db, three):
    """V3, V5: readable without an await, and equal to the row."""
    for model in (Plain, tables.ByUUID, JoinedChild):
        async with three.begin() as unit:
            row = await unit.session.get_one(model, 1)
            before = row.version
            with pytest.raises(KeyError):
                async with unit.session.begin_nested():
                    await unit.session.execute(update(model).values(value=7))
                    assert row.version != before
                    raise KeyError
            assert row.version == before
            row.value = 8
        assert await version_of(db, model) == row.version != before


async def test_setting_the_version_is_refused(three):
    """V3: in values(), by name, attribute or parameter, under either name."""
    message = (
        "an UPDATE of {} sets its version, which is counted by itself; leave it out, or compare with it in where()"
    )
    async with three.begin() as unit:
        for statement in (
            update(Plain).values(version=5),
            update(Plain).values({Plain.version: Plain.version + 1}),
            update(Plain).ordered_values((Plain.value, 1), (Plain.version, 1)),
        ):
            with pytest.raises(TypeError) as caught:
                await unit.session.execute(statement)
            assert str(caught.value) == message.format("Plain")
        with pytest.raises(TypeError):
            await unit.session.execute(update(Plain), {"version": 5})
        for attribute in ("rev", "version"):
            with pytest.raises(TypeError):
                await unit.session.execute(update(OtherAttribute).values({attribute: 5}))
        await unit.session.execute(update(Plain).where(Plain.version == 1).values(value=1))
        assert await seen(unit.session, Plain, 1) == 2


UPSERTS = {"sqlite": sqlite.insert, "postgresql": postgresql.insert, "mysql": mysql.insert}


async def test_an_upsert_counts_with_the_helper(db, three):
    """V3: next_version() is what it has to set."""
    for model in (Plain, tables.ByUUID, tables.ByTimestamp, tables.OtherColumn):
        before = await version_of(db, model, 1)
        statement = UPSERTS[db.family](model).values([{"id": 1, "value": 5}, {"id": 4, "value": 5}])
        if db.family == "mysql":
            statement = statement.on_duplicate_key_update(value=6, **next_version(model))
        else:
            statement = statement.on_conflict_do_update(index_elements=["id"], set_={"value": 6, **next_version(model)})
        async with three.begin() as unit:
            await unit.session.execute(statement)
        assert await version_of(db, model, 1) != before
        assert await version_of(db, model, 4) is not None
        async with three.begin() as unit:
            (await unit.session.get_one(model, 4)).value = 9
    assert next_version(tables.ByXmin) == {}
    with pytest.raises(TypeError, match="which has no version; give the model a mixin"):
        next_version(db.__class__)


async def test_nothing_matches(db, three):
    """V3: nothing is counted, with objects in memory or a list that is empty by its criteria."""
    async with three.begin() as unit:
        rows = [await unit.session.get_one(model, 1) for model in (Plain, JoinedChild)]
        for model in (Plain, JoinedChild):
            assert (await unit.session.execute(update(model).where(model.value == 99).values(value=1))).rowcount == 0
        listed = update(Plain).where(Plain.value == 99)
        with pytest.warns(SAWarning, match="versioning cannot be verified"):  # SQLAlchemy's, of any list with a WHERE
            await unit.session.execute(
                listed, [{"id": 1, "value": 1}, {"id": 77, "value": 1}], execution_options={"synchronize_session": None}
            )
        assert [row.version for row in rows] == [1, 1]
    assert await db.rows("SELECT version FROM plain UNION SELECT version FROM joined") == [(1,)]


async def test_inserts_are_left_alone(db, three):
    """V3: their rows begin at the first version."""
    async with three.begin() as unit:
        await unit.session.execute(insert(Plain), [{"id": 10, "value": 1}, {"id": 11, "value": 1}])
        await unit.session.execute(insert(Plain).values(id=12, value=1, other=0))
    assert await db.rows("SELECT version FROM plain WHERE id >= 10") == [(1,)] * 3


async def test_other_sessions_are_left_alone(db, three):
    """V3: the hook is the unit's own session class's; outside a unit SQLAlchemy is what it was."""
    async with AsyncSession(three.engine) as session, session.begin():
        await session.execute(update(Plain).values(value=1))
    assert await db.rows("SELECT version FROM plain") == [(1,)] * 3


@pytest.mark.drivers("asyncpg", "psycopg")
async def test_xmin_counts_by_itself(db, versioned):
    """V3: the row's last transaction, whatever wrote it; also for a statement of the unit itself."""
    async with versioned.begin() as unit:
        unit.session.add(tables.ByXmin(id=1))
    async with versioned.begin() as unit:
        row = await unit.session.get_one(tables.ByXmin, 1)
        before = row.version
        await unit.session.execute(update(tables.ByXmin).values(value=1))
        assert row.version != before
        row.value = 2
    async with versioned.begin() as unit:
        row = await unit.session.get_one(tables.ByXmin, 1)
        await unit.session.execute(update(tables.ByXmin), [{"id": 1, "value": 4, "version": row.version}])
        assert row.version == await unit.session.scalar(text("SELECT xmin::text::int FROM by_xmin"))


@pytest.mark.drivers("asyncpg", "psycopg")
async def test_rows_that_were_waited_for_are_looked_at_again(db, three):
    """V3: on PostgreSQL the child's row is changed by somebody else, past the ORM, while the statement waits for it."""

    async def add_ten(limit):
        async with three.begin(isolation="READ COMMITTED") as unit:
            statement = update(JoinedChild).where(JoinedChild.value < limit).values(value=JoinedChild.value + 10)
            return (await unit.session.execute(statement)).rowcount

    for limit, matched, value in ((1, 0, 3), (4, 3, 13)):
        async with db.outside() as other:
            await other.execute(text("UPDATE joined_child SET value = 3"))
            task = asyncio.create_task(add_ten(limit))
            await db.until_waiting()
            await other.commit()
        assert await task == matched
        assert await db.rows("SELECT value FROM joined_child ORDER BY id") == [(value,)] * 3


@pytest.mark.parametrize("synchronize", ["auto", False])
async def test_an_object_that_is_forgotten_meanwhile(db, three, synchronize):
    """V3: the row counts; nobody needs the version in memory any more, whoever would have counted it there."""
    held = []

    @event.listens_for(three.engine.sync_engine, "before_cursor_execute")
    def forget(_connection, _cursor, statement, *_rest):
        if "UPDATE" in statement:
            held.clear()

    async with three.begin() as unit:
        held.append(await unit.session.get_one(Plain, 1))
        statement = update(Plain).where(Plain.id == 1).values(value=5)
        await unit.session.execute(statement, execution_options={"synchronize_session": synchronize})
        assert not held
    assert await version_of(db, Plain, 1) == 2


async def test_a_delete_where_no_version_was_seen(db, versioned):
    """V5: it is SQLAlchemy's own."""
    async with versioned.begin() as unit:
        await unit.session.execute(insert(Plain).values(id=1))
    async with versioned.begin() as unit:
        await unit.session.execute(delete(Plain))
    assert await db.scalar("SELECT count(*) FROM plain") == 0
