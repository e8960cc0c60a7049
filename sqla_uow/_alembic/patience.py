"""DDL on a live table: wait for its lock only briefly, let the others pass, and try again.

A session that waits for a table's exclusive lock makes all that come later wait too, readers included.
"""

from __future__ import annotations

import logging
import random
from typing import TYPE_CHECKING

from alembic.util import CommandError
from sqlalchemy.exc import DBAPIError

from sqla_uow._alembic.databases import schema_in_script, schema_of
from sqla_uow._alembic.run import sleep
from sqla_uow._databases.failures import Kind, chain, classify

if TYPE_CHECKING:
    from collections.abc import Callable

    from alembic.operations import Operations

    from sqla_uow._alembic.schema import Patience

__all__ = ["patiently"]

logger = logging.getLogger("sqla_uow")


def patiently(operations: Operations, table: str, patience: Patience, ddl: Callable[[], None]) -> None:
    """Run DDL that needs a table's exclusive lock, in tries that hold up others only briefly.

    Args:
        operations: Alembic's.
        table: for messages.
        patience: how long.
        ddl: what to run; at a retry it is run again from its beginning.

    Raises:
        CommandError: the lock was not to be had; nothing of `ddl` is left behind.
    """
    context = operations.migration_context
    if context.as_sql:
        with schema_in_script(context.dialect).script_limit(operations, patience):
            ddl()
        return
    connection = operations.get_bind()
    schema = schema_of(connection)
    if not schema.waits:
        with schema.limit(connection, patience):
            ddl()
        return
    retries = schema.retries(connection, context, table, patience)
    attempt = 0
    while True:
        try:
            with schema.limit(connection, patience):
                ddl()
        except DBAPIError as error:
            if not _timed_out(error):
                raise
            if attempt >= retries:
                raise CommandError(_message(table, patience, retries)) from error
            attempt += 1
            logger.info("table %r is in use; attempt %d of %d to change it", table, attempt + 1, retries + 1)
            sleep(connection, patience.lock_timeout * random.uniform(0.5, 1.0))  # noqa: S311  # no secret
        else:
            return


def _message(table: str, patience: Patience, retries: int) -> str:
    tried = f"table {table!r} was in use for all of {retries + 1} tries of {patience.lock_timeout:g} s"
    if retries < patience.retries:
        return (
            f"{tried}, one only because this transaction has locked other tables before; put the operation first, in a "
            "migration of its own, with transaction_per_migration=True"
        )
    return f"{tried}; look for a long transaction that uses it, or pass more retries"


def _timed_out(error: DBAPIError) -> bool:
    failures = [classify(behind) for behind in chain(error)]
    # A deadlock: others may wait for us, who hold other locks, while we wait for them.
    return any(failure is not None and failure.kind in (Kind.LOCK_TIMEOUT, Kind.CONFLICT) for failure in failures)
