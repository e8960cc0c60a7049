"""What SERIALIZABLE refuses on PostgreSQL beyond snapshots: its rules, as in `src/backend/storage/lmgr/predicate.c`.

A transaction that reads what another one, running at the same time, writes, must come before it.  Where two such arrows
meet in one transaction, and the last of the three commits first, one of them has to go.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable

__all__ = ["RefusedError", "Serializable", "Snapshot"]


class RefusedError(Exception):
    """40001: the one that runs has to go."""


class Snapshot:
    """What a transaction sees, and its arrows."""

    __slots__ = ("before", "committed", "doomed", "over", "read", "readers", "seen", "writers")

    def __init__(self, seen: int) -> None:
        self.seen = seen  # the last commit that it sees
        self.committed: int | None = None  # its number among the commits
        self.doomed = False
        self.over = False
        self.read: set[Hashable] = set()
        self.readers: set[Snapshot] = set()  # that read what it writes: they must come before it
        self.writers: set[Snapshot] = set()  # of what it reads: they must come after it
        self.before: list[Hashable] = []  # what it wrote


class Serializable:
    """Keeps who reads and writes what, until nobody runs any more who ran at the same time."""

    def __init__(self) -> None:
        self._readers: defaultdict[Hashable, dict[Snapshot, None]] = defaultdict(dict)
        self._writers: defaultdict[Hashable, dict[Snapshot, None]] = defaultdict(dict)
        self._running: dict[Snapshot, None] = {}
        self._kept: deque[Snapshot] = deque()  # committed, in the order of their commits

    def begin(self, snapshot: Snapshot) -> None:
        """Let it take part."""
        self._running[snapshot] = None

    def reads(self, me: Snapshot, what: Iterable[Hashable]) -> None:
        """Note a read.

        Raises:
            RefusedError: it cannot be in any order with the others.
        """
        self._check(me)
        for one in what:
            for writer in list(self._writers[one]):
                if writer is not me and not writer.doomed and _concurrent(me, writer):
                    self._arrow(me, writer, me)
            if one not in me.read:
                me.read.add(one)
                self._readers[one][me] = None

    def writes(self, me: Snapshot, what: Iterable[Hashable], seen_as: Iterable[Hashable]) -> None:
        """Note a write.

        Args:
            me: who writes.
            what: that was read by these; a row, its table, a page of the index.
            seen_as: under what the readers to come will look for it.

        Raises:
            RefusedError: it cannot be in any order with the others.
        """
        self._check(me)
        for one in what:
            for reader in list(self._readers[one]):
                if reader is not me and not reader.doomed and _concurrent(me, reader):
                    self._arrow(reader, me, me)
        for one in seen_as:
            self._writers[one][me] = None
            me.before.append(one)

    def commit(self, me: Snapshot, number: int) -> None:
        """Let it commit as so-manieth.

        Raises:
            RefusedError: somebody else made it impossible meanwhile.
        """
        self._check(me)
        for near in me.readers:
            if near.committed is None and not near.doomed:
                for far in near.readers:
                    if far is me or (far.committed is None and not far.doomed):
                        near.doomed = True  # the pivot: who is run again will get through
                        break
        me.committed = number
        me.over = True
        del self._running[me]
        self._kept.append(me)
        self._forget()

    def roll_back(self, me: Snapshot) -> None:
        """Forget it."""
        if not me.over:
            me.over = True
            del self._running[me]
            self._drop(me)
            self._forget()

    def _check(self, me: Snapshot) -> None:
        if me.doomed:
            raise RefusedError

    def _arrow(self, reader: Snapshot, writer: Snapshot, me: Snapshot) -> None:
        """Note that `reader` must come before `writer`."""
        if writer in reader.writers:
            return
        if _impossible(reader, writer):
            if me is writer or writer.committed is not None:
                raise RefusedError
            writer.doomed = True
        reader.writers.add(writer)
        writer.readers.add(reader)

    def _forget(self) -> None:
        """Drop those that committed before everybody who still runs began."""
        oldest = next(iter(self._running)).seen if self._running else math.inf
        while self._kept and (self._kept[0].committed or 0) <= oldest:
            self._drop(self._kept.popleft())

    def _drop(self, me: Snapshot) -> None:
        for one in me.read:
            self._readers[one].pop(me, None)
        for one in me.before:
            self._writers[one].pop(me, None)
        for reader in me.readers:
            reader.writers.discard(me)
        for writer in me.writers:
            writer.readers.discard(me)


def _concurrent(me: Snapshot, other: Snapshot) -> bool:
    return other.committed is None or other.committed > me.seen


def _impossible(reader: Snapshot, writer: Snapshot) -> bool:
    """Say whether this arrow completes two in a row of which the last commits first."""
    for last in writer.writers:
        if last.committed is not None and all(
            one.committed is None or last.committed <= one.committed for one in (reader, writer)
        ):
            return True
    if writer.committed is None:
        return False
    return any(
        not first.doomed and (first.committed is None or first.committed >= writer.committed)
        for first in reader.readers
    )
