"""The bank has branches, and each sees its own accounts, entries and clerks only; policies do that, so on PostgreSQL."""

import sqlalchemy as sa

from alembic import op

revision = "0004"
down_revision = "0003"

TABLES = ("sqla_uow_bank_account", "sqla_uow_bank_entry", "sqla_uow_bank_clerk")
LONGEST = 20


def upgrade() -> None:
    """Note the branch of each row; what is there belongs to the head office."""
    postgresql = op.get_context().dialect.name == "postgresql"
    for table in TABLES:
        op.add_column(table, sa.Column("branch", sa.String(LONGEST), nullable=False, server_default="main"))
        if postgresql:  # a new row is of the branch that writes it
            of_writer = sa.text("coalesce(nullif(current_setting('bank.branch', true), ''), 'main')")
            op.alter_column(table, "branch", server_default=of_writer)
            op.create_tenant_policy(table, "branch", setting="bank.branch", type_=sa.String(LONGEST))


def downgrade() -> None:
    """Have one branch again."""
    postgresql = op.get_context().dialect.name == "postgresql"
    for table in TABLES:
        if postgresql:
            op.drop_tenant_policy(table, "branch", setting="bank.branch", type_=sa.String(LONGEST))
        op.drop_column(table, "branch")
