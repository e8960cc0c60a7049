"""${message}."""

import sqlalchemy as sa

from alembic import op
${imports if imports else ""}
revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}


def upgrade() -> None:
    """Go on from revision ${down_revision}."""
    ${upgrades if upgrades else "pass"}


def downgrade() -> None:
    """Go back to revision ${down_revision}."""
    ${downgrades if downgrades else "pass"}
