"""The four operations on version columns and their triggers: what a migration says, and what it is turned into."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from alembic.operations import BatchOperations, Operations
from alembic.operations.batch import BatchOperationsImpl
from alembic.operations.ops import MigrateOperation

from sqla_uow._alembic_mariadb import add_instantly, keeping_trigger
from sqla_uow._alembic_parents import ChildTrigger, child_trigger
from sqla_uow._alembic_patience import Patience, patiently
from sqla_uow._alembic_target import Target, kind_named, version_column
from sqla_uow._alembic_triggers import Trigger, literally
from sqla_uow._servers import family_of

__all__ = [
    "OPS",
    "AddVersionColumnOp",
    "CreateVersionTriggerOp",
    "DropVersionColumnOp",
    "DropVersionTriggerOp",
    "VersionOp",
    "register",
]


class VersionOp(MigrateOperation, ABC):
    """What the four share: a table's version column, and the patience to wait for the table.

    Args:
        table_name: a table with a primary key.
        column_name: of the version.
        kind: ``"integer"``, ``"uuid"`` or ``"timestamp"``.
        parent: with joined inheritance, the table that has the version; of triggers.
        schema: the table's.
        lock_timeout: seconds that one try waits for the table.
        retries: further tries.
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
        """Do it, on a database or into a script.

        Args:
            operations: given by Alembic.
        """

    def _execute(self, operations: Operations, statements: list[str]) -> None:
        for statement in statements:
            operations.migration_context.impl.execute(literally(statement))

    def _target(self, operations: Operations) -> Target | None:
        """Return the table as it is, None for a script, which is written without looking at a database."""
        script = operations.migration_context.as_sql
        return None if script else Target(operations, self.table_name, self.schema)

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
        table's lock is waited for briefly and often, so that nobody waits behind it for longer than `lock_timeout`.

        Args:
            operations: given by Alembic.
            table_name: a table with a primary key.
            column_name: of the column.
            kind: "integer" for `Versioned`, "uuid" for `VersionedByUUID`, "timestamp" for `VersionedByTimestamp`.
            schema: the table's.
            lock_timeout: seconds of one try; whole ones, 1 at least, on MariaDB.
            retries: further tries; none on PostgreSQL if this transaction has locked other tables before.

        Raises:
            CommandError: the table is unknown, a view, without a primary key or in use for all tries, or the column exists
                with another type.
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
        """Do so within ``batch_alter_table``, to its table."""
        cls._invoke_in_batch(operations, column_name, kind=kind, lock_timeout=lock_timeout, retries=retries)

    def reverse(self) -> VersionOp:
        """Return what takes it back."""
        return self._reversed(DropVersionColumnOp)

    def run(self, operations: Operations) -> None:
        """Do it, on a database or into a script."""
        impl: Any = operations.impl
        column = version_column(self.column_name, kind_named(self.kind))
        target = self._target(operations)
        if target is not None:
            target.primary_key()
            if target.has(column):
                return

        def ddl() -> None:
            if family_of(operations.migration_context.dialect) == "mysql":
                add_instantly(operations, self.table_name, column, self.schema)
            else:
                impl.add_column(self.table_name, column, schema=self.schema)

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

        The arguments are those of ``add_version_column``; `kind` is what taking this back will add.

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
        """Do so within ``batch_alter_table``, to its table."""
        cls._invoke_in_batch(operations, column_name, kind=kind, lock_timeout=lock_timeout, retries=retries)

    def reverse(self) -> VersionOp:
        """Return what takes it back."""
        return self._reversed(AddVersionColumnOp)

    def run(self, operations: Operations) -> None:
        """Do it, on a database or into a script."""
        context = operations.migration_context
        impl: Any = operations.impl
        column = version_column(self.column_name, kind_named(self.kind))
        target = self._target(operations)
        if target is not None:
            target.check_present(self.column_name)
        trigger = Trigger(self.table_name, self.column_name, self.schema)
        in_batch = isinstance(operations.impl, BatchOperationsImpl)

        def ddl() -> None:
            with keeping_trigger(operations, trigger):
                if not in_batch:  # whose copy of the table gets no trigger without its column
                    self._execute(operations, trigger.drop(context.dialect))
                impl.drop_column(self.table_name, column, schema=self.schema)

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

        The ORM's own counting is not doubled.  A trigger that is there already is made anew.  What it does not see is in
        the guide to version columns.

        Args:
            operations: given by Alembic.
            table_name: a table with a primary key.
            column_name: of the version column.
            parent: with joined inheritance, the parent's table, which has the version; this is a child's.  PostgreSQL only.
            schema: the table's.
            lock_timeout: seconds of one try, as in ``add_version_column``.
            retries: further tries.

        Raises:
            CommandError: there is no such table or column, or it is no integer, or the table was in use for all tries.
        """
        operations.invoke(
            cls(table_name, column_name, parent=parent, schema=schema, lock_timeout=lock_timeout, retries=retries)
        )

    def reverse(self) -> VersionOp:
        """Return what takes it back."""
        return self._reversed(DropVersionTriggerOp)

    def run(self, operations: Operations) -> None:
        """Do it, on a database or into a script."""
        target = self._target(operations)
        own = self._trigger(target)
        trigger: Trigger | ChildTrigger = own
        if self.parent is not None:
            trigger = child_trigger(operations, own, self.parent)
        elif target is not None:
            target.check_integer(self.column_name)

        def ddl() -> None:
            self._execute(operations, trigger.create(operations.migration_context.dialect))

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
        """Remove a version trigger, and on PostgreSQL its function; nothing happens where there is none.

        The arguments are those of ``create_version_trigger``.

        Raises:
            CommandError: there is no such table, or it was in use for all tries.
        """
        operations.invoke(
            cls(table_name, column_name, parent=parent, schema=schema, lock_timeout=lock_timeout, retries=retries)
        )

    def reverse(self) -> VersionOp:
        """Return what takes it back."""
        return self._reversed(CreateVersionTriggerOp)

    def run(self, operations: Operations) -> None:
        """Do it, on a database or into a script."""
        trigger = self._trigger(self._target(operations))

        def ddl() -> None:
            self._execute(operations, trigger.drop(operations.migration_context.dialect))

        patiently(operations, self.table_name, self.patience, ddl)


OPS: tuple[type[VersionOp], ...] = (
    AddVersionColumnOp,
    DropVersionColumnOp,
    CreateVersionTriggerOp,
    DropVersionTriggerOp,
)
"""All of them."""


def register() -> None:
    """Make Alembic know the operations: ``op.add_version_column`` and the others."""
    for op in OPS:
        Operations.register_operation(op.name)(op)
        Operations.implementation_for(op)(_run)
        if op.keeps_kind:
            BatchOperations.register_operation(op.name, f"batch_{op.name}")(op)


def _run(operations: Operations, operation: VersionOp) -> None:
    batch = isinstance(operations.impl, BatchOperationsImpl)
    if batch and family_of(operations.migration_context.dialect) != "sqlite":
        # Only SQLite copies the table, and has to be told all changes at once.  Elsewhere it is done here and now.
        operations = Operations(operations.migration_context)
    operation.run(operations)
