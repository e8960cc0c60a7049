"""What SQLAlchemy's events tell of statements, savepoints and rollbacks on a unit's connection."""

from __future__ import annotations

import sys
from functools import partial
from typing import TYPE_CHECKING, Any

from sqlalchemy import event

from sqla_uow._databases.driver import Ended
from sqla_uow._session.streams import open_stream
from sqla_uow._transaction.raw_calls import raw_failed
from sqla_uow._transaction.reports import (
    before_rollback,
    refuse_control,
    refuse_ended,
    refuse_implicit_commit,
)
from sqla_uow._transaction.statement_kind import (
    CONTROL,
    OPENING,
    SOMETHING,
    Rows,
    does,
    ends_in_its_tail,
    rows_of,
    selects,
)
from sqla_uow.errors import PropagationError

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqla_uow._session.connection import UnitConnection
    from sqla_uow._transaction.transaction import Transaction

__all__ = ["lift", "listen_to"]


def _before_cursor_execute(  # noqa: PLR0917  # SQLAlchemy's signature
    connection: UnitConnection,
    cursor: Any,
    statement: str,
    parameters: Any,
    context: Any,
    many: bool,  # noqa: FBT001  # SQLAlchemy's signature
) -> tuple[str, Any]:
    transaction = connection.transaction
    if transaction.lifts_lock_wait and transaction.is_calm() and not transaction.rolling_back_to_savepoint:
        lift(connection)
    # isdelete is documented for DefaultExecutionContext only, but every dialect's context is one.
    writes = context is not None and (context.isinsert or context.isupdate or context.isdelete)
    try:
        transaction.before_statement(writes=writes)
    except PropagationError:
        if context is not None and context._is_server_side:  # SQLAlchemy 2.0 leaves it open, so psycopg warns
            connection._safe_close_cursor(cursor)
        raise
    if context is not None:
        context.sent_by_unit = True
    if writes:
        transaction.wrote = transaction.wrote_rows = True
    else:
        kind = does(statement.lstrip()[:OPENING])
        if kind is CONTROL and not (transaction.database.system.begins_by_sql and statement[:5] == "BEGIN"):
            refuse_control(transaction, statement.split(maxsplit=1)[0].upper())
        if transaction.pending_savepoint is not None:
            transaction.pending_savepoint = statement.rpartition(" ")[2]
        elif (
            kind is SOMETHING
            and not (transaction.wrote_rows and not transaction.database.system.ddl_commits)
            and not selects(context)
        ):
            transaction.wrote = True
            _note_rows(transaction, statement)
    if transaction.deadline is not None and transaction.database.system.limits_statements and not many:
        statement = transaction.database.system.limit(statement, transaction.deadline - transaction.clock())
    return statement, parameters


def lift(connection: UnitConnection) -> None:
    """Let an attempt that has become the last wait for locks; another statement may be about to be sent."""
    transaction = connection.transaction
    pending, wrote = transaction.pending_savepoint, transaction.wrote
    transaction.lifts_lock_wait, transaction.pending_savepoint = False, None
    transaction.database.system.lift_lock_wait(connection)
    transaction.lifted_lock_wait, transaction.pending_savepoint, transaction.wrote = True, pending, wrote


def _note_rows(transaction: Transaction, statement: str) -> None:
    """Note that the unit has written rows; refuse what would commit them on MariaDB."""
    if transaction.database.system.ddl_commits:
        statement = statement.lstrip()
        rows = rows_of(statement[:OPENING])
        if rows is Rows.OUTLIVES or (rows is Rows.COMMITS and transaction.wrote_rows):
            refuse_implicit_commit(transaction, " ".join(statement.split(maxsplit=2)[:2]).upper())
        if rows is not Rows.WRITES:
            return
    transaction.wrote_rows = True


def _after_cursor_execute(
    connection: UnitConnection,
    _cursor: Any,
    statement: str,
    _parameters: Any,
    context: Any,
    _many: bool,  # noqa: FBT001  # SQLAlchemy's signature
) -> None:
    transaction = connection.transaction
    transaction.after_statement()
    if transaction.turn is not None:
        transaction.turn.note(statement)
    if context._is_server_side:
        context.cursor_fetch_strategy = open_stream(transaction, context)
    watch = transaction.watch
    if watch is not None:
        how = watch(transaction.wrote_rows)
        if how is not None:
            _ended(connection, transaction, how, statement)


def _hear_next_results(connection: UnitConnection, transaction: Transaction) -> None:
    raw = connection.raw
    if "next_result" not in vars(raw):
        transaction.unwatch += (connection.driver.tell_next_results(raw, partial(raw_failed, transaction)),)


def _ended(connection: UnitConnection, transaction: Transaction, how: Ended, statement: str) -> None:
    """Doom the unit, as a statement has ended its transaction; leave no autocommit to the next user of the connection."""
    if how is Ended.MAYBE:
        _hear_next_results(connection, transaction)
        if not ends_in_its_tail(statement):
            return
    if how is Ended.AUTOCOMMIT:
        lent: Any = connection._dbapi_connection
        lent.dbapi_connection.autocommit(False)  # noqa: FBT003  # the driver's signature
    refuse_ended(transaction, how)


def _rollback(connection: UnitConnection) -> None:
    transaction = connection.transaction
    before_rollback(transaction, sys.exception())
    if transaction.stream is not None:
        transaction.stream.close_if_left()


def _savepoint(connection: UnitConnection, _name: str | None) -> None:
    connection.transaction.pending_savepoint = ""  # the name is made later, and read from the statement


def _rollback_savepoint(connection: UnitConnection, name: str, _context: None) -> None:
    transaction = connection.transaction
    transaction.check_not_ending()
    if transaction.stream is not None:
        transaction.stream.end()
    transaction.doom.roll_back_savepoint(name)
    transaction.doom.end_savepoint(name)
    transaction.rolling_back_to_savepoint = True
    if transaction.lifted_lock_wait:
        transaction.lifts_lock_wait = True  # again, as SET LOCAL is undone with the savepoint


def _release_savepoint(connection: UnitConnection, name: str, _context: None) -> None:
    connection.transaction.doom.end_savepoint(name)


_LISTENERS: dict[str, Callable[..., Any]] = {
    "before_cursor_execute": _before_cursor_execute,
    "after_cursor_execute": _after_cursor_execute,
    "rollback": _rollback,
    "savepoint": _savepoint,
    "rollback_savepoint": _rollback_savepoint,
    "release_savepoint": _release_savepoint,
}


def listen_to(connections: type[UnitConnection]) -> None:
    """Listen to the class of the units' connections, not to an engine: so nobody else's statements pay for it."""
    for name, listener in _LISTENERS.items():
        event.listen(connections, name, listener, retval=name == "before_cursor_execute")
