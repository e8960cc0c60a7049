"""Make and remove version triggers, whatever their tables have been called, and keep them in step with their columns."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from alembic.util import CommandError

from sqla_uow._alembic.databases import schema_in_script, schema_of
from sqla_uow._alembic.postgresql import ChildTrigger, reference_of
from sqla_uow._alembic.schema import Found, Schema, Trigger, literally, names, qualified
from sqla_uow._alembic.target import Target

if TYPE_CHECKING:
    from collections.abc import Generator

__all__ = ["child_trigger", "counting", "in_step", "make", "remake", "remove", "schema_for", "unnamed"]


def schema_for(impl: Any) -> Schema:
    """Return how the schema is changed, in the database or in a script."""
    return schema_in_script(impl.dialect) if impl.as_sql else schema_of(impl.connection)


def unnamed(impl: Any) -> bool:
    """Say whether triggers are known only by their derived names, as no database can be asked: ``--sql``, CockroachDB."""
    return impl.as_sql or not schema_of(impl.connection).tells_triggers


def triggers_around(impl: Any, table: str, schema: str | None) -> list[Found]:
    """Return the triggers on a table, and those of its children."""
    changed = schema_of(impl.connection)
    return [*changed.triggers_of(impl.connection, table, schema), *changed.children_of(impl.connection, table, schema)]


def counting(impl: Any, table: str, column: str, schema: str | None) -> list[Found]:
    """Return the triggers that count in a column, and those whose column is gone, with which no UPDATE would work."""
    there = Target(impl, table, schema)
    return [
        one
        for one in triggers_around(impl, table, schema)
        if one.column == column or not (one.of_child or there.has_column(one.column))
    ]


def make(impl: Any, trigger: Trigger | ChildTrigger) -> None:
    """Make a trigger, in the place of one that its table has already."""
    own = trigger.own if isinstance(trigger, ChildTrigger) else trigger
    schema = schema_for(impl)
    if not unnamed(impl):
        present = schema.triggers_of(impl.connection, own.table, own.schema)
        if present and schema.replaces_triggers:
            own = own._replace(given=present[0].name)  # replaced in one statement
        else:
            for found in present:
                remove(impl, found)
            free = (name for name in names(own.table) if not schema.is_taken(impl.connection, name, own.schema))
            own = own._replace(given=next(free))
    if isinstance(trigger, ChildTrigger):
        _execute(impl, trigger._replace(own=own).create(impl.dialect))
    else:
        _execute(impl, schema.create(own))


def remove(impl: Any, found: Found) -> None:
    """Remove a trigger, and its function where nothing else calls that."""
    dialect = impl.dialect
    if found.function is None:
        _execute(impl, [f"DROP TRIGGER {qualified(dialect, found.name, found.schema)}"])
        return
    name, table = dialect.identifier_preparer.quote(found.name), qualified(dialect, found.table, found.schema)
    _execute(impl, [f"DROP TRIGGER {name} ON {table}"])
    number, function = found.function
    if not schema_of(impl.connection).is_used(impl.connection, number):
        _execute(impl, [f"DROP FUNCTION IF EXISTS {function}()"])


def remake(impl: Any, found: Found, column: str) -> None:
    """Make a trigger again, on its table as that is now, to count in a column."""
    target = Target(impl, found.table, found.schema)
    own = Trigger(found.table, column, found.schema, target.primary_key())
    make(impl, child_trigger(impl, own, None) if found.of_child else own)


@contextmanager
def in_step(impl: Any, table: str, column: str, new: str, schema: str | None) -> Generator[None]:
    """Have the triggers of a column count in it under its new name, which it gets here.

    SQLite sees to that itself.  MariaDB's table stays locked until its trigger fits again: between, no UPDATE would work.
    """
    if unnamed(impl) or schema_of(impl.connection).renames_in_triggers:
        yield
        return
    found = [one for one in triggers_around(impl, table, schema) if one.column == column]
    with schema_of(impl.connection).keep(impl, table, schema, found):
        yield
        for one in found:
            remake(impl, one, new)


def child_trigger(impl: Any, own: Trigger, parent: str | None) -> ChildTrigger:
    """Look up how a child's table refers to its parent's, None for whatever that is called.

    Raises:
        CommandError: another database than PostgreSQL; ``--sql``; no such table, column or reference.
    """
    schema = schema_for(impl)
    if not schema.counts_in_parents:
        raise CommandError(
            f"a trigger of table {own.table!r} cannot count for its parent {parent!r} on {schema.title}, where it cannot tell "
            f"whether the ORM has; leave it out, and where others write {own.table!r} have them set {own.column} = "
            f"{own.column} in {parent!r} too, which that table's own trigger counts"
        )
    if impl.as_sql:
        raise CommandError(
            f"how table {own.table!r} refers to its parent {parent!r} is not known with --sql; run it on a database"
        )
    found = reference_of(impl.connection, own, parent)
    if found is None:
        if parent is not None:
            Target(impl, parent, own.schema).check_integer(own.column)
        raise CommandError(
            f"the primary key of table {own.table!r} is not a foreign key to {parent!r}; name the parent of its joined "
            "inheritance"
        )
    constraint, definition, written, name, schema, pairs = found
    Target(impl, name, schema).check_integer(own.column)
    return ChildTrigger(own, written, pairs, constraint, definition)


def _execute(impl: Any, statements: list[str]) -> None:
    for statement in statements:
        impl.execute(literally(statement))
