"""C1: COMMIT is handed to the driver in the turn of the loop in which the body ended."""

from __future__ import annotations

import asyncio
import sys

import pytest
from sqlalchemy import event, text

from sqla_uow import UnitOfWorkManager, current_session, transactional


@pytest.mark.skipif(sys.version_info < (3, 12), reason="Python 3.11 begins a task in the next turn")
async def test_no_turn_of_the_loop_passes_before_commit(db):
    """In a loop that is busy with others the next turn may come milliseconds later."""
    engine = db.engine()
    manager, seen = UnitOfWorkManager(engine), []
    event.listen(engine.sync_engine, "commit", lambda _connection: seen.append("commit"))

    @transactional(using=manager)
    async def work():
        await current_session(manager).execute(text("SELECT 1"))
        asyncio.get_running_loop().call_soon(seen.append, "turn")

    await work()
    assert seen == ["commit", "turn"]
