"""The read session of a scope that has settings: it ends where they change."""

from __future__ import annotations

from sqla_uow._transaction.transaction import Transaction
from sqla_uow.errors import NoUnitError

__all__ = ["ToldTransaction"]


class ToldTransaction(Transaction):
    """The transaction of a read session that was told settings: they hold as long as nobody would be told others."""

    __slots__ = ()

    def before_statement(self, *, writes: bool) -> None:
        """Refuse a session that somebody has kept over a change: it would show what the settings before let him see.

        Raises:
            NoUnitError: the settings are others now.
        """
        if self.phase.is_open and self.preamble is not None:
            names = self.preamble.differing(self.name)
            if names:
                which = ", ".join(map(repr, sorted(names)))
                raise NoUnitError(
                    f"{which} has changed since {self.name} was begun; call current_session() again for each use"
                )
        super().before_statement(writes=writes)
