"""What somebody else does to a row, while a unit has it in memory."""

from __future__ import annotations

from datetime import UTC, datetime
from uuid import uuid4

from sqlalchemy import inspect, select, update

FRESH = {"integer": lambda column: column + 1, "uuid": lambda _: uuid4(), "timestamp": lambda _: datetime.now(UTC)}


def written(model):
    """Return an UPDATE, past the ORM, of the row 1 of a model that gives it another version."""
    column = inspect(model).version_id_col
    table = column.table
    kind = column.info["sqla_uow.version"]
    values = {table.c.value: table.c.value} if kind == "xmin" else {column: FRESH[kind](column)}
    return update(table).where(next(iter(table.primary_key)) == 1).values(values)


async def execute_outside(db, statement):
    """Commit a statement on a connection of its own."""
    async with db.outside() as connection:
        await connection.execute(statement)
        await connection.commit()


async def overtake(db, session, model):
    """Change row 1 of a model behind the session's back.

    On SQLite nobody else can write while a unit is open, so there it is a statement past the ORM in the unit itself.
    """
    if db.family == "sqlite":
        await (await session.connection()).execute(written(model))
    else:
        await execute_outside(db, written(model))


async def version_of(db, model, key=1):
    """Return the version in the database, as another session sees it."""
    column = inspect(model).version_id_col
    async with db.outside() as connection:
        return await connection.scalar(select(column).where(next(iter(column.table.primary_key)) == key))
