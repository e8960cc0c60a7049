"""The trigger of a child's table in joined inheritance, whose rows' version stands in the parent's (PostgreSQL)."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from alembic.util import CommandError

from sqla_uow._alembic_target import Target
from sqla_uow._servers import distributed, family_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from alembic.operations import Operations
    from sqlalchemy.engine import Dialect

    from sqla_uow._alembic_triggers import Trigger

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


class ChildTrigger(NamedTuple):
    """The trigger that counts, once in a transaction, the changes of a child's rows in the version of the parent's.

    Attributes:
        own: its name and how it is dropped are those of any trigger.
        parent: the parent's table.
        pairs: columns of the child's primary key and what they refer to.
    """

    own: Trigger
    parent: str
    pairs: Sequence[tuple[str, str]]

    def create(self, dialect: Dialect) -> list[str]:
        """Return the statements that make it, anew where there is one already."""
        own, quote = self.own, dialect.identifier_preparer.quote
        function, table, name = own.qualified(dialect, own.name), own.qualified(dialect, own.table), quote(own.name)
        column = quote(own.column)
        same = " AND ".join(f"parent.{quote(theirs)} = NEW.{quote(ours)}" for ours, theirs in self.pairs)
        update = f"UPDATE {own.qualified(dialect, self.parent)} AS parent SET {column} = parent.{column} + 1"  # noqa: S608  # names, quoted
        body = f"$body$ BEGIN {update} WHERE {same} AND {_NOT_COUNTED}; RETURN NULL; END $body$"
        return [
            f"CREATE OR REPLACE FUNCTION {function}() RETURNS trigger LANGUAGE plpgsql AS {body}",
            *own.drop(dialect)[:1],
            f"CREATE TRIGGER {name} AFTER UPDATE ON {table} FOR EACH ROW EXECUTE FUNCTION {function}()",
        ]


def child_trigger(operations: Operations, own: Trigger, parent: str) -> ChildTrigger:
    """Look up how a child's table refers to its parent's.

    Raises:
        CommandError: another database than PostgreSQL; ``--sql``; no such table, column or reference.
    """
    context = operations.migration_context
    family = family_of(context.dialect)
    server = None if context.as_sql else distributed(operations.get_bind())
    if family != "postgresql" or server is not None:
        raise CommandError(
            f"a trigger of table {own.table!r} cannot count for its parent {parent!r} on {family if server is None else server.name}, where it cannot tell "
            f"whether the ORM has; leave it out, and where others write {own.table!r} have them set {own.column} = "
            f"{own.column} in {parent!r} too, which that table's own trigger counts"
        )
    if context.as_sql:
        raise CommandError(
            f"how table {own.table!r} refers to its parent {parent!r} is not known with --sql; run it on a database"
        )
    Target(operations, parent, own.schema).check_integer(own.column)
    return ChildTrigger(own, parent, Target(operations, own.table, own.schema).refers_to(parent))
