"""The tables, as they were before anybody thought of two tabs that edit one account."""

import sqlalchemy as sa

from alembic import op

revision = "0001"
down_revision = None

# A MariaDB whose default is latin1 or utf8mb3 could not store every name.
UTF8 = {"mysql_charset": "utf8mb4", "mariadb_charset": "utf8mb4"}


def upgrade() -> None:
    """Make the tables."""
    op.create_table(
        "sqla_uow_bank_account",
        sa.Column("id", sa.Integer(), primary_key=True),
        sa.Column("owner", sa.String(80), nullable=False),
        sa.Column("credit", sa.BigInteger(), nullable=False),
        sa.Column("balance", sa.BigInteger(), nullable=False),
        **UTF8,
    )
    op.create_table(
        "sqla_uow_bank_entry",
        sa.Column("id", sa.Integer(), primary_key=True),
        sa.Column("source", sa.Integer(), sa.ForeignKey("sqla_uow_bank_account.id"), index=True),
        sa.Column("target", sa.Integer(), sa.ForeignKey("sqla_uow_bank_account.id"), nullable=False, index=True),
        sa.Column("amount", sa.BigInteger(), nullable=False),
        sa.Column("reference", sa.String(80), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        **UTF8,
    )
    op.create_table(
        "sqla_uow_bank_clerk",
        sa.Column("number", sa.Integer(), primary_key=True, autoincrement=False),
        sa.Column("on_duty", sa.Boolean(), nullable=False),
        sa.Column("found_nobody", sa.Integer(), nullable=False),
        **UTF8,
    )


def downgrade() -> None:
    """Drop the tables, those first that refer to others."""
    op.drop_table("sqla_uow_bank_clerk")
    op.drop_table("sqla_uow_bank_entry")
    op.drop_table("sqla_uow_bank_account")
