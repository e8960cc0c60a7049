"""What happened inside a unit that forbids its COMMIT, and which savepoints bring it back.

A *mark* is (savepoint depth, hard).  A failed statement or an inner frame that left by an exception is a soft mark:
rolling back a savepoint of its depth or above clears it.  A conflict, a lock timeout or a lost connection is a hard
mark: MariaDB has already rolled back everything (1213, 1020) or half (1205), and the caller must not go on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from sqla_uow._databases.failures import Failure
    from sqla_uow._transaction.hooks import Hooks

__all__ = ["Damage"]


class Mark(NamedTuple):
    """Why the unit may not commit."""

    depth: int
    hard: bool
    cause: BaseException | None
    failure: Failure | None = None
    reason: str | None = None
    quiet: bool = False


class _Savepoint:
    __slots__ = ("hooks", "kept", "key", "undone")

    def __init__(self, key: object, hooks: tuple[int, int, int]) -> None:
        self.key = key
        self.hooks = hooks
        self.undone = False
        self.kept = False  # the server released it, or was not asked to: what came after it is in the transaction


class Damage:
    """The stack of savepoints of one unit, and the mark that stands."""

    __slots__ = ("_hooks", "_savepoints", "mark")

    def __init__(self, hooks: Hooks) -> None:
        self._hooks = hooks
        self._savepoints: list[_Savepoint] = []
        self.mark: Mark | None = None

    @property
    def depth(self) -> int:
        return len(self._savepoints)

    def add(
        self,
        cause: BaseException | None,
        *,
        failure: Failure | None = None,
        hard: bool = False,
        reason: str | None = None,
        quiet: bool = False,
    ) -> None:
        """Mark; the first cause stays, unless the new one is hard and it was not."""
        if self.mark is None or (hard and not self.mark.hard):
            self.mark = Mark(self.depth, hard, cause, failure, reason, quiet)

    def savepoint(self, key: object) -> None:
        """Enter a savepoint, known by its name or by its ORM transaction."""
        self._savepoints.append(_Savepoint(key, self._hooks.mark()))

    def roll_back(self, key: object) -> None:
        """The savepoint is being rolled back; it stays until `leave`, which takes along all that is inside it."""
        index = self._index(key)
        if index is None:
            return
        if self._savepoints[index].kept:
            # SQLAlchemy sends no ROLLBACK TO after a RELEASE that was refused or failed, though it says it rolled back.
            self.add(None, reason="a savepoint in it could not be rolled back")
        else:
            self._savepoints[index].undone = True

    def leave(self, key: object) -> None:
        """The savepoint has ended; what it was released with is carried up, unless it was rolled back."""
        index = self._index(key)
        if index is None:
            return
        entry = self._savepoints[index]
        del self._savepoints[index:]
        if isinstance(key, str):
            self._tell_owner(kept=not entry.undone)
        if entry.undone:
            self._hooks.drop(entry.hooks)
            self._clear(index)
        else:
            self._carry(index)

    def top_of(self, kind: type) -> object | None:
        """Return the key of the innermost savepoint whose key is of this type."""
        return next((entry.key for entry in reversed(self._savepoints) if isinstance(entry.key, kind)), None)

    def _tell_owner(self, *, kept: bool) -> None:
        """Tell the ORM transaction that a savepoint on the server, known by name, belonged to."""
        owner = next((entry for entry in reversed(self._savepoints) if not isinstance(entry.key, str)), None)
        if owner is not None:
            owner.kept = kept

    def _index(self, key: object) -> int | None:
        for index in range(len(self._savepoints) - 1, -1, -1):
            if self._savepoints[index].key == key:
                return index
        return None

    def _carry(self, depth: int) -> None:
        if self.mark is not None and self.mark.depth > depth:
            self.mark = self.mark._replace(depth=depth)

    def _clear(self, depth: int) -> None:
        if self.mark is not None and not self.mark.hard and self.mark.depth > depth:
            self.mark = None
