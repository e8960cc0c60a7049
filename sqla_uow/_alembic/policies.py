"""The operations on tenant policies: row level security of PostgreSQL on one column."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from alembic.operations import Operations
from alembic.operations.ops import MigrateOperation
from alembic.util import CommandError
from sqlalchemy import Text
from sqlalchemy.types import TypeEngine

from sqla_uow._alembic.patience import patiently
from sqla_uow._alembic.schema import Patience, literally, qualified
from sqla_uow._alembic.target import Target
from sqla_uow._settings.sources import check_name

if TYPE_CHECKING:
    from alembic.autogenerate.api import AutogenContext

__all__ = ["POLICY_OPS", "CreateTenantPolicyOp", "DropTenantPolicyOp", "register_policies", "render_policy"]

_LONGEST = 63


class TenantPolicyOp(MigrateOperation):
    """What both have in common: a table's tenant column, and the setting that it is compared with.

    Args:
        table_name: the table.
        column_name: its tenant column.
        setting: the name of the setting.
        type_: of the column.
        policy_name: None makes one of the table's name.
        schema: the table's schema.
        lock_timeout: seconds that one try waits for the table.
        retries: how many tries may follow the first.
    """

    name: ClassVar[str]

    def __init__(
        self,
        table_name: str,
        column_name: str,
        *,
        setting: str,
        type_: TypeEngine[Any] | type[TypeEngine[Any]] | None = None,
        policy_name: str | None = None,
        schema: str | None = None,
        lock_timeout: float = 1.0,
        retries: int = 30,
    ) -> None:
        try:
            self.setting: str = check_name(setting, f"op.{self.name}()")
        except (TypeError, ValueError) as error:
            raise CommandError(str(error)) from None
        if isinstance(type_, type) and issubclass(type_, TypeEngine):
            type_ = type_()
        if type_ is not None and not isinstance(type_, TypeEngine):
            raise CommandError(
                f"op.{self.name}() has {type_!r} as the type of {column_name!r}; use one of SQLAlchemy's, as sa.Integer()"
            )
        self.table_name = table_name
        self.column_name = column_name
        self.type_: TypeEngine[Any] = Text() if type_ is None else type_
        self.policy_name: str = policy_name or _usual_name(table_name, column_name)
        self.schema = schema
        self.patience: Patience = Patience(lock_timeout, retries)

    def to_diff_tuple(self) -> tuple[Any, ...]:
        """Return what ``alembic check`` shows."""
        return (self.name, self.schema, self.table_name, self.column_name, self.setting)

    def _reversed(self, kind: type[TenantPolicyOp]) -> TenantPolicyOp:
        return kind(
            self.table_name, self.column_name, setting=self.setting, type_=self.type_, policy_name=self.policy_name,
            schema=self.schema, **self.patience._asdict(),
        )  # fmt: skip

    def _statements(self, dialect: Any) -> list[str]:
        """Return what is sent."""
        raise NotImplementedError

    def run(self, operations: Operations) -> None:
        """Run the operation on a database, or write it into a script."""
        impl: Any = operations.migration_context.impl
        if impl.dialect.name != "postgresql":
            raise CommandError(
                f"op.{self.name}() is for PostgreSQL, and {impl.dialect.name} has no row level security; leave it out there"
            )
        if not impl.as_sql:
            Target(impl, self.table_name, self.schema).check_present(self.column_name)

        def ddl() -> None:
            for statement in self._statements(impl.dialect):
                impl.execute(literally(statement))

        patiently(operations, self.table_name, self.patience, ddl)


class CreateTenantPolicyOp(TenantPolicyOp):
    """Show each transaction the rows of its own tenant only."""

    name = "create_tenant_policy"

    @classmethod
    def create_tenant_policy(
        cls,
        operations: Operations,
        table_name: str,
        column_name: str,
        *,
        setting: str,
        type_: TypeEngine[Any] | type[TypeEngine[Any]] | None = None,
        policy_name: str | None = None,
        schema: str | None = None,
        lock_timeout: float = 1.0,
        retries: int = 30,
    ) -> None:
        """Show each transaction only the rows whose column is its setting, and let it write no others; on PostgreSQL.

        Row level security is switched on, for the table's owner too, and one policy is made.  Without the setting, or
        with an empty one, there is no row.  Superusers and roles with BYPASSRLS see all rows whatever a policy says.

        Args:
            operations: given by Alembic.
            table_name: a table.
            column_name: the column that says whose a row is.
            setting: the name of the setting that a transaction is told, such as "app.tenant".
            type_: the type of the column, text if it is left out.
            policy_name: the policy's name; None makes one of the table's and the column's.
            schema: the table's schema.
            lock_timeout: seconds of one try, as in ``add_version_column``.
            retries: how many tries may follow the first.

        Raises:
            CommandError: this is not PostgreSQL, there is no such table or column, or the table was in use for all tries.
        """
        operations.invoke(
            cls(
                table_name, column_name, setting=setting, type_=type_, policy_name=policy_name, schema=schema,
                lock_timeout=lock_timeout, retries=retries,
            )
        )  # fmt: skip

    def reverse(self) -> TenantPolicyOp:
        """Return the operation that undoes this one."""
        return self._reversed(DropTenantPolicyOp)

    def _statements(self, dialect: Any) -> list[str]:
        """Return what is sent."""
        quote = dialect.identifier_preparer.quote
        table = qualified(dialect, self.table_name, self.schema)
        kind = self.type_.compile(dialect=dialect)
        # Empty is what a setting of an earlier transaction leaves, and no value of most types.
        mine = f"{quote(self.column_name)} = CAST(nullif(current_setting('{self.setting}', true), '') AS {kind})"
        return [
            f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY",
            f"ALTER TABLE {table} FORCE ROW LEVEL SECURITY",
            f"CREATE POLICY {quote(self.policy_name)} ON {table} USING ({mine}) WITH CHECK ({mine})",
        ]


class DropTenantPolicyOp(TenantPolicyOp):
    """Show everybody all rows again."""

    name = "drop_tenant_policy"

    @classmethod
    def drop_tenant_policy(
        cls,
        operations: Operations,
        table_name: str,
        column_name: str,
        *,
        setting: str,
        type_: TypeEngine[Any] | type[TypeEngine[Any]] | None = None,
        policy_name: str | None = None,
        schema: str | None = None,
        lock_timeout: float = 1.0,
        retries: int = 30,
    ) -> None:
        """Remove a tenant policy, and switch row level security off unless the table has other policies.

        The arguments are those of ``create_tenant_policy``; `setting` and `type_` are what a downgrade makes again.

        Raises:
            CommandError: this is not PostgreSQL, there is no such table or column, or the table was in use for all tries.
        """
        operations.invoke(
            cls(
                table_name, column_name, setting=setting, type_=type_, policy_name=policy_name, schema=schema,
                lock_timeout=lock_timeout, retries=retries,
            )
        )  # fmt: skip

    def reverse(self) -> TenantPolicyOp:
        """Return the operation that undoes this one."""
        return self._reversed(CreateTenantPolicyOp)

    def _statements(self, dialect: Any) -> list[str]:
        """Return what is sent."""
        quote = dialect.identifier_preparer.quote
        table = qualified(dialect, self.table_name, self.schema)
        literal = table.replace("'", "''")
        switch_off = f"ALTER TABLE {table} NO FORCE ROW LEVEL SECURITY; ALTER TABLE {table} DISABLE ROW LEVEL SECURITY"
        others = f"SELECT FROM pg_catalog.pg_policy WHERE polrelid = to_regclass('{literal}')"  # quoted
        return [
            f"DROP POLICY {quote(self.policy_name)} ON {table}",
            # With another policy left, switching off would show all that it hides.
            f"DO $$ BEGIN IF NOT EXISTS ({others}) THEN {switch_off}; END IF; END $$",
        ]


POLICY_OPS: tuple[type[TenantPolicyOp], ...] = (CreateTenantPolicyOp, DropTenantPolicyOp)
"""Both of them."""


def register_policies() -> None:
    """Make Alembic know the operations."""
    for op in POLICY_OPS:
        Operations.register_operation(op.name)(op)
        Operations.implementation_for(op)(_run)


def _usual_name(table_name: str, column_name: str) -> str:
    return f"{table_name}_{column_name}"[:_LONGEST]


def _run(operations: Operations, operation: TenantPolicyOp) -> None:
    operation.run(operations)


def render_policy(context: AutogenContext, op: TenantPolicyOp) -> str:
    """Write one into a generated migration."""
    context.imports.add("import sqla_uow.alembic")
    arguments = [repr(str(op.table_name)), repr(str(op.column_name)), f"setting={op.setting!r}"]
    if type(op.type_) is not Text:
        arguments.append(f"type_={context.opts['sqlalchemy_module_prefix']}{op.type_!r}")
    if op.policy_name != _usual_name(op.table_name, op.column_name):
        arguments.append(f"policy_name={str(op.policy_name)!r}")
    if op.schema:
        arguments.append(f"schema={str(op.schema)!r}")
    return f"{context.opts['alembic_module_prefix']}{op.name}({', '.join(arguments)})"
