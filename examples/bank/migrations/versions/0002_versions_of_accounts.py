"""`Account` gained the mixin `Versioned`.

``op.add_version_column`` is what autogenerate wrote.  The trigger was added by hand: it counts what is written past the
ORM too, by somebody with a SQL prompt, say, so that a tab that was open meanwhile is told.
"""

from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Count the changes of each account from here on; neither rewrites a row, nor holds up those who use the table."""
    op.add_version_column("sqla_uow_bank_account")
    op.create_version_trigger("sqla_uow_bank_account")


def downgrade() -> None:
    """Count no more; this drops the trigger first."""
    op.drop_version_column("sqla_uow_bank_account")
