"""V7: a statement on a versioned model does what it does on a twin without a version, and leaves right versions in memory."""

from __future__ import annotations

import warnings

import pytest
from sqlalchemy import delete, event, inspect, select
from sqlalchemy.exc import SAWarning
from sqlalchemy.orm import with_loader_criteria

from sqla_uow import UnitOfWorkManager, errors
from sqla_uow.mixins import Versioned, VersionedByTimestamp, VersionedByUUID, VersionedByXmin, next_version
from tests.kit.databases import ONE_OF_EACH
from tests.versioning.others import FRESH
from tests.versioning.twins import CASES, rows_of, twins

PLAIN = twins(prefix="plain_")
PLAIN.next_version = lambda _: {}
KINDS = {
    "integer": twins(Versioned, prefix="v_"),
    "uuid": twins(VersionedByUUID, prefix="u_"),
    "timestamp": twins(VersionedByTimestamp, prefix="t_"),
    "xmin": twins(VersionedByXmin, prefix="x_"),
}
for versioned in KINDS.values():
    versioned.next_version = next_version


class Outcome:
    """What a statement did: to the caller, and to the rows."""

    def __init__(self):
        self.refusal = None
        self.result = None
        self.rows = None


@pytest.mark.drivers(*ONE_OF_EACH)
@pytest.mark.parametrize("kind_of_version", KINDS)
@pytest.mark.timeout(600)
async def test_a_statement_and_its_twin(db, subtests, kind_of_version):
    """V6, V7: same rows, same result, same refusal; versions in memory are the rows', and can be written with."""
    if kind_of_version == "xmin" and db.family != "postgresql":
        return
    versioned = KINDS[kind_of_version]
    manager = await made(db, PLAIN, versioned)
    for case in CASES if kind_of_version == "integer" else CASES[::3]:
        if db.family not in case.families:
            continue
        with subtests.test(case.name):
            expected = await run(manager, case, PLAIN)
            got = await run(manager, case, versioned)
            if case.stale:
                assert got.refusal is errors.StaleDataError
                continue
            assert got.refusal == expected.refusal
            assert got.result == expected.result
            if not case.undefined:
                assert got.rows == expected.rows
            if expected.refusal is None:
                await right_in_memory(manager, case, versioned)
                if db.family != "sqlite":  # where nobody else writes meanwhile
                    await nothing_is_lost(db, manager, case, versioned)


async def made(db, *families):
    """Make the tables of these models."""
    engine = db.engine()
    async with engine.begin() as connection:
        for family in families:
            await connection.run_sync(family.Base.metadata.create_all)
    return UnitOfWorkManager(engine)


async def start(manager, m):
    """Have the rows that each statement begins with, and no others."""
    async with manager.engine.begin() as connection:
        for table in reversed(m.Base.metadata.sorted_tables):
            await connection.execute(delete(table))
    async with manager.begin() as unit:
        unit.session.add_all(rows_of(m))


async def load(session, m):
    """Load everything, the children through their parents, as a query of a list does."""
    found = []
    for model in (m.Doc, m.Item, m.Key):
        found += await session.scalars(select(model).order_by(*inspect(model).primary_key))
    for part in await session.scalars(select(m.Part)):
        assert part in found
    return found


async def execute(session, case, m):
    """Execute the statement, in an event if the case says so; what it returns, or None in an event."""
    statement = case.of(m)
    if case.event is None:
        result = await session.execute(statement, case.params, execution_options=case.options)
        if not hasattr(result, "rowcount"):  # nothing was sent
            return None
        if result.returns_rows:
            return sorted(tuple(getattr(value, "id", value) for value in row) for row in result)
        return result.rowcount
    if case.event == "do_orm_execute":

        def criteria(state):
            state.statement = state.statement.options(with_loader_criteria(m.Part, m.Part.size < 5))

        event.listen(session.sync_session, "do_orm_execute", criteria, once=True)
        return (await session.execute(statement)).rowcount

    def listener(*arguments):
        where = arguments[0] if "flush" in case.event else session.sync_session
        where.execute(statement, case.params)

    if "flush" in case.event:
        event.listen(session.sync_session, case.event, listener, once=True)
        session.add(m.Doc(id=20, name="new"))
        await session.flush()
        return None
    event.listen(m.Doc, case.event, listener)
    try:
        session.add(m.Doc(id=20, name="new"))
        await session.flush()
    finally:
        event.remove(m.Doc, case.event, listener)
    return None


async def run(manager, case, m):
    """Do it to fresh rows with all of them in memory, and look at the rows afterwards."""
    await start(manager, m)
    outcome = Outcome()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SAWarning)  # SQLAlchemy's of products of tables, on the twin
        try:
            async with manager.begin() as unit:
                kept = await load(unit.session, m)
                outcome.result = await execute(unit.session, case, m)
                del kept
        except Exception as error:  # noqa: BLE001  # whatever it is, it is to be the same
            outcome.refusal = refusal(error)
    outcome.rows = await rows(manager, m)
    return outcome


def refusal(error):
    """Return what kind of an error it is; a stale version is the same however it was found."""
    return errors.StaleDataError if isinstance(error, errors.StaleDataError) else type(error)


async def rows(manager, m):
    """Return all rows but for the versions, by the table's name without its prefix."""
    found = {}
    async with manager.engine.connect() as connection:
        for table in m.Base.metadata.sorted_tables:
            columns = [column for column in table.columns if "sqla_uow.version" not in column.info]
            selected = await connection.execute(select(*columns))
            found[table.name.partition("_")[2]] = sorted(map(repr, map(tuple, selected)))
    return found


async def versions_in(connection, m):
    """Return the versions of the rows, by model's table and key."""
    found = {}
    for model in (m.Doc, m.Item, m.Key):
        mapper = inspect(model)
        selected = await connection.execute(select(mapper.version_id_col, *mapper.primary_key))
        found.update({(mapper.local_table.name, *row[1:]): row[0] for row in selected})
    return found


def place(instance):
    """Return where the version of an object is to be found in what `versions_in` returns."""
    state = inspect(instance)
    return (state.mapper.version_id_col.table.name, *state.identity)


async def right_in_memory(manager, case, m):
    """V6: memory holds the rows' versions; those that changed are counted, each once, and can be written."""
    await start(manager, m)
    async with manager.begin() as unit:
        loaded = await load(unit.session, m)
        before = await versions_in(await unit.session.connection(), m)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SAWarning)
            result = await execute(unit.session, case, m)
        after = await versions_in(await unit.session.connection(), m)
        there = [each for each in loaded if inspect(each).persistent and place(each) in after]
        for each in there:
            assert each.version == after[place(each)], (each.__class__.__name__, place(each))
        counted = [key for key in before if before[key] != after.get(key)]
        updates = case.event is None and case.of(m).is_update
        if updates and isinstance(result, int) and result >= 0 and not (isinstance(case.params, list) and case.params):
            assert len(counted) == result
        for each in there:
            each.other += 1
        await unit.session.flush()


async def nothing_is_lost(db, manager, case, m):
    """V6: what another transaction has changed before the statement, or behind it, is never overwritten."""
    changed = inspect(case.of(m).entity_description["entity"]).mapper
    for model, key in ((m.Doc, (1,)), (m.Doc, (3,)), (m.Item, (3,)), (m.Item, (5,)), (m.Key, ("abc", 2))):
        if not changed.isa(inspect(model)):
            continue
        await start(manager, m)
        column, table = inspect(model).version_id_col, model.__table__
        is_key = [own == value for own, value in zip(table.primary_key, key, strict=True)]
        values = {"other": table.c.other + 100}
        if m is not KINDS["xmin"]:
            values[column.name] = FRESH[column.info["sqla_uow.version"]](column)
        try:
            async with manager.begin(isolation="READ COMMITTED") as unit:
                loaded = await load(unit.session, m)
                async with db.outside() as connection:
                    await connection.execute(table.update().where(*is_key).values(values))
                    await connection.commit()
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", SAWarning)
                    await execute(unit.session, case, m)
                for each in loaded:
                    if isinstance(each, model) and inspect(each).identity == key and inspect(each).persistent:
                        each.other = 1
        except errors.ConflictError:
            pass
        async with db.outside() as connection:
            found = (await connection.scalars(select(table.c.other).where(*is_key))).all()
        assert found in ([], [100]), (model.__name__, key)
