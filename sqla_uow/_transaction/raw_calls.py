"""What user code sends on the driver's own connection, without SQLAlchemy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqla_uow._databases.driver import State
from sqla_uow._databases.failures import HARD, classify
from sqla_uow._transaction.phase import Phase
from sqla_uow._transaction.statement_kind import ends_raw

if TYPE_CHECKING:
    from sqla_uow._databases.driver import Driver
    from sqla_uow._transaction.transaction import Transaction

__all__ = ["RawCalls", "mark_ended", "raw_failed"]

_NOBODY = object()


class RawCalls:
    """Notes what is sent on a driver's connection.

    Args:
        transaction: whose connection it is.
        driver: of the connection.
        raw: the driver's own connection.
    """

    __slots__ = ("_driver", "_raw", "_transaction")

    def __init__(self, transaction: Transaction, driver: Driver, raw: Any) -> None:
        self._transaction = transaction
        self._driver = driver
        self._raw = raw

    def begin_raw(self) -> object:
        """A call begins, by SQLAlchemy or by user code.

        Returns:
            what `end_raw` needs; None for a call of SQLAlchemy, and in a unit that is ending.
        """
        self._look()
        transaction = self._transaction
        if transaction.owner.in_flight is not None or not transaction.phase.is_open:
            return None
        before = transaction.owner.hold() or _NOBODY
        if transaction.stream is not None and transaction.database.system.one_result:
            try:
                transaction.stream.check_unread("a statement was sent on the driver's own connection")
            except BaseException:
                self.end_raw(before)
                raise
        return before

    def end_raw(self, begun: Any) -> None:
        """The call has ended."""
        if begun is not None:
            self._transaction.owner.let_go(None if begun is _NOBODY else begun)

    def raw_failed(self, error: BaseException) -> None:
        """A call has failed."""
        if not self._transaction.database.system.fails_whole:
            raw_failed(self._transaction, error)
        elif isinstance(error, Exception):  # else a savepoint there may have brought it back, as the driver knows
            _raw_conflicted(self._transaction, error)

    def raw_sent(self, text: str) -> None:
        """A call has succeeded.

        Args:
            text: its SQL, "" if that is not known.
        """
        transaction = self._transaction
        was_open, state = transaction.was_open, self._look()
        # asyncpg's word may come when the body has just ended.
        open_here = transaction.phase.is_active or transaction.phase is Phase.COMMITTING
        if not open_here or transaction.owner.in_flight is not None:
            return
        if (was_open and state is State.NONE) or ends_raw(transaction.database.system, text):
            mark_ended(transaction)

    def _look(self) -> State | None:
        state = self._driver.state(self._raw)
        self._transaction.was_open = self._transaction.was_open or state is State.OPEN
        return state


def raw_failed(transaction: Transaction, error: BaseException) -> None:
    """A statement of user code has failed on the driver's own connection; SQLAlchemy reports its own failures."""
    if transaction.owner.in_flight is None and (transaction.phase.is_active or transaction.phase is Phase.COMMITTING):
        failure = classify(error) if isinstance(error, Exception) else None
        transaction.doom.mark(error, failure=failure, hard=failure is not None and failure.kind in HARD)


def _raw_conflicted(transaction: Transaction, error: Exception) -> None:
    """Note a failure after which all must run again.  asyncpg may report it when the unit is already rolling back."""
    failure = classify(error)
    if failure is None or failure.kind not in HARD or transaction.owner.in_flight is not None:
        return
    if transaction.phase.is_active or transaction.phase is Phase.COMMITTING:
        transaction.doom.mark(error, failure=failure, hard=True)
    elif transaction.phase is Phase.ENDING and transaction.connect_failure is None:
        transaction.connect_failure = failure


def mark_ended(transaction: Transaction) -> None:
    """Doom the unit: its transaction is over, whatever has been begun since on the driver's own connection."""
    transaction.doom.mark(None, hard=True, reason="its transaction was ended on the driver's own connection")
