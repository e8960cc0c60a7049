"""A unit that can only be rolled back says from which error on, also of one that SQLAlchemy never saw."""

from __future__ import annotations

import pytest
from sqlalchemy import select, text

from sqla_uow import UnitOfWorkManager, errors
from tests.kit.models import Account, Note
from tests.kit.raw import raw_of, send


@pytest.fixture
def manager(db):
    """The manager of a fresh database, with one connection."""
    return UnitOfWorkManager(db.engine(pool_size=1, max_overflow=0))


async def _on_the_drivers_connection(session):
    await send(await raw_of(session), "SELECT nonsense")


async def _beside_the_drivers_connection(session):
    await send(await raw_of(session), "SELECT 1")
    await session.execute(text("SELECT nonsense"))


async def _under_a_stream(session):
    rows = await session.stream(select(Note).execution_options(yield_per=1))
    async for _ in rows:
        await session.execute(text("SELECT 1"))


@pytest.mark.parametrize("fail", [_on_the_drivers_connection, _beside_the_drivers_connection, _under_a_stream])
async def test_the_cause_of_a_unit_whose_failure_is_swallowed(db, manager, fail):
    """It is the error that was raised, itself; and the message names its type."""
    if fail is _on_the_drivers_connection and db.family == "postgresql":
        pytest.skip("its drivers say that something has failed, not what")
    swallowed = []
    with pytest.raises(errors.RollbackOnlyError) as caught:
        async with manager.begin() as unit:
            unit.session.add_all([Account(id=1), Note(text="a"), Note(text="b")])
            await unit.session.flush()
            try:
                await fail(unit.session)
            except Exception as error:  # noqa: BLE001  # of each driver's own type
                swallowed.append(error)
    assert [caught.value.__cause__] == swallowed
    assert type(swallowed[0]).__name__ in str(caught.value)
    assert await db.rows("SELECT id FROM account") == []
