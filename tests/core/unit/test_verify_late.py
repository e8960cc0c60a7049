"""What became of a COMMIT whose answer was lost, asked while the server is still at it."""

from __future__ import annotations

import asyncio

import pytest
from sqlalchemy import event

from sqla_uow import Status
from tests.kit.waiting import until

pytestmark = [
    pytest.mark.drivers("asyncpg", "psycopg"),
    pytest.mark.direct("ends the server's side of a client that has left"),
]


async def test_a_commit_that_takes_long_is_waited_for(wire, db):
    """PostgreSQL says "in progress": no answer yet, and the next one is that it is committed, with its hooks."""
    await db.run(
        "CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN PERFORM pg_advisory_xact_lock_shared(1); RETURN NULL; END $$",
        "CREATE CONSTRAINT TRIGGER wait AFTER UPDATE ON account DEFERRABLE INITIALLY DEFERRED "
        "FOR EACH ROW EXECUTE FUNCTION wait()",
    )
    asked = []

    def note(_connection, _cursor, statement, *_others):
        if "pg_xact_status" in statement:
            asked.append(statement)

    event.listen(wire.engine.sync_engine, "after_cursor_execute", note)
    async with db.outside() as other:
        await other.exec_driver_sql("SELECT pg_advisory_lock(1)")
        task = asyncio.create_task(wire.add_one(ambiguous_commit="verify", timeout=20))
        await db.until_waiting()
        wire.proxy.cut()
        await until(lambda: len(asked) > 1 or task.done())
        await other.exec_driver_sql("SELECT pg_advisory_unlock(1)")
        await task
    await wire.until_left()
    assert [unit.status for unit in wire.units] == [Status.COMMITTED]
    assert (wire.hooks, await wire.balance()) == (["after commit"], 1)
