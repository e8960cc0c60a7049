"""What is sent to the database."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import event

if TYPE_CHECKING:
    from collections.abc import Callable


def statements(engine: Any, wanted: Callable[[str], object] = bool) -> list[str]:
    """Return the list into which the engine's statements are written from now on, or those of them that are wanted."""
    sent: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
        if wanted(statement):
            sent.append(statement)

    event.listen(engine.sync_engine, "before_cursor_execute", note)
    return sent
