"""Alembic's own operations on tables with versions: triggers follow, and our column type is written and compared rightly."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from alembic.ddl.impl import _impls

from sqla_uow._alembic.databases import schema_of
from sqla_uow._alembic.making import in_step, remake, schema_for, unnamed
from sqla_uow._alembic.schema import Found, literally
from sqla_uow._versions.kinds import TIMESTAMP, UUID, UtcTimestamp
from sqla_uow._versions.mapping import INFO_KEY

if TYPE_CHECKING:
    from alembic.autogenerate.api import AutogenContext
    from alembic.operations.batch import ApplyBatchImpl
    from sqlalchemy import Table
    from sqlalchemy.types import TypeEngine

__all__ = ["adapt_dialects"]


_Impl: Any = object  # each dialect's, behind ours in the order of bases


def adapt_dialects() -> None:
    """Put ours before what Alembic knows of each dialect."""
    for dialect, base in list(_impls.items()):
        meta: Any = type(base)  # registers a class in the place of the one that had its dialect before
        meta(f"Adapted{base.__name__}", (_Adapted, base), {"__dialect__": dialect})


class _Adapted(_Impl):  # type: ignore[misc]  # which class, is known when it is installed
    _copied: tuple[str, list[tuple[Found, str]]] = "", []

    @property
    def _above(self) -> Any:
        return super()

    def prep_table_for_batch(self, batch_impl: ApplyBatchImpl, table: Table) -> None:
        """Note the triggers of a table that is to be copied: the database drops them with it, without a word."""
        if not unnamed(self):
            columns: dict[str, Any] = batch_impl.column_transfers  # those that stay, by their old names
            self._copied = (
                batch_impl.temp_table_name,
                [
                    (found, columns[found.column].get("name", found.column))
                    for found in schema_of(self.connection).triggers_of(self.connection, table.name, table.schema)
                    if found.of_child or found.column in columns
                ],
            )
        self._above.prep_table_for_batch(batch_impl, table)

    def rename_table(self, old_table_name: str, new_table_name: str, schema: str | None = None) -> None:
        """Bring the triggers back when the copy takes the table's name."""
        self._above.rename_table(old_table_name, new_table_name, schema=schema)
        copy, kept = self._copied
        if copy == old_table_name:
            del self._copied
            for found, column in kept:
                remake(self, found, column)
        elif not unnamed(self) and schema_of(self.connection).forgets_tables:
            self._follow_table(new_table_name, schema)

    def drop_table(self, table: Table, **options: Any) -> None:
        """Drop the triggers' functions with the table, whose triggers the database drops."""
        schema = schema_for(self)
        found = [] if unnamed(self) else schema.triggers_of(self.connection, table.name, table.schema)
        self._above.drop_table(table, **options)
        for one in found:
            if one.function is not None and not schema.is_used(self.connection, one.function[0]):
                self.execute(literally(f"DROP FUNCTION IF EXISTS {one.function[1]}()"))

    def alter_column(self, table_name: str, column_name: str, *, name: str | None = None, **options: Any) -> None:
        """Have the triggers that count in a column count on when it is renamed."""
        if name is None or name == column_name:
            self._above.alter_column(table_name, column_name, name=name, **options)
            return
        with in_step(self, table_name, column_name, name, options.get("schema")):
            self._above.alter_column(table_name, column_name, name=name, **options)

    def render_type(self, type_obj: TypeEngine[Any], autogen_context: AutogenContext) -> Any:
        """Write our type with its public name, whatever prefix the user's own types have."""
        if type(type_obj) is not UtcTimestamp:
            return self._above.render_type(type_obj, autogen_context)
        autogen_context.imports.add("import sqla_uow.alembic")
        return "sqla_uow.alembic.UtcTimestamp()"

    def compare_server_default(
        self,
        inspector_column: Any,
        metadata_column: Any,
        rendered_metadata_default: Any,
        rendered_inspector_default: Any,
    ) -> Any:
        """Take a version's default for the same as MariaDB's: Alembic is led astray by its colons and its hyphens."""
        defaults = rendered_metadata_default, rendered_inspector_default
        ours = metadata_column.info.get(INFO_KEY) in (TIMESTAMP.name, UUID.name)
        if ours and len({str(one).strip("'").replace("-", "") for one in defaults}) == 1:
            return False
        return self._above.compare_server_default(inspector_column, metadata_column, *defaults)

    def _follow_table(self, table: str, schema: str | None) -> None:
        # With this setting SQLite leaves the old name in a trigger's body.
        if self.connection.exec_driver_sql("PRAGMA legacy_alter_table").scalar():
            for found in schema_of(self.connection).triggers_of(self.connection, table, schema):
                remake(self, found, found.column)
