"""Which server answers: how its dialect is spoken to, and which of those that speak as PostgreSQL does are not it.

What is said of CockroachDB and YugabyteDB is from their documentation; see the how-to guide on them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from sqla_uow._databases.driver import raw_connection

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection, Dialect

__all__ = ["COCKROACHDB", "Distributed", "distributed", "family_of"]

_FAMILIES = {
    "postgresql": "postgresql",
    "cockroachdb": "postgresql",
    "mysql": "mysql",
    "mariadb": "mysql",
    "sqlite": "sqlite",
}


class Distributed(NamedTuple):
    """A database of many nodes in which PostgreSQL's clients feel at home, though it keeps no transaction ids and no WAL.

    Attributes:
        name: as its makers write it.
        level: the statement that says at which level a transaction really runs.
        remedy: what has a level that was replaced by a stronger one run as it was asked for.
    """

    name: str
    level: str
    remedy: str


# https://www.cockroachlabs.com/docs/stable/read-committed
COCKROACHDB = Distributed(
    "CockroachDB", "SHOW transaction_isolation", "SET CLUSTER SETTING sql.txn.read_committed_isolation.enabled = true"
)
# https://docs.yugabyte.com/stable/explore/transactions/isolation-levels/; the function is there since 2.18.
YUGABYTEDB = Distributed(
    "YugabyteDB",
    "SELECT yb_get_effective_transaction_isolation_level()",
    "start its tservers with yb_enable_read_committed_isolation",
)
_YUGABYTE = "-YB-"  # as in "15.2-YB-2025.1.0.0-b0"


def family_of(dialect: Dialect) -> str:
    """Return which way of speaking this dialect needs; its own name where it has none of the three."""
    return _FAMILIES.get(dialect.name, dialect.name)


def distributed(connection: Connection) -> Distributed | None:
    """Say which distributed database this is, None for PostgreSQL itself and every other; nothing is sent."""
    if connection.dialect.name == "cockroachdb":
        return COCKROACHDB
    if connection.dialect.name != "postgresql":
        return None
    # YugabyteDB is reached by PostgreSQL's own dialect, and says who it is when a connection is made.
    return YUGABYTEDB if _YUGABYTE in _version(raw_connection(connection)) else None


def _version(raw: Any) -> str:
    if hasattr(raw, "get_settings"):  # asyncpg
        return str(raw.get_settings().server_version)
    info = getattr(raw, "info", None)  # psycopg, psycopg2; the others that Alembic may use tell nothing
    return "" if info is None else str(info.parameter_status("server_version"))
