"""How a model is served; those from before are served as the defaults say."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "k004"
down_revision = "k003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column. Its default stays: a release of before that still runs names no such column."""
    op.add_column("model", sa.Column("serving", sa.JSON(), nullable=False, server_default="{}"))


def downgrade() -> None:
    """Drop the column, and with it what was chosen for each model."""
    op.drop_column("model", "serving")
