"""How version columns are written into a migration that Alembic generates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from alembic.autogenerate import renderers
from alembic.operations.ops import AddColumnOp, DropColumnOp

from sqla_uow._alembic.operations import OPS, AddVersionColumnOp, DropVersionColumnOp, RenameVersionColumnOp, VersionOp
from sqla_uow._alembic.policies import POLICY_OPS, render_policy
from sqla_uow._alembic.target import kind_named
from sqla_uow._versions.mapping import INFO_KEY

if TYPE_CHECKING:
    from collections.abc import Callable

    from alembic.autogenerate.api import AutogenContext
    from sqlalchemy import Column

__all__ = ["register_renderers"]


def register_renderers() -> None:
    """Render our operations, and Alembic's where a version column is added or dropped; else as before."""
    for op in OPS:
        renderers.dispatch_for(op)(_render)
    for policy_op in POLICY_OPS:
        renderers.dispatch_for(policy_op)(render_policy)
    _wrap(AddColumnOp, _added)
    _wrap(DropColumnOp, _dropped)


def _wrap(op: type[Any], ours: Callable[[Any], VersionOp | None]) -> None:
    before = renderers.dispatch(op)

    def render(context: AutogenContext, operation: Any) -> Any:
        version = ours(operation)
        return before(context, operation) if version is None else _render(context, version)

    registry: dict[tuple[Any, str], Any] = renderers._registry
    registry[op, "default"] = render  # dispatch_for(op, replace=True), which Alembic 1.16 does not have


def _render(context: AutogenContext, op: VersionOp) -> str:
    context.imports.add("import sqla_uow.alembic")  # for those who read the migration; env.py has installed it
    batch = getattr(context, "_has_batch", False)  # as Alembic's own renderers ask
    prefix = context.opts["alembic_module_prefix"] if not batch else "batch_op."
    arguments = [] if batch else [repr(str(op.table_name))]
    if isinstance(op, RenameVersionColumnOp):
        arguments += [repr(str(op.column_name)), repr(str(op.new_column_name))]
    elif op.column_name != "version":
        arguments.append(f"column_name={str(op.column_name)!r}")
    if op.parent is not None:
        arguments.append(f"parent={op.parent!r}")
    if op.keeps_kind and op.kind != "integer":
        arguments.append(f"kind={op.kind!r}")
    if op.schema and not batch:
        arguments.append(f"schema={str(op.schema)!r}")
    return f"{prefix}{op.name}({', '.join(arguments)})"


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
