"""Which tables a statement names, by its text: those that it changes or locks, and those that it reads.

Only what takes turns with what is decided by it: a table that is missed, or one too many, costs time and nothing else.  So one
way serves the statements that SQLAlchemy has compiled and those that are written as text.
"""

from __future__ import annotations

import functools
import re
from typing import NamedTuple

__all__ = ["Tables", "tables_of"]

_LITERAL = re.compile(r"'(?:[^']|'')*'|--[^\n]*|/\*.*?\*/", re.DOTALL)
_NAME = r"""(?:"[^"]+"|`[^`]+`|\w+)(?:\s*\.\s*(?:"[^"]+"|`[^`]+`|\w+))*"""
_CHANGED = re.compile(
    rf"\b(?:(?<!FOR )(?<!KEY )(?<!DO )UPDATE|DELETE\s+FROM|MERGE\s+INTO)\s+(?:ONLY\s+)?({_NAME})", re.IGNORECASE
)
_INSERTED = re.compile(rf"\b(?:INSERT|REPLACE)\s+(?:IGNORE\s+|OR\s+\w+\s+)?INTO\s+({_NAME})", re.IGNORECASE)
_UPSERTS = re.compile(
    r"\bDO\s+UPDATE\b|\bON\s+DUPLICATE\s+KEY\s+UPDATE\b|^\s*REPLACE\b|\bOR\s+REPLACE\b", re.IGNORECASE
)
_READ = re.compile(
    rf"\b(?:FROM|JOIN|USING)\s+(?:ONLY\s+|LATERAL\s+)?({_NAME}(?:(?:\s+AS)?\s+\w+)?(?:\s*,\s*{_NAME}(?:(?:\s+AS)?\s+\w+)?)*)",
    re.IGNORECASE,
)
_LOCKS = re.compile(
    r"\bFOR\s+(?:NO\s+KEY\s+)?(?:UPDATE|SHARE)\b|\bFOR\s+KEY\s+SHARE\b|\bIN\s+SHARE\s+MODE\b", re.IGNORECASE
)
_FIRST = re.compile(_NAME)


class Tables(NamedTuple):
    """The tables of one statement, without their schemas.

    Attributes:
        changed: whose rows it updates, deletes or locks.
        inserted: that it adds rows to.
        read: that it only reads.
    """

    changed: frozenset[str]
    inserted: frozenset[str]
    read: frozenset[str]


_LOOKED_AT = 4096
"""Characters of a statement; an INSERT of many rows may have millions."""


def tables_of(statement: str) -> Tables:
    """Return the tables that a statement names."""
    return _tables_of(statement[:_LOOKED_AT])


@functools.lru_cache(maxsize=512)
def _tables_of(statement: str) -> Tables:
    text = _LITERAL.sub("''", statement)
    changed: set[str] = {_bare(name) for name in _CHANGED.findall(text)}
    inserted: set[str] = {_bare(name) for name in _INSERTED.findall(text)}
    if _UPSERTS.search(text) is not None:
        changed, inserted = changed | inserted, set()
    read: set[str] = {
        _bare(match[0])
        for names in _READ.findall(text)
        for one in names.split(",")
        if (match := _FIRST.match(one.strip()))
    } - changed
    if _LOCKS.search(text) is not None:
        changed, read = changed | read, set()
    return Tables(frozenset(changed), frozenset(inserted), frozenset(read))


def _bare(name: str) -> str:
    return re.split(r"\s*\.\s*", name)[-1].strip('"`').lower()
