"""Transfers may have idempotency keys.

Autogenerate wrote this from the table that `IdempotencyKeys` adds to the `MetaData`.
"""

import sqlalchemy as sa
from sqlalchemy.dialects import mysql

from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Make the table of the keys."""
    op.create_table(
        "sqla_uow_bank_key",
        sa.Column("digest", _binary(), nullable=False),
        sa.Column("space", sa.String(100), nullable=False),
        sa.Column("fingerprint", _binary(), nullable=True),
        sa.Column("status", sa.SmallInteger(), nullable=True),
        sa.Column("headers", sa.LargeBinary(), nullable=True),
        sa.Column("result", sa.LargeBinary().with_variant(mysql.MEDIUMBLOB(), "mysql", "mariadb"), nullable=True),
        sa.Column("created_at", _time(), nullable=False),
        sa.Column("expires_at", _time(), nullable=False),
        sa.PrimaryKeyConstraint("digest"),
    )
    op.create_index("ix_sqla_uow_bank_key_expires_at", "sqla_uow_bank_key", ["expires_at"])


def _binary() -> sa.LargeBinary:
    return sa.LargeBinary(32).with_variant(mysql.BINARY(32), "mysql", "mariadb")


def _time() -> sa.DateTime:
    return sa.DateTime(timezone=True).with_variant(mysql.DATETIME(fsp=6), "mysql", "mariadb")


def downgrade() -> None:
    """Drop it."""
    op.drop_table("sqla_uow_bank_key")
