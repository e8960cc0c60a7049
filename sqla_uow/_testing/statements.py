"""Which statements are a program's own work, and whose engine is meant."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from sqlalchemy.ext.asyncio import AsyncEngine

from sqla_uow._api.manager import UnitOfWorkManager, setup_of

if TYPE_CHECKING:
    from sqlalchemy.engine import Engine

__all__ = ["Bind", "engine_of", "is_work", "names_told_by"]

Bind = AsyncEngine | UnitOfWorkManager[Any]
"""What the kit is told a database by."""

# What a unit sends for itself differs from database to database: levels, deadlines, savepoints, the mark of a COMMIT.
_CONTROL = re.compile(
    r"\s*(?:BEGIN|PRAGMA|SAVEPOINT|RELEASE|ROLLBACK|SET\s+(?!STATEMENT\b)|SELECT\s+set_config\(|SELECT\s+pg_current_xact_id\(|SHOW\s+\w+_timeout\b|"
    r"(?:INSERT\s+INTO|UPDATE)\s+sqla_uow_commits\b)",
    re.IGNORECASE,
)


def is_work(statement: str) -> bool:
    """Say whether a statement reads or writes something for the program."""
    return _CONTROL.match(statement) is None


def engine_of(bind: object, who: str) -> Engine:
    """Return the engine behind what a user passes.

    Raises:
        TypeError: there is none.
    """
    if isinstance(bind, UnitOfWorkManager):
        bind = bind.engine
    if not isinstance(bind, AsyncEngine):
        raise TypeError(f"{who} got {type(bind).__name__}; pass an AsyncEngine or a UnitOfWorkManager")
    return bind.sync_engine


def names_told_by(bind: Bind) -> frozenset[str]:
    """Return the names of the settings that a manager tells its transactions."""
    sources = setup_of(bind).sources if isinstance(bind, UnitOfWorkManager) else None
    return frozenset() if sources is None else sources.names
