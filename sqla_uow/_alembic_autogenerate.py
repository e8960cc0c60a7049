"""How version columns are written into a migration that Alembic generates, and kept by SQLite's batches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from alembic.autogenerate import renderers
from alembic.ddl.impl import DefaultImpl
from alembic.operations.ops import AddColumnOp, CreateTableOp, DropColumnOp
from sqlalchemy import inspect
from sqlalchemy.dialects import sqlite

from sqla_uow._alembic_operations import OPS, AddVersionColumnOp, DropVersionColumnOp, VersionOp
from sqla_uow._alembic_target import kind_named
from sqla_uow._alembic_triggers import literally, saved_triggers
from sqla_uow._version_mapping import INFO_KEY
from sqla_uow._version_types import UtcTimestamp

if TYPE_CHECKING:
    from collections.abc import Callable

    from alembic.autogenerate.api import AutogenContext
    from sqlalchemy import Column, Table

__all__ = ["keep_triggers", "register_renderers"]


def register_renderers() -> None:
    """Render our operations, and Alembic's where a version column is added or dropped; else as before."""
    for op in OPS:
        renderers.dispatch_for(op)(_render)
    _wrap(AddColumnOp, _added)
    _wrap(DropColumnOp, _dropped)
    _wrap(CreateTableOp, None)


def _wrap(op: type[Any], ours: Callable[[Any], VersionOp | None] | None) -> None:
    before = renderers.dispatch(op)

    def render(context: AutogenContext, operation: Any) -> Any:
        version = ours(operation) if ours is not None else None
        if version is not None:
            return _render(context, version)
        return _with_public_name(context, before(context, operation))

    registry: dict[tuple[Any, str], Any] = renderers._registry
    registry[op, "default"] = render  # dispatch_for(op, replace=True), which Alembic 1.16 does not have


def _render(context: AutogenContext, op: VersionOp) -> str:
    context.imports.add("import sqla_uow.alembic")  # for those who read the migration; env.py has installed it
    batch = getattr(context, "_has_batch", False)  # as Alembic's own renderers ask
    prefix = context.opts["alembic_module_prefix"] if not batch else "batch_op."
    arguments = [] if batch else [repr(str(op.table_name))]
    if op.column_name != "version":
        arguments.append(f"column_name={str(op.column_name)!r}")
    if op.parent is not None:
        arguments.append(f"parent={op.parent!r}")
    if op.keeps_kind and op.kind != "integer":
        arguments.append(f"kind={op.kind!r}")
    if op.schema and not batch:
        arguments.append(f"schema={str(op.schema)!r}")
    return f"{prefix}{op.name}({', '.join(arguments)})"


def _with_public_name(context: AutogenContext, rendered: Any) -> Any:
    private = f"{UtcTimestamp.__module__}.{UtcTimestamp.__name__}"
    if isinstance(rendered, str) and private in rendered:
        context.imports.add("import sqla_uow.alembic")
        return rendered.replace(private, f"sqla_uow.alembic.{UtcTimestamp.__name__}")
    return rendered


def _added(op: AddColumnOp) -> VersionOp | None:
    return _version_op(AddVersionColumnOp, op.table_name, op.schema, op.column)


def _dropped(op: DropColumnOp) -> VersionOp | None:
    return _version_op(DropVersionColumnOp, op.table_name, op.schema, op.to_column())


def _version_op(kind: type[VersionOp], table: str, schema: str | None, column: Column[Any]) -> VersionOp | None:
    """Return our operation for a column of a version mixin, if it is as the mixin makes it."""
    name = column.info.get(INFO_KEY)
    if name is None or name == "xmin":
        return None
    ours = kind_named(name)
    same_type = type(column.type) is type(ours.column().column.type)
    default = getattr(column.server_default, "arg", None)
    if not same_type or str(default) != ours.server_default:
        return None  # the model has chosen its own, which only a plain operation can say
    return kind(table, column.name, kind=name, schema=schema)


def keep_triggers() -> type[Any]:
    """Have SQLite's batches, which make the table anew, bring our triggers back: SQLite drops them without a word."""
    base: Any = DefaultImpl.get_by_dialect(sqlite.dialect())

    class KeepingImpl(base):  # type: ignore[misc]  # which class, is known when it is installed
        __dialect__ = "sqlite"  # by which Alembic replaces the one before

        def drop_table(self, table: Table, **options: Any) -> None:
            if self.connection is not None and not self.as_sql:
                self._saved = saved_triggers(self.connection, table.name)
            base.drop_table(self, table, **options)

        def rename_table(self, old_table_name: str, new_table_name: str, schema: str | None = None) -> None:
            base.rename_table(self, old_table_name, new_table_name, schema=schema)
            saved, self._saved = getattr(self, "_saved", []), []
            if not saved:
                return
            columns = {column["name"] for column in inspect(self.connection).get_columns(new_table_name)}
            for column, statement in saved:
                if column in columns and f"ON {self.dialect.identifier_preparer.quote(new_table_name)} " in statement:
                    self.execute(literally(statement))

    return KeepingImpl
