"""Which ORM objects may be put into a unit: not those of a failed attempt, and not those of the scope's read session."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from sqlalchemy import inspect

from sqla_uow._transaction.transaction import Transaction, transaction_of
from sqla_uow.errors import InstanceReuseError, ReadOnlyError

if TYPE_CHECKING:
    from sqlalchemy.orm import InstanceState, Session

    from sqla_uow._transaction.tainted import Reason, Tainted

__all__ = ["check_attach", "check_merge", "describe", "taint"]


def check_attach(transaction: Transaction, state: InstanceState[Any]) -> None:
    """Refuse an object of a failed attempt, and one of the scope's read session.

    Raises:
        InstanceReuseError: it is of a failed attempt.
        ReadOnlyError: it is of the read session, or is to be put into that.
    """
    reason = transaction.tainted.get(state) if transaction.tainted is not None else None
    if reason is not None:
        error_class = ReadOnlyError if reason == "read" else InstanceReuseError
        raise error_class(_attach_message(transaction, state, reason))
    theirs = transaction_of(state.session)
    if theirs is not None and theirs.scope_read:
        raise ReadOnlyError(_attach_message(transaction, state, "read"))
    if theirs is not None and transaction.scope_read:
        raise ReadOnlyError(_pull_message(theirs, state))
    if transaction.on_rollback is not None:
        if transaction.attached is None:
            transaction.attached = WeakSet()
        transaction.attached.add(state)


def check_merge(transaction: Transaction, state: InstanceState[Any]) -> None:
    """Refuse to copy an object of the scope's read session: `merge` would write its older state over newer data.

    Raises:
        ReadOnlyError: it is one.
    """
    theirs = transaction_of(state.session)
    tainted = transaction.tainted is not None and transaction.tainted.get(state) == "read"
    if tainted or (theirs is not None and theirs is not transaction and theirs.scope_read):
        raise ReadOnlyError(_attach_message(transaction, state, "read"))


def _pull_message(reader: Transaction, state: InstanceState[Any]) -> str:
    return (
        f"{describe(state.obj())} of {reader.name} was put into an object of the read session of this scope, where "
        "nothing is written; pass that object's key and get_one() it inside"
    )


def _attach_message(transaction: Transaction, state: InstanceState[Any], reason: Reason) -> str:
    what = describe(state.obj())
    if reason == "read":
        return (
            f"{what} was read in the read session of this scope and was put into {transaction.name}, where its state may be "
            "out of date; pass its key and get_one() it inside, and never merge() it"
        )
    return (
        f"{what} was attached in a failed attempt of {transaction.name} and was put into the next one; "
        "make or load the object inside the function, so that each attempt has its own"
    )


def taint(transaction: Transaction, session: Session, tainted: Tainted, reason: Reason) -> None:
    """Remember the objects of a session, so that no later unit takes them over."""
    for instance in session:
        tainted.add(inspect(instance), reason)
    for state in transaction.attached or ():
        tainted.add(state, reason)


def describe(instance: object) -> str:
    """Name an ORM object by class and key, as its attributes may be secret or expired."""
    state = inspect(instance, raiseerr=False)
    key = getattr(state, "identity", None)
    return f"{type(instance).__name__}({', '.join(map(repr, key)) if key else 'new'})"
