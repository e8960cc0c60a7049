"""Isolation levels, tried instead of asked: two units that read, and then write what follows from it."""

from __future__ import annotations

import asyncio
import secrets
from functools import partial
from typing import TYPE_CHECKING, Self, get_args

from sqlalchemy import Column, Integer, MetaData, Table, select, update

from sqla_uow._api.manager import setup_of
from sqla_uow._doctor.report import Finding, judged
from sqla_uow._tasks.shield import shielded
from sqla_uow.errors import ConflictError
from sqla_uow.typing import IsolationLevel

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy.engine import Connection

    from sqla_uow._doctor.subject import Subject

__all__ = ["try_levels"]

_BOTH = 2
_MEETING_SECONDS = 0.3
"""How long one unit waits for the other, which may be waiting for a lock."""


class Trial:
    """A table of our own with two rows, and two units that meet between reading and writing."""

    def __init__(self, subject: Subject) -> None:
        self._manager = subject.manager
        self._engine = subject.engine
        self.table: Table = Table(
            f"sqla_uow_doctor_{secrets.token_hex(6)}",
            MetaData(),
            Column("id", Integer, primary_key=True, autoincrement=False),
            Column("value", Integer, nullable=False),
        )

    async def __aenter__(self) -> Self:
        # Shielded, as the end is: after a cancellation the table might be there, or about to be.
        made = await shielded(partial(self._run, self.table.metadata.create_all))
        if made.cancelled is not None:
            await self.__aexit__()
            raise made.cancelled
        made.task.result()
        return self

    async def __aexit__(self, *_raised: object) -> None:
        (await shielded(partial(self._run, self.table.metadata.drop_all))).task.result()

    async def _run(self, ddl: Callable[[Connection], None]) -> None:
        async with self._engine.begin() as connection:
            await connection.run_sync(ddl)

    async def loses_updates(self, level: IsolationLevel) -> bool:
        """Return True if two units that each add 1 to what they read can both commit, and 1 is added in all."""
        committed, values = await self._both(level, writes=(1, 1))
        return committed == _BOTH and values[1] == 1

    async def skews_writes(self, level: IsolationLevel) -> bool:
        """Return True if two units that both read the sum 0 can each change a different row and both commit."""
        committed, values = await self._both(level, writes=(1, 2))
        return committed == _BOTH and values[1] + values[2] > 1

    async def _both(self, level: IsolationLevel, *, writes: tuple[int, int]) -> tuple[int, dict[int, int]]:
        async with self._engine.begin() as connection:
            await connection.execute(self.table.delete())
            await connection.execute(self.table.insert(), [{"id": 1, "value": 0}, {"id": 2, "value": 0}])
        met = asyncio.Barrier(2)
        outcomes = await asyncio.gather(
            *(self._one(level, row, met, only_if_all_0=writes[0] != writes[1]) for row in writes)
        )
        async with self._engine.connect() as connection:
            rows = await connection.execute(select(self.table.c.id, self.table.c.value))
            values = {int(number): int(value) for number, value in rows}
        return sum(outcomes), values

    async def _one(self, level: IsolationLevel, row: int, met: asyncio.Barrier, *, only_if_all_0: bool) -> bool:
        try:
            async with self._manager.begin(isolation=level) as unit:
                rows = (await unit.session.execute(select(self.table.c.id, self.table.c.value))).all()
                seen = {int(number): int(value) for number, value in rows}
                try:
                    async with asyncio.timeout(_MEETING_SECONDS):
                        await met.wait()
                except (TimeoutError, asyncio.BrokenBarrierError):
                    pass  # the other waits for us
                if not (only_if_all_0 and any(seen.values())):
                    change = update(self.table).where(self.table.c.id == row).values(value=seen[row] + 1)
                    await unit.session.execute(change)
        except ConflictError:
            return False
        return True


async def try_levels(subject: Subject) -> list[Finding]:
    """Try what each isolation level that the database has prevents."""
    found: list[Finding] = []
    async with Trial(subject) as trial:
        if not setup_of(subject.manager).database.keeps_status():  # PostgreSQL needs no table for it
            found.append(Finding("ambiguous_commit='verify'", "works: by a row in a table, which may be made"))
        for level in get_args(IsolationLevel):
            try:
                lost, skewed = await trial.loses_updates(level), await trial.skews_writes(level)
            except ValueError:  # the database has no such level
                continue
            possible = [name for name, happens in (("lost update", lost), ("write skew", skewed)) if happens]
            found.append(
                judged(
                    level,
                    f"{' and '.join(possible)} possible" if possible else "no lost update, no write skew",
                    "it is not what it says; do not rely on it",
                    wrong=level == "SERIALIZABLE" and bool(possible),
                    level="warning",
                )
            )
    return found
