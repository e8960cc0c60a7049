"""The bank without the library: what SQLAlchemy's tutorial shows, at the isolation the database happens to have."""

from __future__ import annotations

from typing import TYPE_CHECKING

from examples.bank import work

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

__all__ = ["PlainBank"]


class PlainBank:
    """The functions of `services`, each in a plain ``async with Session.begin()``."""

    def __init__(self, sessions: async_sessionmaker[AsyncSession]) -> None:
        self._sessions = sessions

    async def transfer(self, source: int, target: int, amount: int) -> bool:
        """See `work.transfer`."""
        async with self._sessions.begin() as session:
            return await work.transfer(session, source, target, amount)

    async def deposit(self, account: int, amount: int, acknowledge: Callable[[int], object]) -> bool:
        """See `work.deposit`."""
        async with self._sessions.begin() as session:
            done = await work.deposit(session, account, amount)
        acknowledge(amount)
        return done

    async def swap_on_call(self, doctor: int) -> bool:
        """See `work.swap_on_call`."""
        async with self._sessions.begin() as session:
            return await work.swap_on_call(session, doctor)
