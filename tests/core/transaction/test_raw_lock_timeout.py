"""A lock that was not had on the driver's own connection: no savepoint makes good what it has undone."""

from __future__ import annotations

import contextlib

import pytest
from sqlalchemy import text

from sqla_uow import Status, UnitOfWorkManager, errors
from tests.kit.models import Account
from tests.kit.raw import raw_of, send

PATIENCE = {"postgresql": "SET LOCAL lock_timeout = '50ms'", "mysql": "SET innodb_lock_wait_timeout = 1"}


@pytest.mark.drivers("asyncpg", "psycopg", "asyncmy", "aiomysql")
@pytest.mark.parametrize("swallowed", [True, False])
async def test_in_a_savepoint_that_is_undone(db, swallowed):
    """The unit ends as with a conflict in SQLAlchemy's own call."""
    await db.run("INSERT INTO account (id, balance) VALUES (1, 0)")
    manager = UnitOfWorkManager(db.engine(pool_size=1, max_overflow=0))
    async with db.outside() as other:
        await other.execute(text("UPDATE account SET balance = 5 WHERE id = 1"))
        with pytest.raises(errors.ConflictError) as caught:
            async with manager.begin() as unit:
                unit.session.add(Account(id=2))
                await unit.session.flush()
                raw = await raw_of(unit.session)
                await send(raw, PATIENCE[db.family])
                with contextlib.suppress(KeyError):
                    async with manager.begin(propagation="nested"):
                        with contextlib.suppress(Exception) if swallowed else contextlib.nullcontext():
                            await send(raw, "UPDATE account SET balance = 1 WHERE id = 1")
                        raise KeyError
    assert caught.value.reason == "lock timeout"
    assert unit.status is Status.ROLLED_BACK
    assert await db.rows("SELECT id, balance FROM account") == [(1, 0)]
