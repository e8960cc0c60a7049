"""What is checked before COMMIT is sent, and when it was answered; `_session.connection` sends it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqla_uow._databases.driver import State
from sqla_uow._transaction.phase import Phase
from sqla_uow._transaction.raw_calls import mark_ended
from sqla_uow.errors import PropagationError

if TYPE_CHECKING:
    from greenlet import greenlet

    from sqla_uow._transaction.transaction import Transaction

__all__ = ["before_commit", "being_committed", "check_driver", "refuse_answer", "refuse_closed"]

being_committed: dict[greenlet, Transaction] = {}
"""The transactions that are being committed, by greenlet.  There SQLAlchemy's own events call code of the user."""


def before_commit(transaction: Transaction) -> None:
    """COMMIT was asked for.

    Raises:
        PropagationError: not by the end of the unit.
        RollbackOnlyError: the unit is doomed.
    """
    if transaction.phase is not Phase.COMMITTING or not transaction.is_ending_here():
        error = PropagationError(
            "COMMIT was called on a session that only reads; write in a @transactional function, which commits at its end"
            if transaction.scope_read
            else f"COMMIT was called inside {transaction.name}, which commits at its own end; remove the commit() "
            "or use propagation='requires_new' for a part that must be durable earlier"
        )
        transaction.doom.mark(error, hard=True)
        raise error
    transaction.check_sound()


def check_driver(transaction: Transaction, state: State | None) -> None:
    """Take the driver's word on the transaction that is to be committed.

    Raises:
        RollbackOnlyError: nothing is left to commit.
    """
    if state is State.FAILED:
        transaction.doom.mark(None, hard=True, reason="a statement in it failed on the driver's own connection")
    elif state is State.NONE and transaction.was_open:
        mark_ended(transaction)
    elif state is State.BUSY:
        transaction.doom.mark(None, hard=True, reason="an operation on the driver's own connection is still under way")
    transaction.check_sound()


def refuse_closed(transaction: Transaction) -> None:
    """COMMIT was not sent, as the connection is closed.

    Raises:
        RollbackOnlyError: always.
    """
    transaction.phase = Phase.COMMITTING
    transaction.doom.mark(None, hard=True, reason="the driver's own connection was closed in it")
    transaction.check_sound()


def refuse_answer(transaction: Transaction) -> None:
    """The server has answered COMMIT by ROLLBACK.

    Raises:
        RollbackOnlyError: always.
    """
    transaction.phase = Phase.COMMITTING  # the outcome is known
    transaction.doom.mark(
        None,
        hard=True,
        reason="the server answered its COMMIT by ROLLBACK, because a statement had failed on the driver's own connection",
    )
    transaction.check_sound()
