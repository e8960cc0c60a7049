"""Positions in the log of changes that a primary sends to its replicas."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import TypeAlias

__all__ = [
    "NOWHERE",
    "UNKNOWN",
    "Position",
    "from_text",
    "has_reached",
    "later",
    "to_text",
]

Position: TypeAlias = Mapping[int, int]
"""For each stream of changes, how far: a byte of PostgreSQL's one log, a number in each of MariaDB's domains."""

NOWHERE: Position = MappingProxyType({})
"""Nothing was written."""
UNKNOWN: Position = MappingProxyType({0: 2**64 - 1})
"""Something was written, and it is not known where: no replica gets there."""

_MOST_STREAMS = 8
_ONE = r"(?:0|[1-9]\d{0,9})-(?:0|[1-9]\d{0,19})"
_TEXT = re.compile(rf"{_ONE}(?:\.{_ONE}){{0,{_MOST_STREAMS - 1}}}", re.ASCII)


def has_reached(replayed: Position, wanted: Position) -> bool:
    """Say whether everything up to `wanted` is there."""
    return all(replayed.get(stream, -1) >= number for stream, number in wanted.items())


def later(one: Position, other: Position) -> Position:
    """Return the position that has both behind it."""
    if not one or one == UNKNOWN:  # what is not known where lies before what was written later
        return other
    return {**one, **{stream: max(number, one.get(stream, 0)) for stream, number in other.items()}}


def to_text(position: Position) -> str:
    """Write what a client keeps: digits, points and minus signs."""
    if len(position) > _MOST_STREAMS:
        position = UNKNOWN
    return ".".join(f"{stream}-{number}" for stream, number in sorted(position.items()))


def from_text(text: str) -> Position:
    """Read what a client sends; what is not exactly as it was written counts as nothing."""
    if len(text) > _MOST_STREAMS * 32 or _TEXT.fullmatch(text) is None:
        return NOWHERE
    pairs = (one.split("-") for one in text.split("."))
    position = {int(stream): int(number) for stream, number in pairs}
    fits = all(stream < 2**32 and number < 2**64 for stream, number in position.items())
    return position if fits and to_text(position) == text else NOWHERE
