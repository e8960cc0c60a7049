"""The trigger of a child's table in joined inheritance, whose rows' version stands in the parent's (PostgreSQL)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from alembic.util import CommandError
from sqlalchemy import text

from sqla_uow._alembic.catalog import PARENT
from sqla_uow._alembic.target import Target
from sqla_uow._databases.database import recognised, system_of
from sqla_uow._databases.postgresql import PostgreSQL

if TYPE_CHECKING:
    from sqlalchemy.engine import Dialect

    from sqla_uow._alembic.triggers import Trigger

__all__ = ["ChildTrigger", "child_trigger"]

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


class ChildTrigger(NamedTuple):
    """The trigger that counts, once in a transaction, the changes of a child's rows in the version of the parent's.

    As long as the child's foreign key reads as it did, the statement is a fixed one, whose plan is kept: a quarter of the
    time of one that is put together for each row.

    Attributes:
        own: its name and how it is dropped are those of any trigger.
        parent: the parent's table, as it is written in SQL.
        pairs: how the rows of the two find each other, likewise.
        constraint: the name of the foreign key.
        definition: what that says.
    """

    own: Trigger
    parent: str
    pairs: str
    constraint: str
    definition: str

    def create(self, dialect: Dialect) -> list[str]:
        """Return the statements that make it, anew where there is one already."""
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
            *own.drop(dialect)[:1],
            f"CREATE TRIGGER {name} AFTER UPDATE ON {table} FOR EACH ROW EXECUTE FUNCTION {function}()",
        ]


def child_trigger(impl: Any, own: Trigger, parent: str | None) -> ChildTrigger:
    """Look up how a child's table refers to its parent's, None for whatever that is called.

    Raises:
        CommandError: another database than PostgreSQL; ``--sql``; no such table, column or reference.
    """
    system = system_of(impl.dialect) if impl.as_sql else recognised(impl.connection)
    if not isinstance(system, PostgreSQL):
        raise CommandError(
            f"a trigger of table {own.table!r} cannot count for its parent {parent!r} on {system.title}, where it cannot tell "
            f"whether the ORM has; leave it out, and where others write {own.table!r} have them set {own.column} = "
            f"{own.column} in {parent!r} too, which that table's own trigger counts"
        )
    if impl.as_sql:
        raise CommandError(
            f"how table {own.table!r} refers to its parent {parent!r} is not known with --sql; run it on a database"
        )
    child = own.qualified(impl.dialect, own.table)
    found = impl.connection.execute(_REFERENCE, {"child": child, "parent": parent}).first()
    if found is None:
        if parent is not None:
            Target(impl, parent, own.schema).check_integer(own.column)
        raise CommandError(
            f"the primary key of table {own.table!r} is no foreign key to {parent!r}; name the parent of its joined "
            "inheritance"
        )
    constraint, definition, written, name, schema, pairs = found
    Target(impl, name, schema).check_integer(own.column)
    return ChildTrigger(own, written, pairs, constraint, definition)


def _string(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"
