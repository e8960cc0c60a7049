"""The SQL of keys, where databases differ.

Nobody waits for a key inside the database, where waiting would hold a connection.  A claim is one statement that either
has the key, or finds the record, or finds that another transaction has it.

* PostgreSQL: a lock of the transaction that is tried for, and INSERT ... ON CONFLICT.  The record is read only where
  nothing was inserted: at SERIALIZABLE, having read what is not there is a conflict with every other new key.
* MariaDB: INSERT ... ON DUPLICATE KEY UPDATE, which waits for no row's lock (1205 at once) and returns what is there.
* SQLite: likewise; while it writes nobody else does, so nobody else has the key.

A row that has expired is taken over by the same statement.  The time is the database's, as those of several processes differ.

They are texts: SQLAlchemy 2.0 would compile each of them anew, which takes longer than the database does.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy import BigInteger, LargeBinary, SmallInteger, bindparam, text

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sqlalchemy import Dialect, Table
    from sqlalchemy.engine import Connection
    from sqlalchemy.sql.selectable import TextualSelect

    from sqla_uow.typing import IsolationLevel

__all__ = ["Statements", "purging_level", "statements_of"]

# MariaDB's conditions see what was assigned before them, so `expires_at` is the last one.
_TAKEN_OVER = ("space", "fingerprint", "status", "headers", "result", "created_at", "expires_at")


class _Dialect(NamedTuple):
    """How a database spells it.

    Attributes:
        now: the time, as it is stored.
        later: that in :keep microseconds.
        bytes: a parameter that is bytes.
        excluded: a value of the row that could not be inserted.
        upsert: before what such a row becomes.
        insert: before an INSERT.
        skipping: behind a SELECT, locks its rows, but for those that others have locked.
        in_digits: bytes are sent as hexadecimal digits.
        locks: a claim tries for a lock, whose number is the parameter `lock`.
        has_one_writer: so a claim waits for its turn, and never finds a key taken.
        purging: the level of a unit that removes rows; None is the database's own.
    """

    now: str
    later: str
    bytes: str
    excluded: str
    upsert: str = "ON CONFLICT (digest) DO UPDATE SET"
    insert: str = ""
    skipping: str = " FOR UPDATE SKIP LOCKED"
    in_digits: bool = False
    locks: bool = False
    has_one_writer: bool = False
    purging: IsolationLevel | None = None


_STRFTIME = "strftime('%Y-%m-%d %H\\:%M\\:%f', 'now'"  # with six digits, as SQLAlchemy writes a DateTime
_MARIADB = _Dialect(
    now="utc_timestamp(6)",
    later="utc_timestamp(6) + INTERVAL :keep MICROSECOND",
    bytes="unhex(:{})",  # with PyMySQL 1.2, aiomysql 0.3.2 cannot send bytes; the others send them as digits too
    excluded="VALUES({})",
    upsert="ON DUPLICATE KEY UPDATE",
    insert="SET STATEMENT innodb_lock_wait_timeout=0 FOR ",
    in_digits=True,
    purging="READ COMMITTED",  # at the default level the gap behind the last row is locked, where the next key goes
)
_DIALECTS = {
    "postgresql": _Dialect(
        now="now()",
        later="now() + :keep * INTERVAL '1 microsecond'",
        bytes="CAST(:{} AS bytea)",
        excluded="EXCLUDED.{}",
        locks=True,
    ),
    "mariadb": _MARIADB,
    "mysql": _MARIADB,
    "sqlite": _Dialect(
        now=f"{_STRFTIME}) || '000'",
        later=f"{_STRFTIME}, (:keep / 1000000.0) || ' seconds') || '000'",
        bytes=":{}",
        excluded="excluded.{}",
        skipping="",
        has_one_writer=True,
    ),
}


class Statements:
    """The statements for one table of one database.

    Args:
        table: its name as SQL.
        spelled: how the database spells it.
    """

    def __init__(self, table: str, spelled: _Dialect) -> None:
        self._spelled = spelled
        self._table = table
        self.locks: bool = spelled.locks
        self.has_one_writer: bool = spelled.has_one_writer
        self.claim: TextualSelect = _recorded(self._claim())
        """Take a key; one row, or none where another transaction has it.  With the parameter `mark` as `headers` it is taken."""
        self.find: TextualSelect = _recorded(
            f"SELECT fingerprint, status, headers, result FROM {table} "  # noqa: S608  # the name is quoted; so below
            f"WHERE digest = {self._bytes('digest')} AND expires_at > {spelled.now}"
        )
        """Read the record of a key."""
        self.store = text(
            f"UPDATE {table} SET fingerprint = {self._bytes('fingerprint')}, status = :status, "  # noqa: S608
            f"headers = {self._bytes('headers')}, result = {self._bytes('result')} WHERE digest = {self._bytes('digest')}"
        ).bindparams(bindparam("status", type_=SmallInteger))
        """Note what came of the work."""
        self.expired = text(
            f"SELECT digest FROM {table} WHERE expires_at <= {spelled.now} "  # noqa: S608
            f"ORDER BY expires_at LIMIT :limit{spelled.skipping}"
        ).columns(digest=LargeBinary)
        """Lock the oldest rows that have expired."""

    def parameters(self, **values: Any) -> dict[str, Any]:
        """Return parameters as this database takes them."""
        if not self._spelled.in_digits:
            return values
        return {name: value.hex() if isinstance(value, bytes) else value for name, value in values.items()}

    def remove(self, count: int) -> Any:
        """Return the statement that removes as many rows, with parameters ``d0``, ``d1`` and so on."""
        digests = ", ".join(self._bytes(f"d{index}") for index in range(count))
        return text(f"DELETE FROM {self._table} WHERE digest IN ({digests})")  # noqa: S608

    def _bytes(self, parameter: str) -> str:
        return self._spelled.bytes.format(parameter)

    def _claim(self) -> str:
        spelled, table = self._spelled, self._table
        columns = "digest, space, fingerprint, status, headers, result, created_at, expires_at"
        values = (
            f"{self._bytes('digest')}, :space, {self._bytes('fingerprint')}, NULL, {self._bytes('mark')}, NULL, "
            f"{spelled.now}, {spelled.later}"
        )
        insert = f"{spelled.insert}INSERT INTO {table} ({columns})"
        returning = "RETURNING fingerprint, status, headers, result"
        if self.locks:
            new = ", ".join(f"{name} = {spelled.excluded.format(name)}" for name in _TAKEN_OVER)
            return (
                f"WITH claimed AS ({insert} SELECT {values} WHERE pg_try_advisory_xact_lock(:lock) {spelled.upsert} {new} "  # noqa: S608
                f"WHERE {table}.expires_at <= {spelled.now} {returning}) SELECT * FROM claimed UNION ALL "
                f"SELECT fingerprint, status, headers, result FROM {table} WHERE digest = {self._bytes('digest')} "
                f"AND expires_at > {spelled.now} AND NOT EXISTS (SELECT 1 FROM claimed)"
            )
        new = ", ".join(
            f"{name} = CASE WHEN {table}.expires_at <= {spelled.now} THEN {spelled.excluded.format(name)} "
            f"ELSE {table}.{name} END"
            for name in _TAKEN_OVER
        )
        return f"{insert} VALUES ({values}) {spelled.upsert} {new} {returning}"


def _recorded(sql: str) -> TextualSelect:
    types = {"keep": BigInteger, "lock": BigInteger}
    names = [bindparam(name, type_=kind) for name, kind in types.items() if f":{name}" in sql]
    return text(sql).bindparams(*names).columns(
        fingerprint=LargeBinary, status=SmallInteger, headers=LargeBinary, result=LargeBinary
    )  # fmt: skip


def purging_level(dialect: str) -> IsolationLevel | None:
    """Return the isolation level of a unit that removes rows, None for the database's own.

    Args:
        dialect: its name.
    """
    spelled = _DIALECTS.get(dialect)
    return None if spelled is None else spelled.purging


def statements_of(table: Table, connection: Connection) -> Statements:
    """Return the statements for a table where a connection leads."""
    translated: Mapping[str | None, str | None] | None
    translated = connection.get_execution_options().get("schema_translate_map")
    schema = table.schema if translated is None else translated.get(table.schema, table.schema)
    return _made(table.name, schema, connection.dialect)


@functools.lru_cache(maxsize=64)
def _made(name: str, schema: str | None, dialect: Dialect) -> Statements:
    preparer = dialect.identifier_preparer
    spelled = _DIALECTS.get(dialect.name)
    if spelled is None or not getattr(dialect, "is_mariadb", True):  # MySQL has no RETURNING
        raise NotImplementedError(
            f"idempotency keys were used on {dialect.name}, which has no claim that never waits; use PostgreSQL, MariaDB "
            "10.6 or later, or SQLite"
        )
    quoted = preparer.quote(name) if schema is None else f"{preparer.quote_schema(schema)}.{preparer.quote(name)}"
    return Statements(quoted.replace(":", "\\:"), spelled)
