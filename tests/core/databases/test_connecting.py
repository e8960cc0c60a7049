"""What happens before there is a connection: refused, full, locked out."""

from __future__ import annotations

import contextlib
import logging
import secrets
import traceback

import pytest
from sqlalchemy import text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from sqla_uow import RetryPolicy, Status, UnitOfWorkManager, current_session, current_unit, errors, transactional
from tests.kit.models import Note
from tests.kit.waiting import until
from tests.servers import PostgreSQL, Proxy
from tests.servers.pgbouncer import PgBouncer

pytestmark = pytest.mark.drivers("asyncpg", "psycopg", "asyncmy", "aiomysql")
CODES = {"asyncpg": None, "psycopg": None, "asyncmy": "2003", "aiomysql": "2003"}


@pytest.fixture
def proxy(db):
    """Provide a place before the server that can refuse."""
    with Proxy("127.0.0.1", db.port) as proxy:
        yield proxy


@pytest.fixture
async def engine(db, proxy):
    """Provide an engine that goes through the proxy, and is disposed of while it still can say goodbye."""
    engine = db.engine(port=proxy.port)
    yield engine
    await engine.dispose()


def writer(runs, **options):
    """Make a function that writes one row."""

    @transactional(**options)
    async def work():
        runs.append(1)
        current_session().add(Note(text="written"))

    return work


def doing(action):
    """Make a policy that does something instead of waiting."""

    async def sleep(_seconds):
        action()

    return RetryPolicy(sleep=sleep)


async def test_a_refused_connection_is_retried_to_success(db, engine, proxy, caplog):
    """R2, T45: asyncpg raises a bare OSError; it is 'not started', on every driver."""
    caplog.set_level(logging.INFO, "sqla_uow")
    runs = []
    proxy.refuse()
    with UnitOfWorkManager(engine).activate():
        await writer(runs, retries=1, retry=doing(proxy.accept))()
    assert len(runs) == 2
    assert await db.rows("SELECT text FROM note") == [("written",)]
    assert "failed (not started" in caplog.text


async def test_a_server_that_stays_away_is_a_conflict_error(db, engine, proxy):
    """T45: never a bare OSError; the driver's own is the cause."""
    proxy.refuse()
    with UnitOfWorkManager(engine).activate(), pytest.raises(errors.ConflictError) as caught:
        await writer([], retries=2, retry=doing(lambda: None))()
    assert (caught.value.attempts, caught.value.reason, caught.value.code) == (3, "not started", CODES[db.driver])
    spelled = " ".join(filter(None, ("not started", CODES[db.driver])))
    assert f", last by {spelled}; call it again later" in str(caught.value)
    assert isinstance(caught.value.__cause__, OSError | DBAPIError)


@pytest.mark.direct("the pooler has whom the server would refuse wait")
async def test_too_many_connections_is_retried_to_success(db, caplog):
    """R2: 53300 and 1040 are 'not started'; psycopg gives no code at connect, and needs none."""
    caplog.set_level(logging.INFO, "sqla_uow")
    runs = []
    async with full(db) as (url, make_room):
        engine = db.engine(url=url)
        with UnitOfWorkManager(engine).activate():
            await writer(runs, retries=1, retry=RetryPolicy(sleep=make_room))()
        await engine.dispose()
    code = {"asyncpg": " 53300", "psycopg": "", "asyncmy": " 1040", "aiomysql": " 1040"}[db.driver]
    assert f"failed (not started{code})" in caplog.text
    assert (len(runs), await db.rows("SELECT text FROM note")) == (2, [("written",)])


@contextlib.asynccontextmanager
async def full(db):
    """Have a server that lets nobody in, and what makes room in it."""
    if db.family == "postgresql":
        async with role(db, "CONNECTION LIMIT 0") as url:

            async def raise_limit(_seconds):
                await db.run(f"ALTER ROLE {url.username} CONNECTION LIMIT 9")

            yield url, raise_limit
        return
    before = db.server.execute("SELECT @@max_connections")
    db.server.execute("SET GLOBAL max_connections = 10")
    async with contextlib.AsyncExitStack() as guests:

        async def leave(_seconds):
            await guests.aclose()

        with contextlib.suppress(OperationalError):
            while True:
                await guests.enter_async_context(db.outside())
        yield make_url(db.url), leave
    db.server.execute(f"SET GLOBAL max_connections = {before}")


@contextlib.asynccontextmanager
async def role(db, options):
    """Have another user of this database, on PostgreSQL."""
    name = f"guest_{secrets.token_hex(4)}"
    await db.run(
        f"CREATE ROLE {name} LOGIN {options}",
        f"GRANT ALL ON ALL TABLES IN SCHEMA public TO {name}",
        f"GRANT ALL ON ALL SEQUENCES IN SCHEMA public TO {name}",
        f"GRANT USAGE ON SCHEMA public TO {name}",
    )
    yield make_url(db.url).set(username=name)
    await db.run(f"DROP OWNED BY {name}", f"DROP ROLE {name}")


@contextlib.asynccontextmanager
async def locked(db, password):
    """Have a user whose password is another one."""
    if db.family == "mysql":
        yield make_url(db.url).set(password=password)
        return
    async with role(db, "PASSWORD 'another'") as guest:
        rules = db.server.folder / "data" / "pg_hba.conf"
        before = rules.read_text()
        rules.write_text(f"host all {guest.username} all scram-sha-256\n{before}")
        await db.run("SELECT pg_reload_conf()")
        url = guest.set(password=password)

        async def refuses():
            return not await lets_in(url, refusals(db.driver))

        await until(refuses)
        yield url
        rules.write_text(before)


def refusals(driver):
    """Return what a refused login raises: SQLAlchemy 2.0 hands asyncpg's errors at connect on as they are."""
    return (DBAPIError, pytest.importorskip("asyncpg").PostgresError) if driver == "asyncpg" else (DBAPIError,)


async def lets_in(url, refused):
    """Say whether a user can log in."""
    engine = create_async_engine(url)
    try:
        async with engine.connect():
            return True
    except refused:
        return False
    finally:
        await engine.dispose()


async def fails_with(db, url, caplog):
    """Run a function that cannot connect, with two retries; return its error, its runs, and all that was said."""
    caplog.set_level(logging.DEBUG)
    runs = []
    raised = (errors.ConflictError, *refusals(db.driver))
    with UnitOfWorkManager(db.engine(url=url)).activate(), pytest.raises(raised) as caught:
        await writer(runs, retries=2, retry=doing(lambda: None))()
    said = "".join(traceback.format_exception(caught.value)) + repr(caught.value) + caplog.text
    return caught.value, len(runs), said


@pytest.mark.direct("the pooler asks for passwords itself")
async def test_a_wrong_password_is_permanent_and_told_to_nobody(db, caplog):
    """R2: 28P01 and 1045 run once; psycopg, which gives no code, takes them for 'not started'."""
    password = secrets.token_hex(8)
    async with locked(db, password) as url:
        error, runs, said = await fails_with(db, url, caplog)
    assert (type(error) is errors.ConflictError, runs) == ((True, 3) if db.driver == "psycopg" else (False, 1))
    assert password not in said


@pytest.mark.direct("the pooler lets in whoever asks, and fails at the first statement: 08P01")
async def test_an_unknown_database_is_permanent(db, caplog):
    """R2: 3D000 and 1049 run once; psycopg, which gives no code, takes them for 'not started'."""
    url = make_url(db.url).set(database="nobody_made_this")
    error, runs, said = await fails_with(db, url, caplog)
    assert (type(error) is errors.ConflictError, runs) == ((True, 3) if db.driver == "psycopg" else (False, 1))
    assert url.password not in said.replace("secrets", "")


@pytest.mark.drivers("asyncpg", "psycopg")
async def test_a_pooler_whose_server_is_full(driver):
    """R2: PgBouncer has one code for all that befalls it, 08P01: the unit is begun again until there is room."""
    if (reason := PgBouncer.unavailable()) is not None:
        pytest.skip(reason)
    few = {"max_connections": "5", "superuser_reserved_connections": "0", "max_wal_senders": "0"}
    with PostgreSQL(few) as server, PgBouncer(server, settings={"server_login_retry": "1"}) as pooler:
        pooler.restart()  # one that has been let in before would let the client in, too
        direct = create_async_engine(server.url(driver), poolclass=NullPool)
        engine = create_async_engine(pooler.url(driver))
        async with contextlib.AsyncExitStack() as held:
            with pytest.raises(DBAPIError):
                while True:
                    await held.enter_async_context(direct.connect())
            with UnitOfWorkManager(engine).activate(), pytest.raises(errors.ConflictError) as caught:
                await asker()()
        assert "too many clients already" in str(caught.value.__cause__)
        assert (caught.value.reason, caught.value.code) == (
            "not started",
            {"asyncpg": "08P01", "psycopg": None}[driver],
        )
        with UnitOfWorkManager(engine).activate():
            assert await asker(retries=100, timeout=10, retry=RetryPolicy(cap=0.1))() == 1
        await engine.dispose()


def asker(**options):
    """Make a function that reads."""

    @transactional(**options)
    async def work():
        return await current_session().scalar(text("SELECT 1"))

    return work


async def test_a_swallowed_refusal_is_no_success(engine, proxy):
    """D3: nothing was sent, but what the body asked for was not done either: never a commit without it."""
    proxy.refuse()
    units = []

    @transactional
    async def work():
        units.append(current_unit())
        with contextlib.suppress(OSError, DBAPIError):
            await current_session().execute(text("UPDATE account SET balance = 1"))

    with UnitOfWorkManager(engine).activate(), pytest.raises(errors.ConflictError):
        await work()
    assert units[0].status is Status.ROLLED_BACK


async def test_an_error_of_the_body_behind_a_swallowed_refusal(engine, proxy):
    """R4: it has nothing to do with it, and is not retried for it."""
    proxy.refuse()
    runs = []

    @transactional(retries=2, retry=RetryPolicy(base=0))
    async def work():
        runs.append(1)
        with contextlib.suppress(OSError, DBAPIError):
            await current_session().execute(text("UPDATE account SET balance = 1"))
        raise KeyError

    with UnitOfWorkManager(engine).activate(), pytest.raises(KeyError):
        await work()
    assert runs == [1]
