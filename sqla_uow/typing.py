"""Types that appear in the public signatures of `sqla_uow`."""

from __future__ import annotations

import enum
from typing import Literal, NamedTuple

__all__ = ["Contention", "IsolationLevel", "Propagation", "Status"]

IsolationLevel = Literal["READ UNCOMMITTED", "READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"]
"""An isolation level in SQL spelling; the table of isolation levels in the docs says which database has which one."""

Propagation = Literal["required", "requires_new", "nested", "mandatory", "durable"]
"""What a call does when a unit is already open; see `sqla_uow.transactional`."""


class Status(enum.Enum):
    """Where a unit of work stands.  `DOOMED` becomes `ROLLED_BACK`; that, `COMMITTED` and `AMBIGUOUS` are final."""

    NEW = "new"
    """No SQL was sent yet, so no connection is held."""
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
    """What `UnitOfWorkManager.contention` returns.

    Attributes:
        width: how many calls may run at once; None is no limit.
        running: how many do.
        waiting: how many wait for their turn; they hold no connection.
        wasted: share of the time, of late, that went into attempts ended by a conflict.
    """

    width: int | None
    running: int
    waiting: int
    wasted: float
