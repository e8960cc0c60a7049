"""A chain of hooks that never ends does not hide what another hook has raised to end the program."""

from __future__ import annotations

import pytest
from sqlalchemy import insert

from sqla_uow import Status, UnitOfWorkManager
from tests.kit.models import Note


async def test_a_hook_that_ends_the_program_beside_a_chain_without_end(db):
    """Both are of a commit, which stands."""
    manager = UnitOfWorkManager(db.engine())

    def leave():
        raise SystemExit(3)

    def again():
        unit.after_commit(again)

    with pytest.raises(SystemExit) as caught:
        async with manager.begin() as unit:
            await unit.session.execute(insert(Note).values(text="kept"))
            unit.after_commit(leave)
            unit.after_commit(again)
    assert caught.value.code == 3
    assert unit.status is Status.COMMITTED
    assert await db.rows("SELECT text FROM note") == [("kept",)]
