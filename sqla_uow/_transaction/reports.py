"""What SQLAlchemy's connection reports of a transaction: it has begun, a statement has failed, it was rolled back.

COMMIT is reported in `committing`, what is sent on the driver's own connection in `raw_calls`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

from sqla_uow._databases.driver import Ended
from sqla_uow._databases.failures import HARD, Failure, Kind, classify, hidden_conflict
from sqla_uow._transaction.phase import Phase
from sqla_uow.errors import IsolationConflictError, PropagationError, UnitOfWorkError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sqlalchemy.engine import Connection

    from sqla_uow._transaction.transaction import Transaction

__all__ = [
    "before_connect",
    "before_rollback",
    "connect_failed",
    "operation_failed",
    "refuse_control",
    "refuse_ended",
    "refuse_implicit_commit",
    "session_rolled_back",
    "transaction_begun",
]


def before_connect(transaction: Transaction) -> None:
    """A connection is about to be taken.

    Raises:
        PropagationError: the units around this one have all that the pool can lend.
        TaskBoundaryError: another task uses the unit, or another event loop the pool.
    """
    transaction.owner.begin_operation()
    transaction.database.check_loop(transaction.owner.loop, who=transaction.name)
    if not transaction.enclosing:
        return
    pool, capacity = transaction.database.pool, transaction.database.capacity()
    held = sum(1 for other in transaction.enclosing if other.database.pool is pool and other.connection)
    if capacity is not None and held >= capacity:
        raise PropagationError(_no_room(transaction, capacity))


def _no_room(transaction: Transaction, capacity: int) -> str:
    within = transaction.database.within
    if within is not None:
        return (
            f"{transaction.name} needs a connection of its own, but {within} has one for all units; join the outer unit, "
            "or test it on a database of its own"
        )
    return (
        f"{transaction.name} needs a connection of its own, but the units around it hold all {capacity} of the pool; "
        "use a pool with room for the nesting, or join the outer unit"
    )


def connect_failed(transaction: Transaction, error: BaseException) -> None:
    """No connection could be had."""
    transaction.owner.end_operation()
    if transaction.phase is Phase.ENDED:  # while this waited; the end could not give back what was not taken yet
        transaction.give_back_turn()
    if isinstance(error, Exception) and not isinstance(error, UnitOfWorkError):
        transaction.connect_failure = classify(error, connecting=True)
        # A failed statement like any other: swallowed, it must not end in a commit of the rest.
        transaction.doom.mark(error, failure=transaction.connect_failure)


def transaction_begun(transaction: Transaction, connection: Connection) -> None:
    """The transaction has its connection; nothing has been sent on it.

    Raises:
        IsolationConflictError: the connection is in autocommit, or at another level than the unit asked for.
    """
    transaction.connection = connection
    foreign = _foreign_level(transaction, connection)
    if foreign is not None:
        error = IsolationConflictError(
            f"{transaction.name} was given isolation_level {foreign!r} through execution options; say isolation= where the "
            "unit is begun"
        )
        transaction.doom.mark(error, hard=True)
        raise error
    if transaction.phase is Phase.NEW and transaction.database.driver.in_autocommit(connection):
        error = IsolationConflictError(
            f"the connection of {transaction.name} is in autocommit, where nothing can be rolled back; leave autocommit out of "
            "connect_args, and out of listeners to connect and checkout"
        )
        transaction.doom.mark(error, hard=True)
        raise error
    if transaction.phase is Phase.NEW:  # at the end of a unit a connection changes nothing
        transaction.phase = Phase.ACTIVE
    if transaction.required is not None:
        try:
            transaction.check_default(*transaction.required)
        except IsolationConflictError as error:
            # It has begun: if this is swallowed, no other statement may run in it.
            transaction.doom.mark(error, hard=True)
            raise


def _foreign_level(transaction: Transaction, connection: Connection) -> str | None:
    """Return a level that the body has set by execution options, if any; AUTOCOMMIT would undo the unit."""
    ours: Mapping[str, Any] = transaction.engine.get_execution_options() if transaction.engine else {}
    theirs = connection.get_execution_options()
    if theirs is ours:
        return None
    asked: str | None = theirs.get("isolation_level")
    return None if asked == ours.get("isolation_level") else asked


def refuse_control(transaction: Transaction, word: str) -> NoReturn:
    """Refuse SQL that would end the transaction without SQLAlchemy and the unit knowing."""
    transaction.owner.end_operation()
    error = PropagationError(
        f"{word} was sent as SQL inside {transaction.name}, which begins and ends its transaction itself; leave it to the unit, "
        "call doom() to roll back, or use propagation='nested' for a part"
    )
    transaction.doom.mark(error, hard=True)
    raise error


def refuse_implicit_commit(transaction: Transaction, word: str) -> NoReturn:
    """Refuse SQL before which MariaDB commits what is open."""
    transaction.owner.end_operation()
    error = PropagationError(
        f"{word} was sent inside {transaction.name}, which has written: MariaDB commits that first, and no rollback could take "
        "it back; send it outside the unit, before or after"
    )
    transaction.doom.mark(error, hard=True)
    raise error


def refuse_ended(transaction: Transaction, how: Ended) -> NoReturn:
    """Raise because a statement has ended the transaction, which nobody could know before."""
    transaction.watch = None
    if how is Ended.AUTOCOMMIT:
        what = "switched its connection to autocommit, so what it sends is committed"
    else:
        what = "ended its transaction, so what was sent before is committed"
    error = PropagationError(
        f"a statement in {transaction.name} {what} and cannot be rolled back; leave COMMIT and the like to the unit, and "
        "procedures that commit outside"
    )
    transaction.doom.mark(error, hard=True)
    raise error


def operation_failed(
    transaction: Transaction, error: BaseException, shown: BaseException | None, *, lost: bool, sent: bool
) -> None:
    """The connection has failed in an operation.

    Args:
        transaction: whose connection it is.
        error: the driver's own exception, or a cancellation.
        shown: what SQLAlchemy raises instead, None if it is the same.
        lost: the connection is gone.
        sent: a statement had been handed to the driver; else the server knows nothing of it.
    """
    undoing = transaction.rolling_back_to_savepoint
    transaction.pending_savepoint = None
    transaction.rolling_back_to_savepoint = False
    transaction.owner.end_operation()
    if transaction.phase.is_ending and transaction.phase is not Phase.COMMITTING:
        return
    failure = classify(error) if isinstance(error, Exception) else None
    failure = hidden_conflict(error) or failure
    if lost and isinstance(error, Exception) and (failure is None or failure.kind not in HARD):
        failure = Failure(Kind.LOST, failure.code if failure else None, error)
    hard = lost or undoing or (failure is not None and failure.kind in HARD)
    if sent or hard:
        transaction.doom.mark(shown or error, failure=failure, hard=hard)
    if transaction.replica is not None and failure is not None:
        transaction.replica.met(failure)


def before_rollback(transaction: Transaction, cause: BaseException | None) -> None:
    """A ROLLBACK is about to be sent.

    Raises:
        TaskBoundaryError: another task's statement is in flight.
    """
    if transaction.phase.is_open:
        transaction.owner.check()
    session_rolled_back(transaction, cause)


def session_rolled_back(transaction: Transaction, cause: BaseException | None) -> None:
    """SQLAlchemy has ended the transaction: a flush failed, or user code called ``rollback()``."""
    if not transaction.phase.is_open and transaction.phase is not Phase.COMMITTING:
        return
    if transaction.stream is not None:
        transaction.stream.end()
    failure = classify(cause) if isinstance(cause, Exception) else None
    if cause is None or (failure is None and transaction.doom.marked is None):
        transaction.doom.mark(cause, hard=True, reason="its transaction was rolled back inside the body")
    else:
        transaction.doom.mark(cause, hard=True, failure=failure)
