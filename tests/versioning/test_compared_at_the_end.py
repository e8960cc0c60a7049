"""Versions that the body has not written are compared at the end: what comes of that is done before COMMIT, too."""

from __future__ import annotations

import pytest
from sqlalchemy import event

from sqla_uow import Status
from sqla_uow.mixins import expect_version
from tests.versioning.tables import Plain


@pytest.mark.parametrize("work", ["hook", "object"])
async def test_work_that_comes_while_versions_are_compared(db, versioned, work):
    """A listener of the statement that compares makes more of it."""
    ran = []
    async with versioned.begin() as unit:
        unit.session.add_all([Plain(id=1, value=0), Plain(id=2, value=0)])
    async with versioned.begin() as unit:
        row, other = [await unit.session.get_one(Plain, key) for key in (1, 2)]
        expect_version(row, 1)

        def more(*_):
            if work == "hook":
                unit.before_commit(ran.append, "hook")
            else:
                other.value = 7

        connection = await unit.session.connection()
        event.listen(connection.sync_connection, "before_cursor_execute", more, once=True)
    assert unit.status is Status.COMMITTED
    assert ran == (["hook"] if work == "hook" else [])
    assert await db.scalar("SELECT value FROM plain WHERE id = 2") == (0 if work == "hook" else 7)
