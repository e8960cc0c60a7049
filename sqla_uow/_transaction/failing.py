"""Which failure a transaction's own connection has met, and whether its first statement may be sent again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy.exc import PendingRollbackError

from sqla_uow._databases.failures import Kind
from sqla_uow._transaction.phase import Phase

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqla_uow._databases.failures import Failure
    from sqla_uow._transaction.transaction import Transaction

__all__ = ["begin_again", "can_begin_again", "failure_behind"]


def failure_behind(transaction: Transaction, links: Sequence[BaseException]) -> Failure | None:
    """Return the retryable failure of this transaction's own connection behind a chain of exceptions."""
    ids = {id(link) for link in links}
    mark = transaction.doom.marked
    if mark is not None and mark.failure is not None and mark.failure.retryable:
        forced = mark.hard and mark.failure.kind in (Kind.CONFLICT, Kind.LOCK_TIMEOUT, Kind.STALE_PLAN)
        # SQLAlchemy's answer to SQL, such as a RELEASE, after a failure that was swallowed; it does not name that one.
        aftermath = any(isinstance(link, PendingRollbackError) for link in links)
        if forced or aftermath or id(mark.cause) in ids or id(mark.failure.error) in ids:
            return mark.failure
    if transaction.stale is not None and id(transaction.stale.error) in ids:
        return transaction.stale
    refused = transaction.connect_failure
    return refused if refused is not None and refused.retryable and id(refused.error) in ids else None


def can_begin_again(transaction: Transaction) -> bool:
    """Say whether the connection was found dead before anything was read."""
    mark = transaction.doom.marked
    lost = mark is not None and mark.failure is not None and mark.failure.kind is Kind.LOST
    return lost and transaction.beginnings > 0 and transaction.phase.is_active and transaction.doom.depth == 0


def begin_again(transaction: Transaction) -> None:
    """Forget the connection that was found dead, and the replica that it led to."""
    transaction.beginnings -= 1
    if transaction.replica is not None and transaction.replicas is not None:
        transaction.database, transaction.replica = transaction.replicas.primary, None
    transaction.connection = transaction.engine = transaction.closer = None
    transaction.doom.marked = None
    transaction.phase = Phase.NEW
