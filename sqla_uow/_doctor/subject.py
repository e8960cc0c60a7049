"""What a check is given: the database, and a way to ask it; and what is judged alike wherever it is asked."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from sqlalchemy import text

from sqla_uow._doctor.report import Finding, judged

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

    from sqla_uow import UnitOfWorkManager

__all__ = ["Check", "Subject", "as_replica", "clock", "connections"]

_CLOCK_SECONDS = 2.0


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


async def clock(subject: Subject, now: str) -> list[Finding]:
    """Compare the server's clock with ours.

    Args:
        subject: the database.
        now: the statement that gives its seconds since 1970.
    """
    before = time.time()
    theirs = float(await subject.value(now))
    off = theirs - (before + time.time()) / 2
    advice = "timestamps of here and there do not compare"
    return [judged("clock", f"{off:+.2f} s", advice, wrong=abs(off) > _CLOCK_SECONDS)]


def connections(subject: Subject, limit: int, remedy: str) -> list[Finding]:
    """Compare how many connections are allowed with how many the pools may hold."""
    wanted = subject.connections
    advice = f"calls would fail as 'not started'; make the pools smaller, or {remedy}"
    return [judged("connections", f"{limit} allowed, {wanted} wanted", advice, wrong=wanted > limit, level="warning")]


def as_replica(value: str) -> list[Finding]:
    """Say that what was given as the database is a replica of it."""
    return [Finding("role", value, "note", "pass its engine in replicas=, not as the primary")]
