"""The record of a key is there if, and only if, the work is."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from datetime import timedelta

import pytest
from sqlalchemy import MetaData, text
from sqlalchemy.exc import DBAPIError

from sqla_uow import UnitOfWorkManager, current_session, current_unit, errors, transactional
from sqla_uow.idempotency import IdempotencyKeys
from tests.kit.models import Account
from tests.kit.waiting import until

KEPT = {
    "postgresql": "extract(epoch FROM expires_at - created_at)",
    "mysql": "timestampdiff(MICROSECOND, created_at, expires_at) / 1000000",
    "sqlite": "round((julianday(expires_at) - julianday(created_at)) * 86400)",
}
"""Seconds."""
LONG_AGO = "'2020-01-01 00:00:00.000000'"


async def add_one():
    """Do work."""
    account = await current_session().get_one(Account, 1)
    account.balance += 1


def handler(keys, **options):
    """Return a consumer that works a message once, and says whether it did."""

    @transactional(**options)
    async def handle(key, **claim):
        if not await keys.claim("orders", key, **claim):
            return False
        await add_one()
        return True

    return handle


async def records(db):
    """Return how many records are committed."""
    return await db.scalar("SELECT count(*) FROM uow_idempotency")


async def test_a_message_that_comes_again_is_not_worked_again(manager, keys, balance):
    """The first one is, whatever other keys and spaces there are."""
    handle = handler(keys)
    assert [await handle(key) for key in ("a", "A", "a", "b", "a ", "b")] == [True, True, False, True, True, False]
    async with manager.begin():
        assert await keys.claim("payments", "a")
        assert await keys.claim("ord", "ersa")
    assert await balance() == 4


async def test_a_rollback_takes_the_record_along(db, manager, keys, balance):
    """The key is free again, as if nothing had happened."""
    handle = handler(keys)

    @transactional
    async def fail():
        await handle("a")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail()
    assert (await records(db), await balance()) == (0, 0)
    assert await handle("a")
    assert (await records(db), await balance()) == (1, 1)


async def test_a_savepoint_takes_its_record_along(db, manager, keys):
    """A claim in a part that is rolled back alone is gone with it."""

    @transactional(propagation="nested")
    async def part():
        assert await keys.claim("orders", "a")
        raise ZeroDivisionError

    async with manager.begin():
        with contextlib.suppress(ZeroDivisionError):
            await part()
        assert await keys.claim("orders", "b")
    async with manager.begin():
        assert await keys.claim("orders", "a")
        assert not await keys.claim("orders", "b")


async def test_a_second_claim_in_one_unit_is_a_repetition(manager, keys, balance):
    """A batch may have a message twice."""

    @transactional
    async def batch(*names):
        for name in names:
            if await keys.claim("orders", name):
                await add_one()

    await batch("a", "b", "a", "a")
    assert await balance() == 2


@pytest.mark.drivers("asyncpg", "psycopg", "asyncmy", "aiomysql")
async def test_a_message_that_is_being_worked_elsewhere(manager, keys, balance):
    """It is a conflict at once, that holds no connection: the broker is to deliver it again."""
    handle = handler(keys)
    async with manager.begin():
        assert await keys.claim("orders", "a")
        await add_one()
        with pytest.raises(errors.ConflictError) as told:
            await asyncio.create_task(in_no_unit(handle, "a"))
        assert told.value.reason == "lock timeout"
        assert manager.engine.pool.checkedout() == 1
    assert not await handle("a")
    assert await balance() == 1


async def in_no_unit(function, *args):
    """Call a function where the unit around it does not count."""
    return await transactional(propagation="requires_new")(function)(*args)


@pytest.mark.drivers("asyncpg", "psycopg", "asyncmy", "aiomysql")
async def test_a_unit_with_retries_waits_for_the_other(manager, keys, balance):
    """It is run again as for a row's lock, and finds that the work is done."""
    handle = handler(keys, retries=50)
    claimed, go_on = asyncio.Event(), asyncio.Event()

    async def first():
        async with manager.begin():
            await keys.claim("orders", "a")
            claimed.set()
            await go_on.wait()
            await add_one()

    working = asyncio.create_task(first())
    await claimed.wait()
    repeating = asyncio.create_task(handle("a"))
    await until(lambda: manager.statistics().retries)
    go_on.set()
    await working
    assert not await repeating
    assert await balance() == 1


@pytest.mark.drivers("asyncpg", "psycopg", "asyncmy", "aiomysql")
async def test_a_key_whose_connection_dies_is_free_at_once(db, manager, keys, balance):
    """The server rolls back, and nothing is left to expire."""
    handle = handler(keys, retries=20)
    async with manager.begin() as unit:
        await keys.claim("orders", "a")
        await db.kill(unit.session)
        assert await asyncio.wait_for(in_no_unit(handle, "a"), 5)
        unit.doom()
    assert await balance() == 1


@pytest.mark.drivers("sqlite")
async def test_on_sqlite_a_repetition_waits_for_its_turn_to_write(manager, keys, balance):
    """There is one writer at a time, and the second one finds the record."""
    handle = handler(keys)
    assert sorted(await asyncio.gather(*(handle("a") for _ in range(5)))) == [False, False, False, False, True]
    assert await balance() == 1


async def test_a_key_for_other_work(manager, keys, balance):
    """It is refused if both claims say what they are for."""
    handle = handler(keys)
    assert await handle("a", fingerprint=b"5 EUR")
    assert not await handle("a", fingerprint=b"5 EUR")
    assert not await handle("a")
    with pytest.raises(errors.KeyReusedError, match=r"^a key of 'orders' was used before with another fingerprint; "):
        await handle("a", fingerprint=b"6 EUR")
    assert await handle("b")
    assert not await handle("b", fingerprint=b"5 EUR")
    assert await balance() == 2


async def test_an_expired_record_counts_as_none(db, manager, keys, balance):
    """The claim itself takes it over, with all that it says; nobody has to clean up before."""
    handle = handler(keys)
    assert await handle("a", keep=timedelta(milliseconds=1), fingerprint=b"5 EUR")
    await asyncio.sleep(0.01)
    assert await handle("a", fingerprint=b"6 EUR")
    assert not await handle("a", fingerprint=b"6 EUR")
    with pytest.raises(errors.KeyReusedError):
        await handle("a", fingerprint=b"5 EUR")
    assert (await records(db), await balance()) == (1, 2)


async def test_a_record_that_was_taken_over_is_all_new(db, manager, keys):
    """Nothing of the old one is left: neither its times nor its result."""
    handle = handler(keys)
    await handle("a")
    await db.run(
        f"UPDATE uow_idempotency SET status = 200, result = 'x', expires_at = {LONG_AGO}, created_at = {LONG_AGO}"
    )
    await handle("a", keep=timedelta(days=400))
    ((seconds, status, result),) = await db.rows(f"SELECT {KEPT[db.family]}, status, result FROM uow_idempotency")
    assert (float(seconds), status, result) == (400 * 86400, None, None)


async def test_how_long_a_record_is_kept(db, manager, keys):
    """What is said at the claim, else what is said of all keys; to the microsecond where the database knows those."""
    async with manager.begin():
        await keys.claim("orders", "a")
        await keys.claim("orders", "b", keep=timedelta(days=400))
    rows = await db.rows(f"SELECT {KEPT[db.family]} FROM uow_idempotency ORDER BY 1")
    assert [float(row[0]) for row in rows] == [86400, 400 * 86400]


@pytest.mark.parametrize("where", ["unit", "scope"])
async def test_a_unit_that_only_reads(manager, keys, where):
    """It can claim nothing, and says so before the database does."""
    opening = manager.begin(read_only=True) if where == "unit" else manager.scope()
    async with opening:
        with pytest.raises(errors.ReadOnlyError, match="an idempotency key was claimed"):
            await keys.claim("orders", "a")


async def test_no_unit(manager, keys):
    """A record without work would be a promise that nobody keeps."""
    with pytest.raises(errors.NoUnitError):
        await keys.claim("orders", "a")


@pytest.mark.parametrize(
    ("space", "key", "error"),
    [("", "a", ValueError), ("x" * 101, "a", ValueError), ("orders", "", ValueError), ("orders", 5, TypeError)],
)
async def test_what_is_no_key(manager, keys, space, key, error):
    """It is refused where it is given."""
    async with manager.begin():
        with pytest.raises(error, match=r"^an idempotency (space|key) "):
            await keys.claim(space, key)


async def test_keys_of_any_length_and_script(manager, keys):
    """Only a digest is stored."""
    handle = handler(keys)
    names = ["x" * 10_000, "x" * 10_001, "Grün", "Gru\u0308n", "\0", "a\0", "\udcff", "%s :x", "\\"]
    assert [await handle(name) for name in names] == [True] * len(names)
    assert not any([await handle(name) for name in names])


async def test_the_time_limit_of_a_unit_stays(manager, keys):
    """A claim is sent in its own way, also where each statement is given what is left of a deadline."""
    assert await handler(keys, timeout=5)("a")
    assert not await handler(keys, timeout=5)("a")


async def test_a_table_that_is_missing(db, manager, caplog):
    """The database's error reaches the caller, and the log says what to do."""
    caplog.set_level(logging.ERROR, "sqla_uow")
    keys = IdempotencyKeys(MetaData(), name="nowhere")
    with pytest.raises(DBAPIError):
        await handler(keys)("a")
    (told,) = [record.getMessage() for record in caplog.records if "nowhere" in record.getMessage()]
    assert "make it by a migration, which 'alembic revision --autogenerate' writes" in told


@pytest.mark.drivers("asyncpg", "psycopg", "asyncmy", "aiomysql")
async def test_a_table_in_a_schema_of_its_own(db):
    """It is found where the manager's engine leads it."""
    schema = "other" if db.family == "postgresql" else f"{db.name}_other"
    metadata = MetaData(schema="per_tenant")
    keys = IdempotencyKeys(metadata, name="odd:name")
    engine = db.engine(execution_options={"schema_translate_map": {"per_tenant": schema}})
    await db.run(f"CREATE SCHEMA {schema}")
    try:
        async with engine.begin() as connection:
            await connection.run_sync(metadata.create_all)
        with UnitOfWorkManager(engine).activate() as manager:
            async with manager.begin():
                assert await keys.claim("orders", "a")
            async with manager.begin():
                assert not await keys.claim("orders", "a")
        quote = '"' if db.family == "postgresql" else "`"
        assert await db.scalar(f"SELECT count(*) FROM {schema}.{quote}odd\\:name{quote}") == 1
    finally:
        await engine.dispose()
        await db.run(f"DROP SCHEMA {schema}" + (" CASCADE" if db.family == "postgresql" else ""))


async def test_another_manager_than_the_default(db, keys):
    """`using` says in whose units the keys are."""
    metadata = MetaData()
    manager = UnitOfWorkManager(db.engine(), name="second")
    for using in ("second", manager):
        theirs = IdempotencyKeys(MetaData(), using=using)
        with manager.activate():
            async with manager.begin():
                assert current_unit("second").session is not None
                assert await theirs.claim("orders", str(using)[:10])
    assert metadata.tables == {}
    assert await records(db) == 2


async def test_a_swallowed_conflict_is_no_success(manager, keys, db):
    """Whoever goes on without the key cannot commit."""
    if db.family == "sqlite":
        pytest.skip("its claim waits for the writer")
    async with manager.begin():
        await keys.claim("orders", "a")

        @transactional(propagation="requires_new")
        async def careless():
            with contextlib.suppress(errors.ConflictError):
                await keys.claim("orders", "a")
            with contextlib.suppress(errors.RollbackOnlyError):
                await current_session().execute(text("INSERT INTO account (id, balance) VALUES (2, 0)"))

        with pytest.raises(errors.ConflictError):
            await careless()
    assert await db.scalar("SELECT count(*) FROM account") == 1


@pytest.mark.drivers("asyncmy", "aiomysql")
async def test_mysql_is_refused(db, keys):
    """It has no RETURNING, so a claim could not tell whose the row is."""
    manager = UnitOfWorkManager(db.engine())
    with manager.activate():
        async with manager.begin() as unit:
            await unit.session.connection()
        manager.engine.dialect.is_mariadb = False  # what SQLAlchemy finds out of a MySQL, which the tests have none of
        with pytest.raises(
            NotImplementedError, match=r"^idempotency keys were used on mysql, .*; use PostgreSQL, MariaDB"
        ):
            await handler(keys)("a")
