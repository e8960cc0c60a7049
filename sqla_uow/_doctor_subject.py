"""What a check is given: the database, and a way to ask it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from sqlalchemy import text

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

    from sqla_uow import UnitOfWorkManager
    from sqla_uow._doctor_report import Finding

__all__ = ["Check", "Subject"]


class Subject:
    """The database that is looked at.

    Args:
        engine: of one connection, or a few.
        manager: over it.
        connections: that all processes' pools may hold together.
    """

    def __init__(self, engine: AsyncEngine, manager: UnitOfWorkManager[Any], connections: int) -> None:
        self.engine: AsyncEngine = engine
        self.manager: UnitOfWorkManager[Any] = manager
        self.connections: int = connections

    async def row(self, statement: str, /, **parameters: object) -> Sequence[Any] | None:
        """Return the first row of a statement's answer, None where there is none."""
        async with self.engine.connect() as connection:
            return (await connection.execute(text(statement), parameters)).first()

    async def value(self, statement: str, /, **parameters: object) -> Any:
        """Return one value."""
        row = await self.row(statement, **parameters)
        return None if row is None else row[0]


Check: TypeAlias = Callable[[Subject], Awaitable["list[Finding]"]]
