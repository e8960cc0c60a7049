"""What needs FastAPI."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi import Depends

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from sqla_uow import IsolationLevel, Propagation, UnitOfWork, UnitOfWorkManager

__all__ = ["unit_of_work"]


def unit_of_work(
    manager: UnitOfWorkManager[Any],
    *,
    isolation: IsolationLevel | None = None,
    read_only: bool = False,
    propagation: Propagation = "required",
    timeout: float | None = None,
) -> Any:
    """Return a dependency that is one unit, committed after the endpoint and before the response.

    ::

        Unit = Annotated[UnitOfWork, unit_of_work(manager)]

        @app.post("/accounts/{number}/closing")
        async def close_account(number: int, unit: Unit) -> None: ...

    Dependencies and the endpoint share it, and `@transactional` functions join it.  A conflict is not retried: FastAPI
    cannot run an endpoint twice.

    Args:
        manager: it begins the unit.
        isolation: the level; None is the manager's.
        read_only: refuse writes, in the database as well.
        propagation: what to do when a unit is open already; see `sqla_uow.transactional`.
        timeout: seconds for the endpoint and the dependencies that run after this one; None is the manager's.
    """

    async def unit() -> AsyncIterator[UnitOfWork[Any]]:
        async with manager.begin(
            isolation=isolation, read_only=read_only, propagation=propagation, timeout=timeout
        ) as unit:
            yield unit

    return Depends(unit, scope="function")
