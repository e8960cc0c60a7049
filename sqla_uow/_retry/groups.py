"""Which functions get in each other's way: those that meet conflicts on the same tables are a group.

A gate for each function would be wrong in both directions.  Four functions that change the same rows conflict with each
other, and the calls of one may have nothing to do with each other.  So nobody waits until something has conflicted; then
the functions whose own attempts meet conflicts on a table take turns together, until conflicts are few again.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary, WeakSet

from sqla_uow._log import log
from sqla_uow._retry.gate import Gate
from sqla_uow._retry.tables import tables_of
from sqla_uow.typing import Contention

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["FREE", "Group", "Groups", "Member", "together"]

FREE = Contention(None, 0, 0, 0.0)
"""The state of a function that waits for nobody."""

RECENT = 64
"""Attempts of a function after which older ones count half."""
ENOUGH = 3
"""Conflicts of a function before it takes turns with others: one or two are chance."""
OFTEN = 0.05
"""Share of a function's attempts that must meet conflicts before it takes turns with others."""
MAIN = 0.2
"""Share of a function's conflicts that must be on a table before it takes turns with the others there."""


class Member:
    """What is known of one function, of one block or of one route, since something has conflicted.

    Args:
        name: for the log.

    Attributes:
        group: with which it takes turns; None where it waits for nobody.
    """

    __slots__ = ("__weakref__", "_changed", "_inserted", "_met", "_read", "attempts", "conflicts", "group", "name")

    def __init__(self, name: str) -> None:
        self.name: str = name
        self.group: Group | None = None
        self.attempts: int = 0
        self.conflicts: int = 0
        self._changed: set[str] = set()
        self._inserted: set[str] = set()
        self._read: set[str] = set()
        self._met: dict[str, float] = {}  # conflicts by table

    def begin(self) -> None:
        """Count an attempt."""
        self.attempts += 1
        if self.attempts >= RECENT:
            self.attempts //= 2
            self.conflicts //= 2

    def note(self, statement: str) -> None:
        """Remember the tables that it uses."""
        changed, inserted, read = tables_of(statement)
        self._changed |= changed
        self._inserted |= inserted
        self._read |= read

    def meet(self, statement: str | None, others: list[Member]) -> None:
        """Count a conflict.

        Args:
            statement: that has failed; None where it was COMMIT, or is not known.
            others: what they change may be what this one has read, if it reads what others must not change.
        """
        self.conflicts += 1
        tables = () if statement is None else tables_of(statement)
        where = set[str]() if not tables else set(tables[0] or tables[1])
        if not where:
            where = {table for table in self._met if table in self._changed} or self._changed or self._inserted
            where = where | {table for table in self._read if any(table in other._changed for other in others)}
        if len(self._met) > RECENT:
            self._met.clear()
        for table in self._met:
            self._met[table] *= 1 - 1 / RECENT
        for table in where:
            self._met[table] = self._met.get(table, 0.0) + 1.0

    def where(self) -> set[str]:
        """Return the tables on which most of its conflicts are."""
        least = MAIN * sum(self._met.values())
        return {table for table, number in self._met.items() if number >= least}

    def conflicts_often(self) -> bool:
        """Say whether its conflicts are more than chance."""
        return self.conflicts >= ENOUGH and self.conflicts >= OFTEN * self.attempts

    def forget(self) -> None:
        """Begin anew: its group has ended."""
        self.group = None
        self.conflicts = self.attempts = 0
        self._met.clear()


class Group:
    """Functions that meet conflicts on the same tables.

    Args:
        clock: monotonic seconds.

    Attributes:
        gate: where their calls wait for their turn.
        members: the functions, as long as somebody else knows them.
        tables: on which they have met conflicts.
    """

    __slots__ = ("gate", "members", "tables")

    def __init__(self, clock: Callable[[], float]) -> None:
        self.gate: Gate = Gate(clock)
        self.members: WeakSet[Member] = WeakSet()
        self.tables: set[str] = set()

    def names(self) -> tuple[str, ...]:
        """Return what the log calls its functions."""
        return tuple(sorted({member.name for member in self.members}))

    def add(self, member: Member) -> None:
        """Let a function take turns with the others."""
        member.group = self
        self.members.add(member)
        self.gate.controller.who = ", ".join(self.names())


class Groups:
    """The groups of one manager in one event loop.

    Attributes:
        hot: each group that has met conflicts lately.
    """

    __slots__ = ("_of_functions", "_of_names", "hot")

    def __init__(self) -> None:
        self.hot: list[Group] = []
        self._of_functions: WeakKeyDictionary[object, Member] = WeakKeyDictionary()
        self._of_names: dict[str, Member] = {}

    def known(self, key: object) -> Member | None:
        """Return what is known of a function; None if nothing is."""
        return self._of_names.get(key) if isinstance(key, str) else self._of_functions.get(key)

    def member(self, key: object, name: Callable[[object], str]) -> Member:
        """Return what is known of a function.

        Args:
            key: the function, known by identity; or the name of a route.
            name: finds what the log calls it.
        """
        member = self.known(key)
        if member is None:
            member = Member(name(key))
            if isinstance(key, str):
                self._of_names[key] = member
            else:
                self._of_functions[key] = member
        return member

    def conflict(self, member: Member, statement: str | None, clock: Callable[[], float]) -> None:
        """Let a function that has met a conflict take turns with those that it meets.

        Args:
            member: the function.
            statement: that has failed; None where it was COMMIT, or is not known.
            clock: monotonic seconds.
        """
        member.meet(statement, [other for group in self.hot for other in group.members])
        tables = member.where()
        there = [group for group in self.hot if group.tables & tables and group is not member.group]
        if there and not member.conflicts_often():
            return
        group = member.group
        for other in there:
            group = other if group is None else self._merge(group, other)
        if group is None:
            # Groups whose functions are gone are in nobody's way.
            self.hot[:] = [one for one in self.hot if one.members or not one.gate.is_idle()]
            group = Group(clock)
            self.hot.append(group)
        new = tables - group.tables
        group.tables |= tables
        if member.group is not group or new:
            group.add(member)
            _tell(group)

    def end(self, group: Group) -> None:
        """End a group: its conflicts have become few."""
        if group not in self.hot:  # another has taken it over
            return
        self.hot.remove(group)
        for member in group.members:
            member.forget()
        group.gate.end()
        if not self.hot:
            self._of_names.clear()

    def _merge(self, one: Group, other: Group) -> Group:
        """Make one group of two; the one that holds more back stays."""
        stays, goes = (one, other) if one.gate.controller.width <= other.gate.controller.width else (other, one)
        self.hot.remove(goes)
        stays.tables |= goes.tables
        for member in goes.members:
            stays.add(member)
        goes.gate.end(stays.gate)
        return stays


def _tell(group: Group) -> None:
    names = group.names()
    if len(names) > 1:
        who, tables = ", ".join(names), sorted(group.tables)
        log(
            logging.INFO, "%s meet conflicts on %s; their calls take turns together", who, ", ".join(tables) or "the same rows",
            function=who, tables=tables,
        )  # fmt: skip


def together(states: list[Contention]) -> Contention:
    """Return the state of a function whose calls run in several event loops."""
    if len(states) == 1:
        return states[0]
    return Contention(
        None if any(state.width is None for state in states) else sum(state.width or 0 for state in states),
        sum(state.running for state in states),
        sum(state.waiting for state in states),
        max(state.wasted for state in states),
    )
