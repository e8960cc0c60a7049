"""A connection that cannot be set up for its unit."""

from __future__ import annotations

import pytest
from sqlalchemy import event, text

from sqla_uow import Status, UnitOfWorkManager
from sqla_uow.errors import UnitOfWorkError


@pytest.mark.drivers("psycopg")
async def test_it_never_goes_back_into_the_pool(db):
    """The level cannot be set, because the pool lends it inside a transaction: nothing is lent on, held or left open."""
    psycopg = pytest.importorskip("psycopg")
    engine = db.engine(pool_size=1, max_overflow=0, pool_timeout=1)
    manager = UnitOfWorkManager(engine, isolation="SERIALIZABLE")
    units = []

    def begin(dbapi_connection, _record, _proxy):
        dbapi_connection.cursor().execute("CREATE TABLE left_open (id int)")

    event.listen(engine.sync_engine, "checkout", begin)
    with pytest.raises((UnitOfWorkError, psycopg.Error)) as failed:  # SQLAlchemy 2.0 wraps no error of this
        async with manager.begin() as unit:
            units.append(unit)
            await unit.session.execute(text("SELECT 1"))
    event.remove(engine.sync_engine, "checkout", begin)
    assert units[0].status is Status.ROLLED_BACK
    # The error is held until here, with its frames and what they hold.
    assert "INTRANS" in f"{failed.value} {failed.value.__cause__}"
    assert engine.pool.checkedout() == 0
    assert await db.is_idle()
    async with manager.begin() as following:
        assert await following.session.scalar(text("SHOW transaction_isolation")) == "serializable"
    assert await db.rows("SELECT 1 FROM pg_tables WHERE tablename = 'left_open'") == []
