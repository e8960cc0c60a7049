"""Databases of many nodes in which PostgreSQL's clients feel at home, though they keep no transaction ids and no WAL.

What is said of CockroachDB and YugabyteDB is from their documentation; see the how-to guide on them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from sqla_uow._databases.driver import raw_connection
from sqla_uow._databases.postgresql import PostgreSQL, SpeaksPostgreSQL, milliseconds

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection
    from sqlalchemy.ext.asyncio import AsyncConnection

    from sqla_uow._databases.driver import Driver
    from sqla_uow._databases.system import Opening, System
    from sqla_uow.typing import IsolationLevel

__all__ = ["CockroachDB", "Distributed", "UnconfirmedPostgreSQL", "YugabyteDB"]

_YUGABYTE = "-YB-"  # as in "15.2-YB-2025.1.0.0-b0"


class Distributed(SpeaksPostgreSQL):
    """What the two have in common."""

    ddl_is_apart: ClassVar[bool] = True
    replaces_levels: ClassVar[bool] = True
    level: ClassVar[str]
    """The statement that says at which level a transaction really runs."""
    remedy: ClassVar[str]
    """What has a level that was replaced by a stronger one run as it was asked for."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._honoured: set[IsolationLevel] = {"SERIALIZABLE"}

    def open(self, connection: Any, driver: Driver, unit: Opening) -> None:
        """Set the deadline.  Deadlocks are looked for at once, so there is no limit for locks."""
        if unit.settings:
            self.check_settings(who=unit.name)
        seconds = unit.seconds_left()
        if seconds is not None:  # set_config() for a transaction is not in the documentation
            connection.exec_driver_sql(f"SET LOCAL statement_timeout = '{milliseconds(seconds)}'")

    def check_honoured(self, connection: Connection, isolation: IsolationLevel, *, who: str) -> None:
        """Ask the server, whose settings may have a level replaced by a stronger one; once for each level."""
        if isolation in self._honoured:
            return
        runs = str(connection.exec_driver_sql(self.level).scalar_one()).upper()
        if runs != isolation:
            raise ValueError(
                f"{who} asks for isolation {isolation!r}, which this {self.title} runs as {runs}; {self.remedy}, or ask for {runs!r}"
            )
        self._honoured.add(isolation)

    async def may_lose_locks(self, connection: AsyncConnection) -> bool:
        """Say so: a lock may be lost with its node, before the COMMIT."""
        return True


class CockroachDB(Distributed):
    """CockroachDB.  Its levels are what sqlalchemy-cockroachdb 2.0.4 can ask for."""

    # https://www.cockroachlabs.com/docs/stable/read-committed
    levels: ClassVar[tuple[IsolationLevel, ...]] = ("READ COMMITTED", "SERIALIZABLE")
    level: ClassVar[str] = "SHOW transaction_isolation"
    remedy: ClassVar[str] = "SET CLUSTER SETTING sql.txn.read_committed_isolation.enabled = true"

    def __init__(self, name: str = "cockroachdb") -> None:
        super().__init__(name)
        self.title: str = "CockroachDB"

    def engine_options(self, isolation: IsolationLevel | None, *, read_only: bool) -> dict[str, Any]:
        """As PostgreSQL."""
        return super().engine_options(isolation, read_only=read_only)


class YugabyteDB(Distributed):
    """YugabyteDB, which is reached by PostgreSQL's own dialect, and goes by its name."""

    # https://docs.yugabyte.com/stable/explore/transactions/isolation-levels/; the function is there since 2.18.
    levels: ClassVar[tuple[IsolationLevel, ...]] = PostgreSQL.levels
    level: ClassVar[str] = "SELECT yb_get_effective_transaction_isolation_level()"
    remedy: ClassVar[str] = "start its tservers with yb_enable_read_committed_isolation"

    def __init__(self, name: str = "postgresql") -> None:
        super().__init__(name)
        self.title: str = "YugabyteDB"


class UnconfirmedPostgreSQL(PostgreSQL):
    """PostgreSQL's dialect before the first connection: it may lead to another database."""

    def recognise(self, connection: Connection, driver: Driver) -> System:
        """Return YugabyteDB, if that has answered: its version says so when a connection is made."""
        return YugabyteDB() if _YUGABYTE in driver.version(raw_connection(connection)) else PostgreSQL()
