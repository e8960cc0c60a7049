"""What the doctor found, for people and for programs."""

from __future__ import annotations

import json
import textwrap
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Finding", "Level", "as_json", "as_table", "judged"]

Level: TypeAlias = Literal["fine", "note", "warning"]

_MARKS = {"fine": "", "note": "note", "warning": "WARNING"}
_WIDTH = 100


class Finding(NamedTuple):
    """One thing that was found.

    Attributes:
        name: what was looked at.
        value: what it is.
        level: ``"fine"``; ``"note"`` is worth knowing; ``"warning"`` makes the exit status 1.
        advice: what to do, or what it means.
    """

    name: str
    value: str
    level: Level = "fine"
    advice: str = ""


def judged(name: str, value: str, advice: str, *, wrong: bool, level: Level = "note") -> Finding:
    """Return a finding that has its level and its advice only where something is wrong."""
    return Finding(name, value, level, advice) if wrong else Finding(name, value)


def as_table(findings: Sequence[Finding]) -> str:
    """Return a line for each, and its advice below."""
    left = max(len(finding.name) for finding in findings)
    lines: list[str] = []
    for finding in findings:
        mark = _MARKS[finding.level]
        lines.append(f"{finding.name:<{left}}  {finding.value}{f'  [{mark}]' if mark else ''}")
        lines += textwrap.wrap(
            finding.advice, _WIDTH, initial_indent=" " * (left + 4), subsequent_indent=" " * (left + 4)
        )
    return "\n".join(lines)


def as_json(findings: Sequence[Finding]) -> str:
    """Return an array of objects."""
    return json.dumps([finding._asdict() for finding in findings], indent=2)
