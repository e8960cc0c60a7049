"""The turn of one attempt, where something has conflicted lately."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqla_uow._retry.gate import ANY, Entry

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqla_uow._retry.gate import Gate
    from sqla_uow._retry.groups import Group, Groups, Member

__all__ = ["Turn"]

BESIDE = (0, 1, 3)
"""How many others may run beside an attempt that has so many retries left, once it has failed."""


class Turn:
    """The right of one attempt to run.

    Args:
        groups: of its manager.
        find: returns its function's; asked when the turn is taken, as a request learns its route only while it is handled.
        attempt: its number, from 1.
        left: how many may follow it.
        rng: of its policy.

    Attributes:
        member: its function's, once the turn is taken.
        is_last: it waits for locks as long as it takes.
        lock_wait: seconds that it waits for a lock; None is for ever.
        taken: it runs.
    """

    __slots__ = (
        "_attempt", "_began", "_beside", "_find", "_group", "_groups", "_rng", "_seconds", "is_last", "lock_wait", "member", "taken",
    )  # fmt: skip

    def __init__(
        self, groups: Groups, find: Callable[[], Member], attempt: int, left: int, rng: Callable[[float, float], float]
    ) -> None:
        self.member: Member | None = None
        self.taken: bool = False
        self.is_last: bool = left == 0
        self.lock_wait: float | None = None
        self._groups = groups
        self._find = find
        self._attempt = attempt
        self._beside = ANY if attempt == 1 or left >= len(BESIDE) else BESIDE[left]
        self._rng = rng
        self._group: Group | None = None
        self._began = 0.0
        self._seconds: float | None = None

    @property
    def gate(self) -> Gate | None:
        """Where it has waited; None if its function waits for nobody."""
        return None if self._group is None else self._group.gate

    async def take(self, until: float | None = None) -> bool:
        """Wait for it.

        Args:
            until: in the time of the loop, or None.

        Returns:
            whether it came in time.
        """
        member = self.member = self._find()
        member.begin()
        while (group := member.group) is not None:
            gate = group.gate
            entry = Entry.IN if gate.try_enter(self._beside) else await self._wait(gate, until)
            if entry is Entry.LATE:
                return False
            if entry is Entry.IN:
                self._group, self._began = group, gate.clock()
                if not self.is_last:
                    self.lock_wait = self._lock_wait(gate)
                break
        self.taken = True
        return True

    async def _wait(self, gate: Gate, until: float | None) -> Entry:
        return await gate.enter(self._beside, until, again=self._attempt > 1)

    def _lock_wait(self, gate: Gate) -> float | None:
        longest = gate.lock_wait(self._attempt)
        # Two that wait for each other began at the same time: with the same patience both would go, and meet again.
        return None if longest is None else max(longest / 2, self._rng(longest / 2, longest))

    def note(self, statement: str) -> None:
        """Remember the tables of a statement that it sends."""
        if self.member is not None:
            self.member.note(statement)

    def free(self, *, committed: bool) -> None:
        """Give it back; called as soon as the transaction has ended, before its hooks."""
        group = self._group
        if group is not None and self._seconds is None:
            gate = group.gate
            self._seconds = gate.clock() - self._began
            gate.left(self._began, self._seconds, self._beside, committed=committed)
            if gate.controller.calm:
                self._groups.end(group)

    def conflicted(self) -> None:
        """Say that a conflict had ended the attempt."""
        if self._group is not None:
            self._group.gate.conflicted(self._began, self._seconds or 0.0)
