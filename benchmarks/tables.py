"""Tables of the pages that `report` writes."""

from __future__ import annotations

__all__ = ["table", "three_digits"]


def table(rows: list[list[str]]) -> str:
    """Return a Markdown table; the first row is its head."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|---|" + "--:|" * (len(rows[0]) - 1))
    return "\n".join(lines)


def three_digits(figure: float) -> str:
    """Return it as far as it can be believed; what is large, as a whole number."""
    return f"{figure:#.3g}" if abs(figure) < 100 else f"{figure:.0f}"  # noqa: PLR2004  # from there on all are whole
