"""What the check of a version costs: an object that is read and changed in a unit, with a version column and without."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import insert
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from sqla_uow import UnitOfWorkManager
from sqla_uow.mixins import Versioned

if TYPE_CHECKING:
    import contextlib
    from collections.abc import Awaitable, Callable

__all__ = ["CASE", "every_call"]

CASE = "an object read and changed"


class Base(DeclarativeBase):
    """Of both tables."""


class Unversioned(Base):
    """The one by hand."""

    __tablename__ = "benchmark_unversioned"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    n: Mapped[int] = mapped_column(default=0)


class WithVersion(Versioned, Base):
    """The same, counted and checked."""

    __tablename__ = "benchmark_versioned"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    n: Mapped[int] = mapped_column(default=0)


async def every_call(url: str, stack: contextlib.AsyncExitStack) -> dict[str, Callable[[], Awaitable[object]]]:
    """Return a call for each of the two."""
    engine = create_async_engine(url)
    stack.push_async_callback(engine.dispose)
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.drop_all)
        await connection.run_sync(Base.metadata.create_all)
        for model in (Unversioned, WithVersion):
            await connection.execute(insert(model).values(id=1))
    manager = UnitOfWorkManager(engine)
    return {"without a version": changing(manager, Unversioned), "sqla_uow, with one": changing(manager, WithVersion)}


def changing(manager: UnitOfWorkManager, model: type[Unversioned | WithVersion]) -> Callable[[], Awaitable[object]]:
    """Return what reads the object and changes it, in a unit of its own."""

    async def call() -> None:
        async with manager.begin() as unit:
            found = await unit.session.get_one(model, 1)
            found.n += 1

    return call
