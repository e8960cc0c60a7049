"""MariaDB and MySQL, and their drivers asyncmy and aiomysql."""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING, Any, ClassVar

from sqlalchemy import text
from sqlalchemy.util import await_only, greenlet_spawn

from sqla_uow._databases.driver import Driver, Ended, RawCalls, State, cover, raw_connection, told
from sqla_uow._databases.system import System
from sqla_uow._log import log

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from sqlalchemy.engine import Connection
    from sqlalchemy.ext.asyncio import AsyncConnection

    from sqla_uow._databases.system import Opening
    from sqla_uow.typing import IsolationLevel

__all__ = ["Aiomysql", "Asyncmy", "MariaDB", "MySQL"]

BALANCER_TRIES = 4
"""Connections made to find the server that a statement runs on, where one address leads to several."""
_IDENTITY = "sqla_uow.server"
_WHO_ARE_YOU = "SELECT @@hostname, @@port, @@server_id, @@datadir, @@pid_file"
_LIMITABLE = re.compile(r"\s*(SELECT|INSERT|UPDATE|DELETE|REPLACE|WITH)\b", re.IGNORECASE)
# The inner unit may wait for a third one that waits for the outer one.
_BLOCKER = (
    "WITH RECURSIVE wait(asks, has) AS (SELECT asks.trx_mysql_thread_id, has.trx_mysql_thread_id "
    "FROM information_schema.innodb_lock_waits JOIN information_schema.innodb_trx asks ON asks.trx_id = requesting_trx_id "
    "JOIN information_schema.innodb_trx has ON has.trx_id = blocking_trx_id), "
    "blocker(pid) AS (SELECT has FROM wait WHERE asks = {inner} UNION "
    "SELECT wait.has FROM wait JOIN blocker ON wait.asks = blocker.pid) SELECT pid FROM blocker WHERE pid IN ({outer})"
)
# MariaDB does not tell which session has a metadata lock.  It is the outer one if no other is in a transaction or a statement.
_METADATA_BLOCKER = (
    "SELECT id FROM information_schema.processlist WHERE id IN ({outer}) "
    "AND EXISTS (SELECT 1 FROM information_schema.processlist WHERE id = {inner} AND state LIKE 'Waiting for % metadata lock') "
    "AND NOT EXISTS (SELECT 1 FROM information_schema.processlist p LEFT JOIN information_schema.innodb_trx t "
    "ON t.trx_mysql_thread_id = p.id WHERE p.id NOT IN ({inner}, {outer}, connection_id()) "
    "AND (t.trx_id IS NOT NULL OR p.command = 'Query'))"
)
# https://mariadb.com/kb/en/ok_packet/
_IN_TRANSACTION, _AUTOCOMMIT = 1, 2


class MySQL(System):
    """MySQL; until the first connection also MariaDB under the name of MySQL."""

    family: str = "mariadb"
    updates_two_tables: ClassVar[bool] = True
    ddl_is_apart: ClassVar[bool] = True
    ddl_commits: ClassVar[bool] = True
    one_result: ClassVar[bool] = True
    has_positions: ClassVar[bool] = True
    primary_position: ClassVar[str] = "SELECT @@global.gtid_binlog_pos"
    replica_position: ClassVar[str] = "SELECT @@global.gtid_slave_pos"
    blockers: ClassVar[tuple[str, ...]] = (_BLOCKER, _METADATA_BLOCKER)
    stop_session: ClassVar[str] = "KILL QUERY {inner}"
    quoted: ClassVar[re.Pattern[str] | None] = re.compile(
        r"'(?:[^'\\]|\\.|'')*'|\"(?:[^\"\\]|\\.|\"\")*\"|`[^`]*`|--\s[^\n]*|#[^\n]*|/\*.*?\*/", re.DOTALL
    )

    def __init__(self, name: str = "mysql") -> None:
        super().__init__(name)
        self.title: str = "MySQL"

    def recognise(self, connection: Connection, driver: Driver) -> System:
        """Return MariaDB, if that has answered: SQLAlchemy asks with the first connection."""
        return MariaDB() if getattr(connection.dialect, "is_mariadb", False) else self

    def engine_options(self, isolation: IsolationLevel | None, *, read_only: bool) -> dict[str, Any]:
        """Return none: SQLAlchemy's SET SESSION would cost four round trips."""
        return {}

    def open(self, connection: Any, driver: Driver, unit: Opening) -> None:
        """Set the level for the next transaction only, so that nothing has to be set back."""
        parts = [f"ISOLATION LEVEL {unit.isolation}"] if unit.isolation is not None else []
        parts += ["READ ONLY"] if unit.read_only else []
        if parts:
            connection.exec_driver_sql(f"SET TRANSACTION {', '.join(parts)}")

    def read_position(self, answer: str) -> Mapping[int, int]:
        """Read a GTID position, as in ``"0-1-123,7-1-5"``: domain, server and number."""
        parts = (one.split("-") for one in answer.split(","))
        return {int(domain): int(number) for domain, _server, number in parts}

    async def may_lose_locks(self, connection: AsyncConnection) -> bool:
        """Say whether the server certifies its transactions with other nodes of a Galera cluster."""
        row = (await connection.execute(text("SHOW GLOBAL VARIABLES LIKE 'wsrep_on'"))).first()  # MySQL has none
        return row is not None and row[1] == "ON"


class MariaDB(MySQL):
    """MariaDB."""

    limits_statements: ClassVar[bool] = True

    def __init__(self, name: str = "mariadb") -> None:
        super().__init__(name)
        self.title: str = "MariaDB"

    def limit(self, statement: str, seconds: float) -> str:
        """Send the limit with the statement itself: no round trip, nothing to set back."""
        if _LIMITABLE.match(statement) is None:
            return statement
        ours, server = f"{max(seconds, 0.001):.3f}", "@@max_statement_time"  # where it has a stricter limit, that stays
        return f"SET STATEMENT max_statement_time=IF({server} BETWEEN 0.000001 AND {ours}, {server}, {ours}) FOR {statement}"


class _Pymysql(Driver):
    """What asyncmy and aiomysql share: both come from PyMySQL, and keep the status flags of the last OK or EOF packet."""

    bound_to_loop: ClassVar[bool] = True
    can_ask: ClassVar[bool] = True
    can_stop: ClassVar[bool] = True
    keeps_cancel_requests: ClassVar[bool] = True

    def flags(self, raw: Any) -> int | None:
        """Return the status flags of the last answer; None where rows are still to be read."""
        raise NotImplementedError

    def session_number(self, raw: Any) -> int | None:
        """Return the connection's number, which means another one on another server."""
        return int(raw.thread_id())

    def same_server(self, connection: Connection, other: Connection) -> bool:
        """Compare what the servers say of themselves: one address may lead to several."""
        identity = other.info.get(_IDENTITY)
        return identity is None or await_only(_ask_identity(raw_connection(connection))) == identity

    def state(self, raw: Any) -> State | None:
        """Say where the transaction stands."""
        if raw is None:
            return None
        return State.OPEN if _agree(raw, _IN_TRANSACTION) else State.NONE

    def is_fit(self, raw: Any) -> bool:
        """Say whether it is in no transaction."""
        return self.state(raw) is State.NONE

    def in_autocommit(self, connection: Any) -> bool:
        """Say whether the server has said so."""
        return _agree(connection.raw, _AUTOCOMMIT)

    def switched_to_autocommit(self, raw: Any) -> bool:
        """Say whether the server has said so."""
        return _agree(raw, _AUTOCOMMIT)

    def watch(self, raw: Any) -> Callable[[bool], Ended | None] | None:
        """Return what reads the flags of each answer."""
        flags_of, was_open = self.flags, False

        def look(wrote: bool) -> Ended | None:  # noqa: FBT001  # called for each statement
            nonlocal was_open
            flags = flags_of(raw)
            if flags is None:
                return None
            result = raw._result
            if result is not None and result.has_next:
                return Ended.MAYBE
            if flags & _AUTOCOMMIT:
                return Ended.AUTOCOMMIT
            before, was_open = was_open, bool(flags & _IN_TRANSACTION)
            # The server begins a transaction with the first statement that needs one.
            return Ended.ENDED if before and not was_open and wrote else None

        return look

    async def ask(self, raw: Any, question: str) -> Any:
        """Return the value of a variable, which begins no transaction."""
        async with raw.cursor() as cursor:
            await cursor.execute(question)
            return (await cursor.fetchone())[0]

    def tell_raw_calls(self, raw: Any, calls: RawCalls) -> Callable[[], object]:
        """Cover the methods that send: every statement of every cursor comes by ``query()``."""
        names = ("query", "commit", "rollback", "begin", "autocommit")
        return cover(raw, {name: told(name, getattr(raw, name), calls) for name in names})

    def tell_next_results(self, raw: Any, failed: Callable[[BaseException], object]) -> Callable[[], object]:
        """Cover the method that reads them."""
        read: Callable[..., Awaitable[Any]] = raw.next_result

        async def reading(*args: Any, **kwargs: Any) -> Any:
            try:
                return await read(*args, **kwargs)
            except Exception as error:
                failed(error)
                raise

        return cover(raw, {"next_result": reading})

    def keep_cancel_request(self, connection: Connection) -> None:
        """Ask the server for its identity, once for each connection: a balancer may lead the next one to another server.

        A cancel request of PostgreSQL needs no such proof: it carries a secret, and another server takes no notice of it.
        """
        if _IDENTITY in connection.info:
            return
        try:
            connection.info[_IDENTITY] = await_only(_ask_identity(raw_connection(connection)))
        except Exception as error:  # handled like the errors of a cursor; there is no public way
            connection._handle_dbapi_exception(error, _WHO_ARE_YOU, None, None, None)

    async def stop(self, raw: Any, connection: Connection, cursor: Any, seconds: float) -> None:
        """Send KILL: the driver only closes the socket, and the query would go on with its locks."""
        pool, thread_id, identity = connection.engine.pool, raw.thread_id(), connection.info.get(_IDENTITY)

        def kill() -> bool:
            # The pool may be exhausted by this very connection, so not from it; its twin connects in the same way.
            twin = pool.recreate()
            try:
                spare = twin.connect()
                try:
                    if await_only(_ask_identity(spare.driver_connection)) != identity:
                        return False
                    cursor = spare.cursor()
                    cursor.execute(f"KILL {int(thread_id)}")
                    cursor.close()
                finally:
                    spare.close()
            finally:
                twin.dispose()
            return True

        for _ in range(BALANCER_TRIES):
            if await greenlet_spawn(kill):
                break
        else:
            log(
                logging.WARNING,
                "a cancelled statement goes on: KILL reached other servers than the one it runs on, behind a balancer say, and "
                "was not sent there; its locks last until it ends",
            )


class Asyncmy(_Pymysql):
    """asyncmy.  It passes over flags that are all zero, so what its last result says is looked at as well."""

    name: ClassVar[str] = "asyncmy"

    def flags(self, raw: Any) -> int | None:
        """Return the flags of the last result."""
        result = raw._result
        return None if result is None or result.unbuffered_active else result.server_status


class Aiomysql(_Pymysql):
    """aiomysql.  It does not read the flags behind rows."""

    name: ClassVar[str] = "aiomysql"

    def flags(self, raw: Any) -> int | None:
        """Return the flags of the connection."""
        flags: int | None = raw.server_status
        return flags


def _agree(raw: Any, flag: int) -> bool:
    """Say whether all that knows flags says so: either may be older than the other."""
    result = raw._result
    latest = None if result is None or result.unbuffered_active else result.server_status
    return bool((raw.server_status or 0) & flag) and (latest is None or bool(latest & flag))


async def _ask_identity(raw: Any) -> tuple[Any, ...]:
    """Ask a server for its identity; that begins no transaction."""
    async with raw.cursor() as cursor:
        await cursor.execute(_WHO_ARE_YOU)
        found: tuple[Any, ...] = tuple(await cursor.fetchone())
    return found
