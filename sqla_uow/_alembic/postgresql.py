"""PostgreSQL's schema: its lock, its limits, and its triggers, also those of a child's table in joined inheritance."""

from __future__ import annotations

import hashlib
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from alembic.util import CommandError
from sqlalchemy import text

from sqla_uow._alembic.schema import (
    PREFIX,
    Found,
    Lock,
    Patience,
    Schema,
    Trigger,
    column_in,
    on_own_session,
    qualified,
)
from sqla_uow._databases.database import driver_of
from sqla_uow._databases.postgresql import milliseconds

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from alembic.operations import Operations
    from alembic.runtime.migration import MigrationContext
    from sqlalchemy.engine import Connection, Dialect, Engine, Inspector


__all__ = ["ChildTrigger", "CockroachDBSchema", "PostgreSQLSchema", "YugabyteDBSchema", "reference_of"]

_KEY = int.from_bytes(hashlib.sha256(b"sqla_uow.migration_lock").digest()[:8], "big", signed=True)
# It is idle while the migrations run.  Before PostgreSQL 14 there is no such setting, and no row.
_STAY_IDLE = text("SELECT set_config(name, '0', false) FROM pg_settings WHERE name = 'idle_session_timeout'")
# What the transaction has locked so that others wait for it, Alembic's own table apart.
_LOCKED_BEFORE = text(
    "SELECT count(*) FROM pg_locks JOIN pg_class ON pg_class.oid = pg_locks.relation "
    "WHERE pid = pg_backend_pid() AND locktype = 'relation' AND granted AND relkind IN ('r', 'p') "
    "AND mode IN ('ShareLock', 'ShareRowExclusiveLock', 'ExclusiveLock', 'AccessExclusiveLock') AND relname <> :ours"
)

PARENT = (
    "pg_catalog.pg_constraint reference JOIN pg_catalog.pg_constraint own ON own.conrelid = reference.conrelid "
    "AND own.contype = 'p' AND own.conkey @> reference.conkey AND own.conkey <@ reference.conkey"
)
"""In PostgreSQL, with ``reference.contype = 'f'``: a child's table refers to its parent's by its primary key."""

_POSTGRESQL = f"""
SELECT tgname, prosrc, pg_class.relname, there.nspname, tgfoid,
    quote_ident(its.nspname) || '.' || quote_ident(proname), (tgtype & 2) = 0
FROM pg_catalog.pg_trigger
JOIN pg_catalog.pg_class ON pg_class.oid = tgrelid JOIN pg_catalog.pg_namespace there ON there.oid = relnamespace
JOIN pg_catalog.pg_proc ON pg_proc.oid = tgfoid JOIN pg_catalog.pg_namespace its ON its.oid = pronamespace
WHERE NOT tgisinternal AND left(tgname, {len(PREFIX)}) = '{PREFIX}'
AND coalesce(to_jsonb(pg_trigger) ->> 'tgparentid', '0') = '0'
"""  # noqa: S608  # our own words.  A partition's copy has a parent, and lives with it; before PostgreSQL 13 it is internal
_THIS = "to_regclass(CAST(:table AS text))"
_OF_TABLE = text(f"{_POSTGRESQL} AND tgrelid = {_THIS}")
_OF_CHILDREN = text(
    f"{_POSTGRESQL} AND (tgtype & 2) = 0 AND EXISTS (SELECT FROM {PARENT} WHERE reference.conrelid = tgrelid "
    f"AND reference.contype = 'f' AND reference.confrelid = {_THIS})"
)
_USED = text("SELECT count(*) FROM pg_catalog.pg_trigger WHERE tgfoid = :function")
_TAKEN = text(
    "SELECT count(*) FROM pg_catalog.pg_trigger JOIN pg_catalog.pg_proc ON pg_proc.oid = tgfoid "
    "JOIN pg_catalog.pg_namespace ON pg_namespace.oid = pronamespace "
    "WHERE proname = :name AND nspname = coalesce(CAST(:schema AS text), current_schema())"
)
# The ORM counts in the parent's table before it writes the child's, and that must not be counted again: it would find its
# own write stale.  A row that we see and whose writer is in progress is of this transaction, or of a savepoint in it.
# xmin has only the lower 32 bits of the writer's number, and a frozen row's may be as old as to look like one to come, for
# which pg_xact_status() is an error; a million savepoints ahead are not.
_NOT_COUNTED = """
NOT (
    SELECT CASE WHEN distance > -1000000 THEN
        coalesce(pg_xact_status((current - distance)::text::xid8) = 'in progress', false)
    ELSE false END
    FROM (
        SELECT current, ((current - parent.xmin::text::bigint + 2147483648) & 4294967295) - 2147483648 AS distance
        FROM (SELECT pg_current_xact_id()::text::bigint AS current) AS ours
    ) AS ages
)
"""


# Names in a function's source are not renamed with what they name, other than those in a foreign key.
_BODY = """
$body$
DECLARE
    counting text;
BEGIN
    IF NOT EXISTS (
        SELECT FROM pg_catalog.pg_constraint
        WHERE conrelid = TG_RELID AND contype = 'f' AND pg_catalog.pg_get_constraintdef(oid) = {definition}
    ) THEN  -- a table or a column of the key has been renamed or moved
        SELECT format('UPDATE %s AS parent SET %I = parent.%I + 1 WHERE ', reference.confrelid::regclass, {name}, {name})
            || (
                SELECT string_agg(format('parent.%I = $1.%I', theirs.attname, ours.attname), ' AND ')
                FROM unnest(reference.conkey, reference.confkey) AS pair (ours, theirs)
                JOIN pg_catalog.pg_attribute ours ON ours.attrelid = reference.conrelid AND ours.attnum = pair.ours
                JOIN pg_catalog.pg_attribute theirs ON theirs.attrelid = reference.confrelid AND theirs.attnum = pair.theirs
            ) || $and$ AND {not_counted} $and$
        INTO counting
        FROM {references}
        WHERE reference.conrelid = TG_RELID AND reference.contype = 'f' AND EXISTS (
            SELECT FROM pg_catalog.pg_attribute WHERE attrelid = reference.confrelid AND attname = {name}
        )
        ORDER BY reference.conname = {constraint} DESC
        LIMIT 1;
        IF FOUND THEN
            EXECUTE counting USING NEW;
            RETURN NULL;
        END IF;
    END IF;
    UPDATE {parent} AS parent SET {column} = parent.{column} + 1 WHERE {pairs} AND {not_counted};
    RETURN NULL;
END
$body$
"""

_REFERENCE = text(
    "SELECT conname, definition, parent, relname, nspname, pairs FROM (SELECT reference.*, "  # noqa: S608  # our own words
    "pg_catalog.pg_get_constraintdef(reference.oid) AS definition, CAST(CAST(reference.confrelid AS regclass) AS text) AS parent, ("
    "SELECT string_agg(format('parent.%I = NEW.%I', theirs.attname, ours.attname), ' AND ') "
    "FROM unnest(reference.conkey, reference.confkey) AS pair (ours, theirs) "
    "JOIN pg_catalog.pg_attribute ours ON ours.attrelid = reference.conrelid AND ours.attnum = pair.ours "
    "JOIN pg_catalog.pg_attribute theirs ON theirs.attrelid = reference.confrelid AND theirs.attnum = pair.theirs"
    f") AS pairs FROM {PARENT} WHERE reference.contype = 'f') AS reference "
    "JOIN pg_catalog.pg_class ON pg_class.oid = confrelid JOIN pg_catalog.pg_namespace ON pg_namespace.oid = relnamespace "
    "WHERE conrelid = to_regclass(CAST(:child AS text)) "
    "AND (CAST(:parent AS text) IS NULL OR relname = CAST(:parent AS text))"
)


class PostgreSQLSchema(Schema):
    """PostgreSQL's, whose DDL is part of the transaction."""

    waits: ClassVar[bool] = True
    tells_triggers: ClassVar[bool] = True
    counts_in_parents: ClassVar[bool] = True

    def lock(self, connection: Connection) -> AbstractContextManager[Lock]:
        """Return an advisory lock's."""
        return on_own_session(connection, PostgreSQLLock)

    def retries(self, connection: Connection, context: MigrationContext, table: str, patience: Patience) -> int:
        """Return none where this transaction has locked other tables before: whoever waits for those would wait on."""
        driver: Any = connection.connection.dbapi_connection
        if connection.dialect.detect_autocommit_setting(driver):
            raise CommandError(
                f"table {table!r} is to be changed in an autocommit block, where nothing limits how long it waits for its lock; "
                "put the operation outside the block"
            )
        locked = connection.execute(_LOCKED_BEFORE, {"ours": context.version_table}).scalar_one()
        return 0 if locked else patience.retries

    @contextmanager
    def limit(self, connection: Connection, patience: Patience) -> Generator[None]:
        """Set lock_timeout inside a savepoint."""
        before = connection.execute(text("SELECT current_setting('lock_timeout')")).scalar_one()
        with connection.begin_nested():
            _set_lock_timeout(connection, milliseconds(patience.lock_timeout))
            yield
            _set_lock_timeout(connection, before)  # the release of a savepoint keeps SET LOCAL, its rollback does not

    @contextmanager
    def script_limit(self, operations: Operations, patience: Patience) -> Generator[None]:
        """Set lock_timeout, and leave it to the server again."""
        operations.execute(f"SET LOCAL lock_timeout = '{milliseconds(patience.lock_timeout)}'")
        yield
        operations.execute("SET LOCAL lock_timeout = DEFAULT")

    def views(self, inspector: Inspector, schema: str | None) -> list[str]:
        """Return the materialized ones as well."""
        return [*super().views(inspector, schema), *inspector.get_materialized_view_names(schema=schema)]

    def create(self, trigger: Trigger) -> list[str]:
        """Return a function and its trigger."""
        dialect, quote = self.dialect, self.dialect.identifier_preparer.quote
        table, name, column = trigger.qualified(dialect, trigger.table), quote(trigger.name), quote(trigger.column)
        function = trigger.qualified(dialect, trigger.name)
        body = f"$body$ BEGIN NEW.{column} := OLD.{column} + 1; RETURN NEW; END $body$"
        return [
            f"CREATE OR REPLACE FUNCTION {function}() RETURNS trigger LANGUAGE plpgsql AS {body}",
            f"DROP TRIGGER IF EXISTS {name} ON {table}",
            f"CREATE TRIGGER {name} BEFORE UPDATE ON {table} FOR EACH ROW EXECUTE FUNCTION {function}()",
        ]

    def drop(self, trigger: Trigger) -> list[str]:
        """Remove the function too."""
        dialect, quote = self.dialect, self.dialect.identifier_preparer.quote
        table, function = trigger.qualified(dialect, trigger.table), trigger.qualified(dialect, trigger.name)
        return [
            f"DROP TRIGGER IF EXISTS {quote(trigger.name)} ON {table}",
            f"DROP FUNCTION IF EXISTS {function}()",
        ]

    def triggers_of(self, connection: Connection, table: str, schema: str | None) -> list[Found]:
        """Return the version triggers that are on a table."""
        return _found(connection, _OF_TABLE, table, schema)

    def children_of(self, connection: Connection, table: str, schema: str | None) -> list[Found]:
        """Return those on other tables that count in this one's rows."""
        return _found(connection, _OF_CHILDREN, table, schema)

    def is_taken(self, connection: Connection, name: str, schema: str | None) -> bool:
        """Say whether the function of another table's trigger has this name."""
        return bool(connection.scalar(_TAKEN, {"name": name, "schema": schema}))

    def is_used(self, connection: Connection, function: int) -> bool:
        """Say whether a trigger calls this function."""
        return bool(connection.scalar(_USED, {"function": function}))


class YugabyteDBSchema(PostgreSQLSchema):
    """YugabyteDB's."""

    counts_in_parents: ClassVar[bool] = False


class CockroachDBSchema(PostgreSQLSchema):
    """CockroachDB's, which is changed without a table's lock, and in no savepoint."""

    waits: ClassVar[bool] = False
    tells_triggers: ClassVar[bool] = False
    counts_in_parents: ClassVar[bool] = False

    def lock(self, connection: Connection) -> AbstractContextManager[Lock]:
        """Refuse."""
        raise CommandError(
            "CockroachDB gives an advisory lock to everybody who asks, so migration_lock() would exclude nobody; run the "
            "migrations from one process"
        )

    @contextmanager
    def limit(self, connection: Connection, patience: Patience) -> Generator[None]:
        """Set none."""
        yield


def _set_lock_timeout(connection: Connection, value: str) -> None:
    connection.execute(text("SELECT set_config('lock_timeout', :value, true)"), {"value": value})


def _found(connection: Connection, statement: Any, table: str, schema: str | None) -> list[Found]:
    rows: Sequence[Any] = connection.execute(statement, {"table": qualified(connection.dialect, table, schema)}).all()
    return [
        Found(name, column, table, schema, (int(number), function), bool(of_child))
        for name, source, table, schema, number, function, of_child in rows
        if (column := column_in(source)) is not None
    ]


class PostgreSQLLock:
    """An advisory lock of a session."""

    def __init__(self, connection: Connection, engine: Engine) -> None:
        self._connection = connection
        connection.execute(_STAY_IDLE)
        self._refuse_pooler(engine)

    def try_acquire(self) -> bool:
        return bool(self._connection.scalar(text("SELECT pg_try_advisory_lock(:key)"), {"key": _KEY}))

    def release(self) -> bool:
        return bool(self._connection.scalar(text("SELECT pg_advisory_unlock(:key)"), {"key": _KEY}))

    def _refuse_pooler(self, engine: Engine) -> None:
        """Refuse a pooler that gives a session away between two statements; one that keeps it does no harm."""
        before = self._process()
        if before == self._told():
            return
        # Through a pooler.  While another connection is in a transaction, does it have our session, or have we another?
        with engine.connect() as other, other.begin():
            its = other.scalar(text("SELECT pg_backend_pid()"))
            if its == before or self._process() != before:
                raise CommandError(
                    "the migration lock needs a session of its own, but PostgreSQL is reached through a pooler in "
                    "transaction mode; give the migrations a URL that leads to PostgreSQL itself"
                )

    def _process(self) -> int:
        return int(self._connection.execute(text("SELECT pg_backend_pid()")).scalar_one())

    def _told(self) -> int | None:
        """Return the process that the driver was told of when it connected: a pooler makes one up."""
        driver: Any = self._connection.connection.driver_connection
        return driver_of(self._connection.dialect).session_number(driver)


class ChildTrigger(NamedTuple):
    """The trigger that counts, once in a transaction, the changes of a child's rows in the version of the parent's.

    As long as the child's foreign key reads as it did, the statement is a fixed one, whose plan is kept: a quarter of the
    time of one that is put together for each row.

    Attributes:
        own: its name and how it is dropped are those of any trigger.
        parent: the parent's table, as it is written in SQL.
        pairs: how the rows of the two find each other, as it is written in SQL.
        constraint: the name of the foreign key.
        definition: what that says.
    """

    own: Trigger
    parent: str
    pairs: str
    constraint: str
    definition: str

    def create(self, dialect: Dialect) -> list[str]:
        """Return the statements that make it, in the place of one that is there."""
        own, quote = self.own, dialect.identifier_preparer.quote
        function, table, name = own.qualified(dialect, own.name), own.qualified(dialect, own.table), quote(own.name)
        body = _BODY.format(
            definition=_string(self.definition),
            constraint=_string(self.constraint),
            name=_string(own.column),
            column=quote(own.column),
            parent=self.parent,
            pairs=self.pairs,
            references=PARENT,
            not_counted=_NOT_COUNTED,
        )
        return [
            f"CREATE OR REPLACE FUNCTION {function}() RETURNS trigger LANGUAGE plpgsql AS {body}",
            f"DROP TRIGGER IF EXISTS {name} ON {table}",
            f"CREATE TRIGGER {name} AFTER UPDATE ON {table} FOR EACH ROW EXECUTE FUNCTION {function}()",
        ]


def _string(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"


def reference_of(connection: Connection, own: Trigger, parent: str | None) -> Any:
    """Return how a child's table refers to its parent's, None for whatever that is called; None where it does not."""
    child = own.qualified(connection.dialect, own.table)
    return connection.execute(_REFERENCE, {"child": child, "parent": parent}).first()
