"""What the units of one manager share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic

from sqlalchemy.ext.asyncio import AsyncSession
from typing_extensions import TypeVar

from sqla_uow._retry.budget import budget_of
from sqla_uow._retry.groups import Groups
from sqla_uow._tasks.per_loop import PerLoop
from sqla_uow._unit.statistics import Counts

if TYPE_CHECKING:
    from sqla_uow._databases.database import Database
    from sqla_uow._replicas.router import LastWrite, ReplicaRouter
    from sqla_uow._retry.budget import Budget
    from sqla_uow._retry.policy import RetryPolicy
    from sqla_uow._session.maker import SessionMaker
    from sqla_uow._settings.sources import Sources
    from sqla_uow._transaction.transaction import Transaction
    from sqla_uow._unit.verify import Verifier
    from sqla_uow.events import Observer
    from sqla_uow.typing import IsolationLevel

__all__ = ["Setup"]

S = TypeVar("S", bound=AsyncSession, default=AsyncSession)


class Setup(Generic[S]):
    """The options of one manager, checked, and what all its calls have in common.

    Args:
        name: of the manager.
        maker: makes the sessions of its units.
        isolation: the level of units that do not ask for one.
        retries: of calls that do not say how many.
        timeout: seconds of calls that do not say how many; None sets no deadline.
        retry: how long calls that do not say wait between attempts.
        replicas: where units that only read may run, if there are any.
        verifier: learns what became of a COMMIT whose answer was lost; None lets the caller do that.
        observers: are told of every call.
        sources: what its transactions are told first; None if they are told nothing.

    Attributes:
        budget: how many retries an outage may cause; managers over one pool share it.
        counts: of its calls.
        database: where its units run.
        groups: which functions get in each other's way, and where their calls wait for their turn.
    """

    __slots__ = (
        "budget", "counts", "database", "groups", "isolation", "maker", "name", "observers", "replicas", "retries", "retry",
        "sources", "timeout", "verifier",
    )  # fmt: skip

    def __init__(
        self,
        name: str,
        maker: SessionMaker[S],
        *,
        isolation: IsolationLevel | None,
        retries: int,
        timeout: float | None,
        retry: RetryPolicy,
        replicas: ReplicaRouter | None,
        verifier: Verifier | None,
        observers: tuple[Observer, ...],
        sources: Sources | None,
    ) -> None:
        self.name: str = name
        self.maker: SessionMaker[S] = maker
        self.database: Database = maker.database
        self.budget: Budget = budget_of(self.database.pool)
        self.isolation: IsolationLevel | None = isolation
        self.retries: int = retries
        self.timeout: float | None = timeout
        self.retry: RetryPolicy = retry
        self.replicas: ReplicaRouter | None = replicas
        self.verifier: Verifier | None = verifier
        self.observers: tuple[Observer, ...] = observers
        self.sources: Sources | None = sources
        self.counts: Counts = Counts()
        self.groups: PerLoop[Groups] = PerLoop(Groups)

    def read_transaction(self, kind: type[Transaction], name: str, last_write: LastWrite | None) -> Transaction:
        """Make the transaction of a scope's read session.

        Args:
            kind: its class.
            name: what messages call it.
            last_write: of the scope's client, where there are replicas.
        """
        transaction = kind(
            name, self.database, isolation=self.isolation, read_only=True, deadline=None, clock=self.retry.clock
        )
        transaction.scope_read = True
        replicas = transaction.replicas = self.replicas
        transaction.last_write = last_write
        # A dead connection tells the pool of the others, so that the next one is new; of a replica, only those to it.
        transaction.beginnings = 1 if replicas is None else 1 + len(replicas)
        return transaction
