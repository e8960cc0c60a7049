"""The kinds of version: the type of the column, and the next version in Python and in the SQL of an UPDATE."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

from sqlalchemy import DateTime, FetchedValue, Integer, Text, TypeDecorator, Uuid, bindparam, case, cast
from sqlalchemy.dialects import mysql
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import mapped_column
from sqlalchemy.sql.functions import GenericFunction
from sqlalchemy.types import UserDefinedType

from sqla_uow._databases.database import family_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy import BindParameter, ColumnElement, Dialect
    from sqlalchemy.orm import MappedColumn
    from sqlalchemy.sql.compiler import SQLCompiler
    from sqlalchemy.types import TypeEngine

__all__ = ["INTEGER", "TIMESTAMP", "UUID", "XMIN", "UtcTimestamp", "VersionKind"]

T_co = TypeVar("T_co", covariant=True)
_MICROSECOND = timedelta(microseconds=1)


class UtcTimestamp(TypeDecorator[datetime]):
    """An aware UTC timestamp in microseconds on every database; MariaDB and SQLite store it without its zone."""

    impl: TypeEngine[Any] | type[TypeEngine[Any]] = DateTime
    cache_ok: bool | None = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        """Return the database's type: MariaDB's DATETIME alone would cut off the fraction of the second."""
        if family_of(dialect) == "mariadb":
            return dialect.type_descriptor(mysql.DATETIME(fsp=6))
        return dialect.type_descriptor(DateTime(timezone=family_of(dialect) == "postgresql"))

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Refuse a timestamp without a zone, as it cannot be compared."""
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("a version timestamp has no time zone; use an aware one, in UTC")
        value = value.astimezone(UTC)
        return value if family_of(dialect) == "postgresql" else value.replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002  # SQLAlchemy's signature
        """Return the timestamp in UTC, whatever zone the connection is in."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class _Processor(Protocol[T_co]):
    """What SQLAlchemy calls for each value on its way to the driver or back."""

    def __call__(self, value: Any) -> T_co | None: ...


class Xid(UserDefinedType[int]):
    """PostgreSQL's transaction id as an int.

    Bound as text and cast: asyncpg sends a str as VARCHAR, and there is no operator ``xid = character varying``.
    """

    cache_ok = True

    @property
    def python_type(self) -> type[int]:
        """Return int, for factories of test data."""
        return int

    def get_col_spec(self, **_: Any) -> str:
        """Return PostgreSQL's name of the type."""
        return "xid"

    def bind_expression(self, bindvalue: BindParameter[int]) -> ColumnElement[int]:
        """Cast the bound value: only text can be cast to xid."""
        return cast(cast(bindvalue, Text), self)

    def bind_processor(self, dialect: Dialect) -> _Processor[str]:  # noqa: ARG002  # SQLAlchemy's signature
        """Return a function from int to text."""
        return _text

    def result_processor(self, dialect: Dialect, coltype: object) -> _Processor[int]:  # noqa: ARG002  # SQLAlchemy's signature
        """Return a function from the driver's value to int: asyncpg gives an int, psycopg a str."""
        return _number


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _number(value: Any) -> int | None:
    return None if value is None else int(value)


class a_microsecond_later(GenericFunction[datetime]):  # noqa: N801  # SQL functions are named like this
    """One microsecond after the timestamp in a column, computed by the database."""

    type = UtcTimestamp()
    inherit_cache = True


@compiles(a_microsecond_later)
def _later(element: a_microsecond_later, compiler: SQLCompiler, **kw: Any) -> str:
    return f"({compiler.process(element.clauses, **kw)} + INTERVAL '1 microsecond')"


@compiles(a_microsecond_later, "mysql", "mariadb")
def _later_mysql(element: a_microsecond_later, compiler: SQLCompiler, **kw: Any) -> str:
    return f"({compiler.process(element.clauses, **kw)} + INTERVAL 1 MICROSECOND)"


@compiles(a_microsecond_later, "sqlite")
def _later_sqlite(element: a_microsecond_later, compiler: SQLCompiler, **kw: Any) -> str:
    # SQLite computes in milliseconds, so the six digits that SQLAlchemy writes are handled apart.
    column = compiler.process(element.clauses, **kw)
    digits = f"(CAST(substr({column}, 21) AS INTEGER) + 1)"
    second = f"datetime(substr({column}, 1, 19), '+' || ({digits} / 1000000) || ' seconds')"
    return f"({second} || '.' || printf('%06d', {digits} % 1000000))"


class VersionKind(NamedTuple):
    """One kind of version.

    Attributes:
        name: what ``column.info["sqla_uow.version"]`` says.
        python_type: of its values.
        following: makes the next version from the one before, or from None; None if the database makes versions.
        type_: makes the type of the column.
        server_default: a constant, as then a column can be added to a table without rewriting its rows.
        bumped: makes the SQL of the next version from that of the present one; None if the database makes versions.
    """

    name: str
    python_type: type
    following: Callable[[Any], Any] | None
    type_: Callable[[], Any]
    server_default: str | None
    bumped: Callable[[ColumnElement[Any]], ColumnElement[Any]] | None

    def column(self, name: str | None = None) -> MappedColumn[Any]:
        """Return a new column of this kind."""
        if self.following is None:  # xmin, which every table of PostgreSQL has
            return mapped_column("xmin", self.type_(), nullable=False, system=True, server_default=FetchedValue())
        return mapped_column(name, self.type_(), nullable=False, default=self.first, server_default=self.server_default)

    def first(self) -> Any:
        """Return a version for a new row."""
        return 0 if self.following is None else self.following(None)


def _next_integer(old: int | None) -> int:
    return (old or 0) + 1


def _next_uuid(old: uuid.UUID | None) -> uuid.UUID:  # noqa: ARG001  # SQLAlchemy's signature
    return uuid.uuid4()


def _next_timestamp(old: datetime | None) -> datetime:
    # A clock that is set back, or that ticks more slowly than we write, must not repeat a version.
    now = datetime.now(UTC)
    return now if old is None or old < now else old + _MICROSECOND


def _bumped_integer(column: ColumnElement[Any]) -> ColumnElement[Any]:
    return column + 1


def _bumped_uuid(column: ColumnElement[Any]) -> ColumnElement[Any]:
    return bindparam(None, uuid.uuid4(), type_=column.type)


def _bumped_timestamp(column: ColumnElement[Any]) -> ColumnElement[Any]:
    now = bindparam(None, datetime.now(UTC), type_=column.type)
    return case((column < now, now), else_=a_microsecond_later(column))


INTEGER = VersionKind("integer", int, _next_integer, Integer, "1", _bumped_integer)
UUID = VersionKind(
    "uuid",
    uuid.UUID,
    _next_uuid,
    Uuid,
    "0" * 32,  # a UUID for PostgreSQL and MariaDB, and what SQLAlchemy writes into CHAR(32)
    _bumped_uuid,
)
TIMESTAMP = VersionKind(
    "timestamp",
    datetime,
    _next_timestamp,
    UtcTimestamp,
    "1970-01-01 00:00:00.000000",  # with its fraction: SQLite compares texts
    _bumped_timestamp,
)
XMIN = VersionKind("xmin", int, None, Xid, None, None)
