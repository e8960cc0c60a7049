"""Make and remove version triggers, whatever their tables have been called, and keep them in step with their columns."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sqla_uow._alembic.catalog import Found, children_of, is_taken, is_used, triggers_of
from sqla_uow._alembic.mariadb import locked
from sqla_uow._alembic.postgresql import ChildTrigger, child_trigger
from sqla_uow._alembic.target import Target
from sqla_uow._alembic.triggers import Trigger, literally, names, qualified
from sqla_uow._databases.database import recognised
from sqla_uow._databases.distributed import CockroachDB
from sqla_uow._databases.driver_state import family_of

if TYPE_CHECKING:
    from collections.abc import Generator

__all__ = ["counting", "in_step", "make", "remake", "remove", "unnamed"]


def unnamed(impl: Any) -> bool:
    """Say whether nobody can be asked for triggers, which are known by their derived names then: ``--sql``, CockroachDB."""
    if impl.as_sql or family_of(impl.dialect) not in ("postgresql", "mysql", "sqlite"):
        return True
    return isinstance(recognised(impl.connection), CockroachDB)


def counting(impl: Any, table: str, column: str, schema: str | None) -> list[Found]:
    """Return the triggers that count in a column, and those whose column is gone, with which no UPDATE would work."""
    there = Target(impl, table, schema)
    found = [*triggers_of(impl.connection, table, schema), *children_of(impl.connection, table, schema)]
    return [one for one in found if one.column == column or not (one.of_child or there.has_column(one.column))]


def make(impl: Any, trigger: Trigger | ChildTrigger) -> None:
    """Make a trigger, in the place of one that its table has already."""
    own = trigger.own if isinstance(trigger, ChildTrigger) else trigger
    if not unnamed(impl):
        present = triggers_of(impl.connection, own.table, own.schema)
        if present and family_of(impl.dialect) == "mysql":
            own = own._replace(given=present[0].name)  # replaced in one statement
        else:
            for found in present:
                remove(impl, found)
            free = (name for name in names(own.table) if not is_taken(impl.connection, name, own.schema))
            own = own._replace(given=next(free))
    made: Trigger | ChildTrigger = trigger._replace(own=own) if isinstance(trigger, ChildTrigger) else own
    _execute(impl, made.create(impl.dialect))


def remove(impl: Any, found: Found) -> None:
    """Remove a trigger, and its function where nothing else calls that."""
    dialect = impl.dialect
    if found.function is None:
        _execute(impl, [f"DROP TRIGGER {qualified(dialect, found.name, found.schema)}"])
        return
    name, table = dialect.identifier_preparer.quote(found.name), qualified(dialect, found.table, found.schema)
    _execute(impl, [f"DROP TRIGGER {name} ON {table}"])
    number, function = found.function
    if not is_used(impl.connection, number):
        _execute(impl, [f"DROP FUNCTION IF EXISTS {function}()"])


def remake(impl: Any, found: Found, column: str) -> None:
    """Make a trigger anew, on its table as that is now, to count in a column."""
    target = Target(impl, found.table, found.schema)
    own = Trigger(found.table, column, found.schema, target.primary_key())
    make(impl, child_trigger(impl, own, None) if found.of_child else own)


@contextmanager
def in_step(impl: Any, table: str, column: str, new: str, schema: str | None) -> Generator[None]:
    """Have the triggers of a column count in it under its new name, which it gets here.

    SQLite sees to that itself.  MariaDB's table stays locked until its trigger fits again: between, no UPDATE would work.
    """
    if unnamed(impl) or family_of(impl.dialect) == "sqlite":
        yield
        return
    found = [*triggers_of(impl.connection, table, schema), *children_of(impl.connection, table, schema)]
    found = [one for one in found if one.column == column]
    with locked(impl, table, schema, found):
        yield
        for one in found:
            remake(impl, one, new)


def _execute(impl: Any, statements: list[str]) -> None:
    for statement in statements:
        impl.execute(literally(statement))
