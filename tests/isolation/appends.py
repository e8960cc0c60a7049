"""A checker of histories: transactions that read lists and append to them, as in Elle.

A list tells the order of its writers, and a reader's list tells between which of them it read.  So three kinds of edges
are known: a writer and the next one (ww), a writer and who has read its value (wr), a reader and the writer of what it
did not see yet (rw).  A history is serializable if and only if they make no cycle.
"""

from __future__ import annotations

from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from typing import NamedTuple


class Read(NamedTuple):
    """The list that was read."""

    key: int
    values: tuple[int, ...]


class Append(NamedTuple):
    """A value that no other append has."""

    key: int
    value: int


class History(NamedTuple):
    """What the transactions did, by number, and the lists at the end."""

    committed: dict[int, list[Read | Append]]
    unknown: dict[int, list[Read | Append]]
    """Their COMMIT was not answered: they count if somebody has seen what they wrote."""
    final: dict[int, tuple[int, ...]]


def anomaly(history: History) -> str | None:
    """Return what no serial order explains, or None."""
    seen = {value for values in history.final.values() for value in values}
    happened = history.committed | {
        number: operations
        for number, operations in history.unknown.items()
        if any(isinstance(one, Append) and one.value in seen for one in operations)
    }
    writers = {
        (one.key, one.value): number
        for number, operations in happened.items()
        for one in operations
        if isinstance(one, Append)
    }
    for key, value in writers:
        if value not in history.final[key]:
            return f"lost: {value} is not in the list of {key}"
    for operations in happened.values():
        for one in operations:
            if isinstance(one, Read) and one.values != history.final[one.key][: len(one.values)]:
                return f"{one.values} of {one.key} was read, which is no beginning of {history.final[one.key]}"
    for key, values in history.final.items():
        if strangers := [value for value in values if (key, value) not in writers]:
            return f"aborted: {strangers} of {key} were written by nobody who committed"
    return _cycle(happened, history.final, writers)


def _cycle(
    happened: dict[int, list[Read | Append]],
    final: dict[int, tuple[int, ...]],
    writers: dict[tuple[int, int], int],
) -> str | None:
    edges = [
        (writers[key, before], writers[key, after])
        for key, values in final.items()
        for before, after in pairwise(values)
    ]
    for number, operations in happened.items():
        for one in operations:
            if isinstance(one, Read):
                behind = len(one.values)
                if behind:
                    edges.append((writers[one.key, one.values[-1]], number))
                if behind < len(final[one.key]):
                    edges.append((number, writers[one.key, final[one.key][behind]]))
    order: TopologicalSorter[int] = TopologicalSorter()
    for before, after in edges:
        if before != after:
            order.add(after, before)
    try:
        order.prepare()
    except CycleError as error:
        return f"cycle of {sorted(set(error.args[1]))}"
    return None
