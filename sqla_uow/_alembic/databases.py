"""Which database's way of changing a schema a dialect needs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqla_uow._alembic.mariadb import MariaDBSchema
from sqla_uow._alembic.postgresql import CockroachDBSchema, PostgreSQLSchema, YugabyteDBSchema
from sqla_uow._alembic.schema import Schema
from sqla_uow._alembic.sqlite import SQLiteSchema
from sqla_uow._databases.database import recognised, system_of

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection, Dialect

    from sqla_uow._databases.system import System

__all__ = ["schema_in_script", "schema_of"]

_SCHEMAS: dict[str, type[Schema]] = {
    "PostgreSQL": PostgreSQLSchema,
    "YugabyteDB": YugabyteDBSchema,
    "CockroachDB": CockroachDBSchema,
    "MariaDB": MariaDBSchema,
    "MySQL": MariaDBSchema,
    "SQLite": SQLiteSchema,
}


def schema_of(connection: Connection) -> Schema:
    """Return how the schema behind a connection is changed."""
    return _made(recognised(connection), connection.dialect)


def schema_in_script(dialect: Dialect) -> Schema:
    """Return how a script changes a schema, which is written without looking at a database."""
    return _made(system_of(dialect), dialect)


def _made(system: System, dialect: Dialect) -> Schema:
    return _SCHEMAS.get(system.title, Schema)(dialect, system.title)
