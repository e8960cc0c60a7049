"""DDL on a live table: wait for its lock only briefly, let the others pass, and try again.

Who waits for a table's exclusive lock makes everybody who comes later wait too, readers included.
"""

from __future__ import annotations

import logging
import random
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from alembic.util import CommandError
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from sqla_uow._alembic.lock import sleep
from sqla_uow._databases.database import recognised
from sqla_uow._databases.distributed import CockroachDB
from sqla_uow._databases.driver_state import family_of
from sqla_uow._databases.failures import Kind, chain, classify
from sqla_uow._databases.postgresql import milliseconds

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from alembic.operations import Operations
    from alembic.runtime.migration import MigrationContext
    from sqlalchemy.engine import Connection

__all__ = ["Patience", "patiently"]

logger = logging.getLogger("sqla_uow")

# What the transaction has locked so that others wait for it, Alembic's own table apart.
_LOCKED_BEFORE = text(
    "SELECT count(*) FROM pg_locks JOIN pg_class ON pg_class.oid = pg_locks.relation "
    "WHERE pid = pg_backend_pid() AND locktype = 'relation' AND granted AND relkind IN ('r', 'p') "
    "AND mode IN ('ShareLock', 'ShareRowExclusiveLock', 'ExclusiveLock', 'AccessExclusiveLock') AND relname <> :ours"
)


class Patience(NamedTuple):
    """How long DDL waits for a table.

    Attributes:
        lock_timeout: seconds to wait for the table's lock, while others wait behind; MariaDB counts whole ones, 1 at least.
        retries: how many times to try again, after a pause as long as that in which the others go on.
    """

    lock_timeout: float = 1.0
    retries: int = 30


def patiently(operations: Operations, table: str, patience: Patience, ddl: Callable[[], None]) -> None:
    """Run DDL that needs a table's exclusive lock, in tries that stand in nobody's way for long.

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
        with _script_limit(operations, patience):
            ddl()
        return
    connection = operations.get_bind()
    family = family_of(connection.dialect)
    if family == "sqlite":  # one writer at a time, and no table's own lock; the connection waits its busy timeout
        with _transaction_sqlite(connection):
            ddl()
        return
    if isinstance(recognised(connection), CockroachDB):  # changes a schema without a table's lock, and in no savepoint
        ddl()
        return
    retries = patience.retries if family == "mysql" else _retries_postgresql(connection, context, table, patience)
    limit = _limit_mariadb if family == "mysql" else _limit_postgresql
    attempt = 0
    while True:
        try:
            with limit(connection, patience):
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


# ---- SQLite


@contextmanager
def _transaction_sqlite(connection: Connection) -> Generator[None]:
    """Make the statements one transaction: by itself the driver begins none before DDL."""
    driver: Any = connection.connection.driver_connection
    if driver.in_transaction:
        with connection.begin_nested():
            yield
        return
    # Not a savepoint: where others write, a transaction that begins by reading may not write any more.
    connection.exec_driver_sql("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        connection.exec_driver_sql("ROLLBACK")
        raise
    connection.exec_driver_sql("COMMIT")


# ---- PostgreSQL


def _retries_postgresql(connection: Connection, context: MigrationContext, table: str, patience: Patience) -> int:
    driver: Any = connection.connection.dbapi_connection
    if connection.dialect.detect_autocommit_setting(driver):
        raise CommandError(
            f"table {table!r} is to be changed in an autocommit block, where nothing limits how long it waits for its lock; "
            "put the operation outside the block"
        )
    locked = connection.execute(_LOCKED_BEFORE, {"ours": context.version_table}).scalar_one()
    return 0 if locked else patience.retries


@contextmanager
def _limit_postgresql(connection: Connection, patience: Patience) -> Generator[None]:
    before = connection.execute(text("SELECT current_setting('lock_timeout')")).scalar_one()
    with connection.begin_nested():
        _set_lock_timeout(connection, milliseconds(patience.lock_timeout))
        yield
        _set_lock_timeout(connection, before)  # the release of a savepoint keeps SET LOCAL, its rollback does not


def _set_lock_timeout(connection: Connection, value: str) -> None:
    connection.execute(text("SELECT set_config('lock_timeout', :value, true)"), {"value": value})


# ---- MariaDB, where each DDL statement is a transaction of its own


@contextmanager
def _limit_mariadb(connection: Connection, patience: Patience) -> Generator[None]:
    before = connection.execute(text("SELECT @@SESSION.lock_wait_timeout")).scalar_one()
    connection.execute(text(f"SET SESSION lock_wait_timeout = {_whole_seconds(patience)}"))
    try:
        yield
    finally:
        if not connection.invalidated:
            connection.execute(text(f"SET SESSION lock_wait_timeout = {int(before)}"))


def _whole_seconds(patience: Patience) -> int:
    return max(1, round(patience.lock_timeout))  # 0 would be an error at once, whoever uses the table


# ---- --sql


@contextmanager
def _script_limit(operations: Operations, patience: Patience) -> Generator[None]:
    family = family_of(operations.migration_context.dialect)
    if family == "postgresql":
        operations.execute(f"SET LOCAL lock_timeout = '{milliseconds(patience.lock_timeout)}'")
        yield
        operations.execute("SET LOCAL lock_timeout = DEFAULT")
    elif family == "mysql":
        operations.execute(f"SET SESSION lock_wait_timeout = {_whole_seconds(patience)}")
        yield
        operations.execute("SET SESSION lock_wait_timeout = DEFAULT")
    else:
        yield
