"""Isolation levels, and their order."""

from __future__ import annotations

from typing import get_args

from sqla_uow.typing import IsolationLevel

__all__ = ["LEVELS", "check_exists", "is_weaker_or_same"]

LEVELS: tuple[IsolationLevel, ...] = get_args(IsolationLevel)
"""Weakest first."""
_RANKS: dict[str, int] = {level: rank for rank, level in enumerate(LEVELS)}


def check_exists(isolation: object, *, who: str) -> None:
    """Refuse a level that does not exist; None asks for none.

    Args:
        isolation: what was asked for.
        who: the function that asks, for the message.

    Raises:
        ValueError: with what would be right.
    """
    if isolation is not None and isolation not in LEVELS:
        raise ValueError(
            f"{who} asks for isolation {isolation!r}, which is not an SQL level; use one of {', '.join(LEVELS)}"
        )


def is_weaker_or_same(asked: str, given: str) -> bool:
    """Say whether a unit at level `given` honours a call that asks for `asked`."""
    return _RANKS.get(asked, len(LEVELS)) <= _RANKS.get(given.replace("_", " ").upper(), -1)
