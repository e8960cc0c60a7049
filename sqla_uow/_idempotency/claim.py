"""Take a key, look at it, and note what came of the work."""

from __future__ import annotations

import enum
import logging
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sqlalchemy.exc import DBAPIError

from sqla_uow._databases.failures import code_of
from sqla_uow._idempotency.statements import Statements, statements_of
from sqla_uow._log import log

if TYPE_CHECKING:
    from sqlalchemy import Row, Table
    from sqlalchemy.ext.asyncio import AsyncConnection

    from sqla_uow._idempotency.table import Key

__all__ = ["Claim", "Record", "claim", "find", "look", "store"]

_MARK = 16
_NOWAIT = 1205  # MariaDB: the row's lock is another's
_SQLITE_ERROR = 1
_NO_TABLE = frozenset({"42P01", 1146, _SQLITE_ERROR})


class Claim(enum.Enum):
    """What a claim is answered by where there is no record yet."""

    OURS = "the key is this transaction's"
    TAKEN = "another transaction has the key, and has not ended"


@dataclass(frozen=True, slots=True)
class Record:
    """What is known of work that is done.

    Attributes:
        fingerprint: SHA-256 of what the key was used for; None where that is not compared.
        status: of the response; None for what is no response.
        headers: of the response, each in a line.
        result: the body, or what the function returned, as JSON; None where nothing was kept.
    """

    fingerprint: bytes | None = None
    status: int | None = None
    headers: bytes | None = None
    result: bytes | None = None


async def claim(
    connection: AsyncConnection, table: Table, key: Key, *, fingerprint: bytes | None, keep: int
) -> Record | Claim:
    """Take a key in the transaction of a connection.

    On MariaDB, where `Claim.TAKEN` is a failed statement, a unit can only be rolled back behind it.

    Args:
        connection: whose transaction it is.
        table: of the keys.
        key: which.
        fingerprint: SHA-256 of what it is used for.
        keep: microseconds.
    """
    statements = _statements(connection, table)
    mark = secrets.token_bytes(_MARK)
    lock = {"lock": int.from_bytes(key.digest[:8], "big", signed=True)} if statements.locks else {}
    values = statements.parameters(
        digest=key.digest, space=key.space, fingerprint=fingerprint, mark=mark, keep=keep, **lock
    )
    try:
        row = (await connection.execute(statements.claim, values)).one_or_none()
    except DBAPIError as error:
        # Also where the lock is on a gap, or on the table: to wait, and to claim again, is right for each of them.
        if _code(error) == _NOWAIT:
            return Claim.TAKEN
        _tell_of_missing_table(error, table)
        raise
    if row is None:
        return Claim.TAKEN
    return Claim.OURS if row.headers == mark else _record(row)


async def find(connection: AsyncConnection, table: Table, key: Key) -> Record | None:
    """Read the record of a key, None where there is none."""
    statements = _statements(connection, table)
    try:
        row = (await connection.execute(statements.find, statements.parameters(digest=key.digest))).one_or_none()
    except DBAPIError as error:
        _tell_of_missing_table(error, table)
        raise
    return None if row is None else _record(row)


async def look(connection: AsyncConnection, table: Table, key: Key) -> Record | Claim:
    """Return what a claim would be answered, in a transaction that is rolled back afterwards."""
    if _statements(connection, table).has_one_writer:  # whoever claims it would wait for that one
        return await find(connection, table, key) or Claim.OURS
    return await claim(connection, table, key, fingerprint=None, keep=1)


async def store(connection: AsyncConnection, table: Table, key: Key, kept: Record) -> None:
    """Note what came of the work, in the transaction that has the key."""
    statements = _statements(connection, table)
    values = statements.parameters(
        digest=key.digest, fingerprint=kept.fingerprint, status=kept.status, headers=kept.headers, result=kept.result
    )
    await connection.execute(statements.store, values)


def _statements(connection: AsyncConnection, table: Table) -> Statements:
    sync = connection.sync_connection
    assert sync is not None
    return statements_of(table, sync)


def _record(row: Row[Any]) -> Record:
    # The headers of what is no response are the mark of its claim
    return Record(row.fingerprint, row.status, None if row.status is None else row.headers, row.result)


def _code(error: DBAPIError) -> str | int | None:
    return None if error.orig is None else code_of(error.orig)


def _tell_of_missing_table(error: DBAPIError, table: Table) -> None:
    """Tell the operator what to do; the caller's error is that of the database."""
    if _code(error) in _NO_TABLE:
        log(
            logging.ERROR, "the table %r of IdempotencyKeys cannot be used (%s); make it by a migration, which "
            "'alembic revision --autogenerate' writes where env.py has its MetaData", table.fullname, _code(error),
            error=error,
        )  # fmt: skip
