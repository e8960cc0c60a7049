"""Types that appear in the public signatures of `sqla_uow`."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

__all__ = [
    "Contention",
    "ContentionGroup",
    "IsolationLevel",
    "LazyLoads",
    "PoolState",
    "Propagation",
    "SettingSource",
    "Settings",
    "Statistics",
    "Status",
]

IsolationLevel = Literal["READ UNCOMMITTED", "READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"]
"""An isolation level in SQL spelling; the table of isolation levels in the docs says which database has which one."""

Propagation = Literal["required", "requires_new", "nested", "mandatory", "durable"]
"""What a call does when a unit is already open; see `sqla_uow.transactional`."""

LazyLoads = Literal["allow", "warn", "raise"]
"""What happens to loads that nobody asked for; see `sqla_uow.UnitOfWorkManager`."""


SettingSource: TypeAlias = str | Callable[[], str | None]
"""The value of a setting, or a function without arguments that gives it, such as ``current_tenant.get``."""

Settings: TypeAlias = Mapping[str, SettingSource | None]
"""Settings of transactions by their names, such as ``{"app.tenant": current_tenant.get}``; None is no value, written out."""


class Status(enum.Enum):
    """Where a unit of work stands.  `DOOMED` becomes `ROLLED_BACK`; the last three are final."""

    NEW = "new"
    """No SQL has been sent yet, so no connection is held."""
    ACTIVE = "active"
    """A transaction is open."""
    DOOMED = "doomed"
    """The transaction can only be rolled back; SQL is refused."""
    COMMITTED = "committed"
    """COMMIT was answered, or there was nothing to commit."""
    ROLLED_BACK = "rolled back"
    """Nothing of the unit is in the database."""
    AMBIGUOUS = "ambiguous"
    """COMMIT was sent and its answer is unknown."""


class Contention(NamedTuple):
    """What `UnitOfWorkManager.contention` returns for a function: the state of the group that it takes turns with.

    Attributes:
        width: how many calls of the group may run at once; None means no limit.
        running: how many of them run now, where something has conflicted lately.
        waiting: how many wait for their turn; they hold no connection.
        wasted: the share of recent time that went into attempts that a conflict ended.
    """

    width: int | None
    running: int
    waiting: int
    wasted: float


class ContentionGroup(NamedTuple):
    """Functions that meet conflicts with each other; see `UnitOfWorkManager.contention`.

    Attributes:
        functions: their names, and those of routes.
        tables: on which they have met conflicts; empty where no table is known.
        state: how many calls of theirs run, and wait.
    """

    functions: tuple[str, ...]
    tables: tuple[str, ...]
    state: Contention


class PoolState(NamedTuple):
    """The engine's pool of connections now; None means that its class does not know.

    Attributes:
        size: how many connections it keeps.
        checked_out: how many are lent, to units and to anybody else.
        overflow: how many it has beyond its size.
        limit: how many it can lend at once; None means no limit, or not known.
        idle: how many are open and not lent.
    """

    size: int | None
    checked_out: int | None
    overflow: int | None
    limit: int | None
    idle: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """What `UnitOfWorkManager.statistics` returns: what has happened since the manager was made, and its state now.

    Attributes:
        begun: calls that have begun a unit of their own; see `sqla_uow.events` for what a call is.
        committed: calls whose work is committed.
        rolled_back: calls that left nothing in the database.
        ambiguous: calls whose outcome is unknown.
        gave_up: calls that were rolled back because a failure outlived its retries.
        doomed: calls that were rolled back although the body came to its end: the unit could not be committed, or was
            not to be.
        timed_out: calls that were rolled back because their deadline had passed.
        attempts: runs of a body, first ones and retries.
        open: runs that go on now, that wait for their turn, or that wait to be run again.
        retries: how often a body was run again, by reason and code.
        readings: how many read sessions of scopes were begun.
        pool: the engine's pool.
        contention: the functions of each group that has met conflicts lately, and the group's state.
    """

    begun: int
    committed: int
    rolled_back: int
    ambiguous: int
    gave_up: int
    doomed: int
    timed_out: int
    attempts: int
    open: int
    retries: Mapping[tuple[str, str | None], int]
    readings: int
    pool: PoolState
    contention: tuple[tuple[str, Contention], ...]
