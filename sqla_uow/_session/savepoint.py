"""The ``begin_nested()`` block of a unit's session."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy.orm import SessionTransaction

from sqla_uow._transaction.transaction import transaction_of
from sqla_uow.errors import UnitOfWorkError

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["UnitSavepoint"]


class UnitSavepoint(SessionTransaction):
    """The transaction of a ``begin_nested()`` block: if an error inside it was swallowed, it is rolled back, and raises.

    SQLAlchemy would release it with half of its work, or, where a flush has failed, end it without a word.
    """

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Release, or roll back and raise.

        Raises:
            RollbackOnlyError: an error inside the block was swallowed.
        """
        transaction = transaction_of(self.session)
        if kind is None and transaction is not None:
            try:
                transaction.check_sound()
            except UnitOfWorkError as refused:
                super().__exit__(type(refused), refused, refused.__traceback__)
                raise
        super().__exit__(kind, error, traceback)
