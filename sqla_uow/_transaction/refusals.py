"""What to say when a transaction takes no SQL: the fact, and what to do instead."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sqla_uow._transaction.doom import Mark

__all__ = ["GAVE_WAY", "doomed", "ended", "ending", "read_only", "stronger"]

GAVE_WAY = "this session gave way to a transaction; call current_session() again, and read again what you need"


def ended(name: str, *, scope_read: bool) -> str:
    return f"{name} has ended and its session is closed; {_instead(scope_read=scope_read)}"


def ending(name: str, *, scope_read: bool) -> str:
    return f"{name} is ending and takes no more SQL; {_instead(scope_read=scope_read)}"


def _instead(*, scope_read: bool) -> str:
    if scope_read:
        return "call current_session() again for each use"
    return "open a new unit for more SQL, or call current_session() again"


def doomed(name: str, mark: Mark, *, scope_read: bool) -> str:
    instead = "or guard the step that may fail with propagation='nested'"
    if scope_read:
        instead = "or read what may fail in a @transactional(read_only=True) function"
    return f"{name} can only be rolled back: {_why(mark)}; let the error leave the function, {instead}"


def _why(mark: Mark) -> str:
    """Return the fact behind the mark, in words without any SQL or parameter."""
    if mark.reason is not None:
        return mark.reason
    code = f" {mark.failure.code}" if mark.failure is not None and mark.failure.code is not None else ""
    kind = f" ({mark.failure.kind.value}{code})" if mark.failure is not None else ""
    return f"{type(mark.cause).__name__}{kind} was raised in it"


def read_only(what: str, name: str, *, scope_read: bool) -> str:
    if scope_read:
        return (
            f"{what} in a session that only reads; write in a @transactional function: pass the key and get_one() "
            "the object inside, or open the unit around the read as well; never merge() it"
        )
    return f"{what} in {name}, which is read-only; drop read_only=True or keep the write out of it"


def stronger(who: str, asked: str, given: str) -> str:
    return (
        f"{who} needs {asked} but joins a unit begun at {given}; begin the outer one at {asked} or "
        "use propagation='requires_new'"
    )
