"""What can never connect is no database that is away: it is raised at once, as the driver raised it."""

from __future__ import annotations

import threading

import pytest
from sqlalchemy import event, text
from sqlalchemy.exc import DBAPIError, NotSupportedError

from sqla_uow import UnitOfWorkManager, current_session, errors, is_retryable, transactional
from tests.kit.waiting import until

MISTAKES = {
    "psycopg": [{"no_such_option": 1}, {"connect_timeout": "soon"}],
    "asyncpg": [{"ssl": "nonsense"}, {"target_session_attrs": "nonsense"}, {"no_such_option": 1}],
    "asyncmy": [{"no_such_option": 1}],
    "aiomysql": [{"no_such_option": 1}],
    "sqlite": [{"no_such_option": 1}],
}


def counting(manager):
    """Return a function with retries, and its runs."""
    runs = []

    @transactional(using=manager, retries=3, isolation="SERIALIZABLE")
    async def work():
        runs.append(1)
        return await current_session(manager).scalar(text("SELECT 7"))

    return work, runs


async def test_options_that_a_driver_does_not_know(db):
    """One run, no wait; not an outage, which would use up the retries of all."""
    threads = set(threading.enumerate())
    for options in MISTAKES[db.driver]:
        work, runs = counting(UnitOfWorkManager(db.engine(connect_args=options)))
        with pytest.raises((TypeError, ValueError, DBAPIError)) as caught:  # SQLAlchemy 2.0 leaves asyncpg's as it is
            await work()
        assert not isinstance(caught.value, errors.ConflictError), options
        assert not is_retryable(caught.value)
        assert len(runs) == 1
    # aiosqlite's thread ends by itself after a connect that has failed; behind the loop's end it would complain.
    if db.driver == "sqlite":
        await until(lambda: set(threading.enumerate()) <= threads)


@pytest.mark.drivers("psycopg")
@pytest.mark.parametrize("where", ["checkout", "engine_connect"])
async def test_a_listener_that_begins_before_the_level_is_set(db, where):
    """Psycopg cannot change it any more; it never will."""
    engine = db.engine()

    def checkout(dbapi_connection, *_):
        cursor = dbapi_connection.cursor()
        cursor.execute("SELECT 1")
        cursor.close()

    def engine_connect(connection):
        connection.exec_driver_sql("SELECT 1")

    event.listen(engine.sync_engine, where, checkout if where == "checkout" else engine_connect)
    work, runs = counting(UnitOfWorkManager(engine))
    with pytest.raises(Exception, match="can't change 'autocommit' now"):
        await work()
    assert len(runs) == 1


@pytest.mark.drivers("asyncpg", "psycopg", "asyncmy", "aiomysql")
async def test_a_server_that_is_away_still_is(db):
    """Nothing listens on that port."""
    work, runs = counting(UnitOfWorkManager(db.engine(port=9)))
    with pytest.raises(errors.ConflictError) as caught:
        await work()
    assert caught.value.reason == "not started"
    assert not isinstance(caught.value.__cause__, NotSupportedError)
    assert isinstance(caught.value.__cause__, (DBAPIError, OSError))
    assert len(runs) == 4
