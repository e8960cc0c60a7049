"""The operations on version columns and their triggers: what a migration says, and what it is turned into."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

from alembic.operations import BatchOperations, Operations
from alembic.operations.batch import BatchOperationsImpl
from alembic.operations.ops import MigrateOperation
from alembic.util import CommandError

from sqla_uow._alembic.databases import schema_in_script, schema_of
from sqla_uow._alembic.making import child_trigger, counting, in_step, make, remove, schema_for, unnamed
from sqla_uow._alembic.patience import patiently
from sqla_uow._alembic.schema import Patience, Trigger, literally, qualified
from sqla_uow._alembic.target import Target, kind_named, version_column

if TYPE_CHECKING:
    from sqla_uow._alembic.postgresql import ChildTrigger

__all__ = [
    "OPS",
    "AddVersionColumnOp",
    "CreateVersionTriggerOp",
    "DropVersionColumnOp",
    "DropVersionTriggerOp",
    "RenameVersionColumnOp",
    "VersionOp",
    "register",
]

logger = logging.getLogger("sqla_uow")


class VersionOp(MigrateOperation, ABC):
    """What the operations share: a table's version column, and the patience to wait for the table.

    Args:
        table_name: a table with a primary key.
        column_name: the version column.
        kind: ``"integer"``, ``"uuid"`` or ``"timestamp"``.
        parent: for a trigger with joined inheritance, the table that has the version.
        schema: the table's schema.
        lock_timeout: seconds that one try waits for the table.
        retries: how many tries may follow the first.
    """

    name: ClassVar[str]
    keeps_kind: ClassVar[bool] = False

    def __init__(
        self,
        table_name: str,
        column_name: str = "version",
        *,
        kind: str = "integer",
        parent: str | None = None,
        schema: str | None = None,
        lock_timeout: float = 1.0,
        retries: int = 30,
    ) -> None:
        self.table_name = table_name
        self.column_name = column_name
        self.kind = kind
        self.parent = parent
        self.schema = schema
        self.patience: Patience = Patience(lock_timeout, retries)

    def to_diff_tuple(self) -> tuple[Any, ...]:
        """Return what ``alembic check`` shows."""
        return (self.name, self.schema, self.table_name, self.column_name)

    @abstractmethod
    def run(self, operations: Operations) -> None:
        """Run the operation on a database, or write it into a script.

        Args:
            operations: given by Alembic.
        """

    def _execute(self, operations: Operations, statements: list[str]) -> None:
        for statement in statements:
            operations.migration_context.impl.execute(literally(statement))

    def _target(self, operations: Operations) -> Target | None:
        """Return the table as it is, None for a script, which is written without looking at a database."""
        impl: Any = operations.migration_context.impl
        return None if impl.as_sql else Target(impl, self.table_name, self.schema)

    def _trigger(self, target: Target | None) -> Trigger:
        key = () if target is None else target.primary_key()
        return Trigger(self.table_name, self.column_name, self.schema, key)

    def _reversed(self, kind: type[VersionOp]) -> VersionOp:
        told: dict[str, Any] = {"kind": self.kind, "parent": self.parent, "schema": self.schema}
        return kind(self.table_name, self.column_name, **told, **self.patience._asdict())

    @classmethod
    def _invoke_in_batch(cls, operations: BatchOperations, column_name: str, **told: Any) -> None:
        impl: Any = operations.impl
        operations.invoke(cls(impl.table_name, column_name, schema=impl.schema, **told))


class AddVersionColumnOp(VersionOp):
    """Add a version column to a table that may be in use."""

    name = "add_version_column"
    keeps_kind = True

    @classmethod
    def add_version_column(
        cls,
        operations: Operations,
        table_name: str,
        column_name: str = "version",
        *,
        kind: str = "integer",
        schema: str | None = None,
        lock_timeout: float = 1.0,
        retries: int = 30,
    ) -> None:
        """Add a version column to a table that may be in use.

        It is NOT NULL with one constant default, so no row is rewritten and none has to be filled in afterwards.  The
        operation waits for the table's lock briefly and often, so that nobody waits behind it for longer than
        `lock_timeout`.

        Args:
            operations: given by Alembic.
            table_name: a table with a primary key.
            column_name: the name of the new column.
            kind: "integer" for `Versioned`, "uuid" for `VersionedByUUID`, "timestamp" for `VersionedByTimestamp`.
            schema: the table's schema.
            lock_timeout: seconds of one try; whole ones, 1 at least, on MariaDB.
            retries: further tries; none on PostgreSQL if this transaction has locked other tables before.

        Raises:
            CommandError: the table is unknown, is a view, has no primary key or was in use for all tries; or the column
                exists with another type.
        """
        operations.invoke(
            cls(table_name, column_name, kind=kind, schema=schema, lock_timeout=lock_timeout, retries=retries)
        )

    @classmethod
    def batch_add_version_column(
        cls,
        operations: BatchOperations,
        column_name: str = "version",
        *,
        kind: str = "integer",
        lock_timeout: float = 1.0,
        retries: int = 30,
    ) -> None:
        """Add a version column to the table of this ``batch_alter_table``."""
        cls._invoke_in_batch(operations, column_name, kind=kind, lock_timeout=lock_timeout, retries=retries)

    def reverse(self) -> VersionOp:
        """Return the operation that undoes this one."""
        return self._reversed(DropVersionColumnOp)

    def run(self, operations: Operations) -> None:
        """Run the operation on a database, or write it into a script."""
        column = version_column(self.column_name, kind_named(self.kind))
        target = self._target(operations)
        if target is not None:
            target.primary_key()
            if target.has(column):
                return

        def ddl() -> None:
            schema_for(operations.migration_context.impl).add_column(operations, self.table_name, column, self.schema)

        patiently(operations, self.table_name, self.patience, ddl)


class DropVersionColumnOp(VersionOp):
    """Remove a version column, after its trigger."""

    name = "drop_version_column"
    keeps_kind = True

    @classmethod
    def drop_version_column(
        cls,
        operations: Operations,
        table_name: str,
        column_name: str = "version",
        *,
        kind: str = "integer",
        schema: str | None = None,
        lock_timeout: float = 1.0,
        retries: int = 30,
    ) -> None:
        """Remove a version column, and first the trigger on it where there is one.

        The arguments are those of ``add_version_column``; `kind` is the kind that a downgrade adds again.

        Raises:
            CommandError: there is no such table or column, or the table was in use for all tries.
        """
        operations.invoke(
            cls(table_name, column_name, kind=kind, schema=schema, lock_timeout=lock_timeout, retries=retries)
        )

    @classmethod
    def batch_drop_version_column(
        cls,
        operations: BatchOperations,
        column_name: str = "version",
        *,
        kind: str = "integer",
        lock_timeout: float = 1.0,
        retries: int = 30,
    ) -> None:
        """Remove the version column of the table of this ``batch_alter_table``."""
        cls._invoke_in_batch(operations, column_name, kind=kind, lock_timeout=lock_timeout, retries=retries)

    def reverse(self) -> VersionOp:
        """Return the operation that undoes this one."""
        return self._reversed(AddVersionColumnOp)

    def run(self, operations: Operations) -> None:
        """Run the operation on a database, or write it into a script."""
        context = operations.migration_context
        impl: Any = operations.impl
        column = version_column(self.column_name, kind_named(self.kind))
        target = self._target(operations)
        if target is not None:
            target.check_present(self.column_name)
        in_batch = isinstance(operations.impl, BatchOperationsImpl)

        def ddl() -> None:
            if in_batch:  # whose copy of the table gets no trigger without its column
                impl.drop_column(self.table_name, column, schema=self.schema)
            elif unnamed(context.impl):
                self._execute(operations, schema_for(context.impl).drop(self._trigger(None)))
                impl.drop_column(self.table_name, column, schema=self.schema)
            else:
                found = counting(impl, self.table_name, self.column_name, self.schema)
                with schema_of(impl.connection).keep(impl, self.table_name, self.schema, found):
                    for one in found:
                        remove(impl, one)
                    impl.drop_column(self.table_name, column, schema=self.schema)

        patiently(operations, self.table_name, self.patience, ddl)


class RenameVersionColumnOp(VersionOp):
    """Rename a version column, and have its triggers count in it under its new name.

    Args:
        table_name: the table that has the column.
        column_name: the old name of the version column.
        new_column_name: its new name.
        told: the other arguments of every `VersionOp`.
    """

    name = "rename_version_column"

    def __init__(self, table_name: str, column_name: str, new_column_name: str, **told: Any) -> None:
        super().__init__(table_name, column_name, **told)
        self.new_column_name = new_column_name

    @classmethod
    def rename_version_column(
        cls,
        operations: Operations,
        table_name: str,
        column_name: str,
        new_column_name: str,
        *,
        schema: str | None = None,
        lock_timeout: float = 1.0,
        retries: int = 30,
    ) -> None:
        """Rename a version column, and have the triggers that count in it follow.

        Args:
            operations: given by Alembic.
            table_name: the table that has the column.
            column_name: the old name of the version column.
            new_column_name: its new name.
            schema: the table's schema.
            lock_timeout: seconds of one try, as in ``add_version_column``.
            retries: how many tries may follow the first.

        Raises:
            CommandError: there is no such table or column, or one of the new name too; or the table was in use for all tries; or
                ``--sql``, where it is not known whether there is a trigger (SQLite's follow by themselves).
        """
        told: dict[str, Any] = {"schema": schema, "lock_timeout": lock_timeout, "retries": retries}
        operations.invoke(cls(table_name, column_name, new_column_name, **told))

    @classmethod
    def batch_rename_version_column(
        cls,
        operations: BatchOperations,
        column_name: str,
        new_column_name: str,
        *,
        lock_timeout: float = 1.0,
        retries: int = 30,
    ) -> None:
        """Rename the version column of the table of this ``batch_alter_table``."""
        told: dict[str, Any] = {"lock_timeout": lock_timeout, "retries": retries}
        cls._invoke_in_batch(operations, column_name, new_column_name=new_column_name, **told)

    def reverse(self) -> VersionOp:
        """Return the operation that undoes this one."""
        told: dict[str, Any] = {"kind": self.kind, "parent": self.parent, "schema": self.schema}
        return type(self)(self.table_name, self.new_column_name, self.column_name, **told, **self.patience._asdict())

    def to_diff_tuple(self) -> tuple[Any, ...]:
        """Return what ``alembic check`` shows."""
        return (*super().to_diff_tuple(), self.new_column_name)

    def run(self, operations: Operations) -> None:
        """Run the operation on a database, or write it into a script."""
        impl: Any = operations.impl
        old, new = self.column_name, self.new_column_name
        in_batch = isinstance(operations.impl, BatchOperationsImpl)
        if in_batch:
            impl.alter_column(self.table_name, old, name=new, schema=self.schema)
            return
        if impl.as_sql and not schema_in_script(impl.dialect).renames_in_triggers:
            raise CommandError(
                f"whether table {self.table_name!r} has a version trigger is not known with --sql; run it on a database, or "
                "write op.drop_version_trigger(), op.alter_column() and op.create_version_trigger()"
            )
        target = self._target(operations)
        done = target is not None and target.check_renamed(old, new)
        quote = impl.dialect.identifier_preparer.quote
        table = qualified(impl.dialect, self.table_name, self.schema)

        def ddl() -> None:
            with in_step(impl, self.table_name, old, new, self.schema):
                if not done:
                    self._execute(operations, [f"ALTER TABLE {table} RENAME COLUMN {quote(old)} TO {quote(new)}"])

        patiently(operations, self.table_name, self.patience, ddl)


class CreateVersionTriggerOp(VersionOp):
    """Have the database count what is written past the ORM."""

    name = "create_version_trigger"

    @classmethod
    def create_version_trigger(
        cls,
        operations: Operations,
        table_name: str,
        column_name: str = "version",
        *,
        parent: str | None = None,
        schema: str | None = None,
        lock_timeout: float = 1.0,
        retries: int = 30,
    ) -> None:
        """Have the database count each UPDATE of a row in its integer version, whoever sends it and whatever it says.

        The ORM's own counting is not doubled.  A trigger that is there already is replaced.  The guide to version
        columns says what a trigger does not see.

        Args:
            operations: given by Alembic.
            table_name: a table with a primary key.
            column_name: the version column.
            parent: with joined inheritance, the parent's table, which has the version; `table_name` is then a child's
                table.  PostgreSQL only.
            schema: the table's schema.
            lock_timeout: seconds of one try, as in ``add_version_column``.
            retries: how many tries may follow the first.

        Raises:
            CommandError: there is no such table or column, or it is not an integer, or the table was in use for all tries.
        """
        operations.invoke(
            cls(table_name, column_name, parent=parent, schema=schema, lock_timeout=lock_timeout, retries=retries)
        )

    def reverse(self) -> VersionOp:
        """Return the operation that undoes this one."""
        return self._reversed(DropVersionTriggerOp)

    def run(self, operations: Operations) -> None:
        """Run the operation on a database, or write it into a script."""
        target = self._target(operations)
        own = self._trigger(target)
        trigger: Trigger | ChildTrigger = own
        if self.parent is not None:
            trigger = child_trigger(operations.migration_context.impl, own, self.parent)
        elif target is not None:
            target.check_integer(self.column_name)

        def ddl() -> None:
            make(operations.migration_context.impl, trigger)

        patiently(operations, self.table_name, self.patience, ddl)


class DropVersionTriggerOp(VersionOp):
    """Remove a version trigger."""

    name = "drop_version_trigger"

    @classmethod
    def drop_version_trigger(
        cls,
        operations: Operations,
        table_name: str,
        column_name: str = "version",
        *,
        parent: str | None = None,
        schema: str | None = None,
        lock_timeout: float = 1.0,
        retries: int = 30,
    ) -> None:
        """Remove a table's version trigger, even if the table was renamed meanwhile; log a warning if it has none.

        The arguments are those of ``create_version_trigger``.

        Raises:
            CommandError: there is no such table, or it was in use for all tries.
        """
        operations.invoke(
            cls(table_name, column_name, parent=parent, schema=schema, lock_timeout=lock_timeout, retries=retries)
        )

    def reverse(self) -> VersionOp:
        """Return the operation that undoes this one."""
        return self._reversed(CreateVersionTriggerOp)

    def run(self, operations: Operations) -> None:
        """Run the operation on a database, or write it into a script."""
        impl: Any = operations.migration_context.impl
        trigger = self._trigger(self._target(operations))
        schema, derived = schema_for(impl), unnamed(impl)
        found = [] if derived else schema.triggers_of(impl.connection, self.table_name, self.schema)
        if not found and not derived:
            # No error: on MariaDB a downgrade that failed behind this operation has to be run again from its beginning.
            logger.warning("table %r has no version trigger, so none was dropped", self.table_name)
            return

        def ddl() -> None:
            if derived:
                self._execute(operations, schema.drop(trigger))
            for one in found:
                remove(impl, one)

        patiently(operations, self.table_name, self.patience, ddl)


OPS: tuple[type[VersionOp], ...] = (
    AddVersionColumnOp,
    DropVersionColumnOp,
    RenameVersionColumnOp,
    CreateVersionTriggerOp,
    DropVersionTriggerOp,
)
"""All of them."""


def register() -> None:
    """Make Alembic know the operations: ``op.add_version_column`` and the others."""
    for op in OPS:
        Operations.register_operation(op.name)(op)
        Operations.implementation_for(op)(_run)
        if hasattr(op, f"batch_{op.name}"):
            BatchOperations.register_operation(op.name, f"batch_{op.name}")(op)


def _run(operations: Operations, operation: VersionOp) -> None:
    batch = isinstance(operations.impl, BatchOperationsImpl)
    if batch and not schema_in_script(operations.migration_context.dialect).copies_tables:
        # Only SQLite copies the table, and has to be told all changes at once.  Elsewhere it is done here and now.
        operations = Operations(operations.migration_context)
    operation.run(operations)
