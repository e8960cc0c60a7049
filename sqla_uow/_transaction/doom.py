"""Why a unit may not commit, and which savepoints take that back.

A *mark* has a savepoint depth and is soft or hard.  A failed statement makes a soft mark, and so does a joined function that
raises: rolling back a savepoint that was begun before the mark clears it.  A conflict, a lock timeout or a lost connection
makes a hard mark, which stays: MariaDB has already rolled back everything (1213, 1020) or half of it (1205), and the caller
must not go on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from sqla_uow._databases.failures import Failure
    from sqla_uow._transaction.hooks import Hooks

__all__ = ["Doom"]


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


class Doom:
    """The savepoints of one unit, innermost last, and the mark if there is one."""

    __slots__ = ("_hooks", "_savepoints", "marked")

    def __init__(self, hooks: Hooks) -> None:
        self._hooks = hooks
        self._savepoints: list[_Savepoint] = []
        self.marked: Mark | None = None

    @property
    def depth(self) -> int:
        return len(self._savepoints)

    def mark(
        self,
        cause: BaseException | None,
        *,
        failure: Failure | None = None,
        hard: bool = False,
        reason: str | None = None,
        quiet: bool = False,
    ) -> None:
        """Forbid COMMIT.  The first cause stays, unless the new one is hard and the first was soft."""
        if self.marked is None or (hard and not self.marked.hard):
            self.marked = Mark(self.depth, hard, cause, failure, reason, quiet)

    def begin_savepoint(self, key: object) -> None:
        """A savepoint begins.  Its key is its name on the server, or its `SessionTransaction`."""
        self._savepoints.append(_Savepoint(key, self._hooks.counts()))

    def roll_back_savepoint(self, key: object) -> None:
        """The savepoint is being rolled back; `end_savepoint` follows, and ends those inside it as well."""
        index = self._index(key)
        if index is None:
            return
        if self._savepoints[index].kept:
            # SQLAlchemy sends no ROLLBACK TO after a RELEASE that was refused or failed, though it says it rolled back.
            self.mark(None, reason="a savepoint in it could not be rolled back")
        else:
            self._savepoints[index].undone = True

    def end_savepoint(self, key: object) -> None:
        """The savepoint has ended.  If it was not rolled back, its mark and its hooks now belong to what is around it."""
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
        """Tell the `SessionTransaction` that the server's savepoint belonged to, how that ended."""
        owner = next((entry for entry in reversed(self._savepoints) if not isinstance(entry.key, str)), None)
        if owner is not None:
            owner.kept = kept

    def _index(self, key: object) -> int | None:
        for index in range(len(self._savepoints) - 1, -1, -1):
            if self._savepoints[index].key == key:
                return index
        return None

    def _carry(self, depth: int) -> None:
        if self.marked is not None and self.marked.depth > depth:
            self.marked = self.marked._replace(depth=depth)

    def _clear(self, depth: int) -> None:
        if self.marked is not None and not self.marked.hard and self.marked.depth > depth:
            self.marked = None
