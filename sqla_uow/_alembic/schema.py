"""How a database's schema is changed; one subclass for each.  What a version trigger is, wherever it is."""

from __future__ import annotations

import hashlib
import re
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import count
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

from alembic.util import CommandError
from sqlalchemy import text
from sqlalchemy.engine import Engine

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Sequence

    from alembic.operations import Operations
    from alembic.runtime.migration import MigrationContext
    from sqlalchemy import Column, TextClause
    from sqlalchemy.engine import Connection, Dialect, Inspector


__all__ = [
    "PREFIX",
    "Found",
    "Lock",
    "Patience",
    "Schema",
    "Trigger",
    "column_in",
    "literally",
    "names",
    "on_own_session",
    "qualified",
]

PREFIX = "sqla_uow_version_"
"""Of the names of our triggers."""
_LONGEST_NAME = 63  # PostgreSQL's; MariaDB has 64
_NAME = r'(?:"((?:[^"]|"")+)"|`((?:[^`]|``)+)`|(\w+))'
_COLUMN = re.compile(rf"SET NEW\.{_NAME} = OLD|NEW\.{_NAME} := OLD|AS parent SET {_NAME} =|WHEN NEW\.{_NAME} <=")


class Lock(Protocol):
    """A database's way to have one holder of a name."""

    def try_acquire(self) -> bool:
        """Take it if it is free; never wait."""
        ...

    def release(self) -> bool:
        """Give it back; say whether it was still held."""
        ...


class Patience(NamedTuple):
    """How long DDL waits for a table.

    Attributes:
        lock_timeout: seconds to wait for the table's lock, while others wait behind; MariaDB counts whole ones, 1 at least.
        retries: how many times to try again, after a pause as long as that in which the others go on.
    """

    lock_timeout: float = 1.0
    retries: int = 30


class Trigger(NamedTuple):
    """The trigger of one table's integer version.

    Whatever an UPDATE says, the version rises: a condition ``NEW = OLD`` would let a lower value through, with which a
    client of long ago agrees.  PostgreSQL and MariaDB count before the row is written, SQLite has to write it again.
    """

    table: str
    column: str
    schema: str | None
    key: Sequence[str] = ()
    """The primary key's columns; SQLite's rowid where it is not known, in a script."""

    given: str = ""
    """Its name; that of its table's today where it is empty."""

    @property
    def name(self) -> str:
        """Return the trigger's name, and that of its function on PostgreSQL."""
        return self.given or next(names(self.table))

    def qualified(self, dialect: Dialect, name: str) -> str:
        """Return a name in the table's schema."""
        return qualified(dialect, name, self.schema)


class Found(NamedTuple):
    """A version trigger as it is in the database.

    Attributes:
        name: its own, of the day on which it was made.
        column: in which it counts.
        table: that it is on, as that is called now.
        schema: the table's.
        function: on PostgreSQL, its function's id and how it is written in SQL.
        of_child: whether `column` is in the parent's table.
    """

    name: str
    column: str
    table: str
    schema: str | None
    function: tuple[int, str] | None = None
    of_child: bool = False


@contextmanager
def on_own_session(connection: Connection, kind: Callable[[Connection, Engine], Lock]) -> Generator[Lock]:
    """Hold a lock on a session of its own."""
    # A pool of its own: the engine's may have room for one connection, and closing into it would keep the lock.
    engine = connection.engine
    own = Engine(engine.pool.recreate(), engine.dialect, engine.url)
    try:
        with own.connect() as held:
            yield kind(held.execution_options(isolation_level="AUTOCOMMIT"), own)
    finally:
        own.dispose()  # whatever happened, the session ends here


class Schema:
    """How one database's schema is changed.  As it stands, that of a database that nothing is known of.

    Args:
        dialect: of the database.
        title: how messages call it.
    """

    waits: ClassVar[bool] = False
    """Changing a table waits for its lock, and everybody else then waits behind; see `limit`."""
    tells_triggers: ClassVar[bool] = False
    """It can be asked for triggers; else they are known by the names that are derived from their tables."""
    replaces_triggers: ClassVar[bool] = False
    """It replaces a trigger in one statement."""
    renames_in_triggers: ClassVar[bool] = False
    """It renames a column in the triggers that count in it as well."""
    forgets_tables: ClassVar[bool] = False
    """A setting may keep it from renaming a table in its triggers."""
    copies_tables: ClassVar[bool] = False
    """It changes a table by copying it, and so has to be told all changes at once."""
    counts_in_parents: ClassVar[bool] = False
    """A trigger of a child's table can count in the parent's."""
    begins_late: ClassVar[bool] = False
    """Its driver begins no transaction before DDL."""

    def __init__(self, dialect: Dialect, title: str) -> None:
        self.dialect = dialect
        self.title = title

    # -- one runner at a time

    def lock(self, connection: Connection) -> AbstractContextManager[Lock]:
        """Return what holds one runner's lock, not yet taken.

        Raises:
            CommandError: there is no such lock here.
        """
        raise CommandError(
            f"migration_lock() knows PostgreSQL, MariaDB and SQLite, not {self.title}; run the migrations from one process"
        )

    # -- a table that is in use

    def retries(self, connection: Connection, context: MigrationContext, table: str, patience: Patience) -> int:
        """Return how many times DDL may be tried again.

        Raises:
            CommandError: nothing limits how long it would wait.
        """
        return patience.retries

    def limit(self, connection: Connection, patience: Patience) -> AbstractContextManager[None]:
        """Limit how long the statements in the block wait for a table; make them one transaction, where it is possible."""
        return nullcontext()

    def script_limit(self, operations: Operations, patience: Patience) -> AbstractContextManager[None]:
        """Write the limit into a script."""
        return nullcontext()

    def keep(self, impl: Any, table: str, schema: str | None, found: Sequence[Found]) -> AbstractContextManager[None]:
        """Keep a table for us while its triggers and a column of it are changed; elsewhere the transaction does that."""
        return nullcontext()

    def add_column(self, operations: Operations, table: str, column: Column[Any], schema: str | None) -> None:
        """Add a column without writing the table's rows."""
        impl: Any = operations.impl
        impl.add_column(table, column, schema=schema)

    def views(self, inspector: Inspector, schema: str | None) -> list[str]:
        """Return the names of what looks like a table and has no rows of its own."""
        return inspector.get_view_names(schema=schema)

    # -- triggers

    def create(self, trigger: Trigger) -> list[str]:
        """Return the statements that make a trigger, in the place of one that is there."""
        raise CommandError(
            f"version triggers are known for PostgreSQL, MariaDB and SQLite, not for {self.title}; leave the trigger of "
            f"table {trigger.table!r} out"
        )

    def drop(self, trigger: Trigger) -> list[str]:
        """Return the statements that remove a trigger, where it is there."""
        return [f"DROP TRIGGER IF EXISTS {trigger.qualified(self.dialect, trigger.name)}"]

    def triggers_of(self, connection: Connection, table: str, schema: str | None) -> list[Found]:
        """Return the version triggers that are on a table; none where there is no such table."""
        return []

    def children_of(self, connection: Connection, table: str, schema: str | None) -> list[Found]:
        """Return those on other tables that count in this one's rows."""
        return []

    def is_taken(self, connection: Connection, name: str, schema: str | None) -> bool:
        """Say whether a trigger of another table has this name, or its function."""
        return False

    def is_used(self, connection: Connection, function: int) -> bool:
        """Say whether a trigger calls this function."""
        return False


def names(table: str) -> Iterator[str]:
    """Return names for a table's trigger: its own, and others in case a table that had its name before has that one."""
    for number in count(1):
        name = PREFIX + table if number == 1 else f"{PREFIX}{table}_{number}"
        yield name if len(name) <= _LONGEST_NAME else name[:46] + "_" + hashlib.sha256(name.encode()).hexdigest()[:16]


def qualified(dialect: Dialect, name: str, schema: str | None) -> str:
    """Return a name as it is written in SQL, in a schema."""
    prepare = dialect.identifier_preparer
    return f"{prepare.quote_schema(schema)}.{prepare.quote(name)}" if schema else prepare.quote(name)


def literally(statement: str) -> TextClause:
    """Return a statement in which no name and no ``:=`` is a parameter."""
    return text(statement.replace(":", "\\:"))


def column_in(source: str) -> str | None:
    """Return the column in which a trigger of this source counts, None where it is not one of ours."""
    found = _COLUMN.search(source)
    if found is None:
        return None
    return next(name for name in found.groups() if name is not None).replace('""', '"').replace("``", "`")
