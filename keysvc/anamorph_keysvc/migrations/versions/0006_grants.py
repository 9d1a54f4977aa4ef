"""A grant for each part of a materialisation; those from before are for one in a single piece."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "k006"
down_revision = "k005"
branch_labels = None
depends_on = None

TABLE, INDEX = "release_grant", "uq_release_grant_current"
PLACE = ["tenant", "model", "version"]
# Each with its check, which SQLite adds to a table that stands only so.
COLUMNS = (
    "parts INTEGER DEFAULT '0' NOT NULL",
    f"part INTEGER DEFAULT '0' NOT NULL CONSTRAINT ck_{TABLE}_part CHECK (part >= 0 AND part <= parts)",
    f"done FLOAT DEFAULT '0' NOT NULL CONSTRAINT ck_{TABLE}_done CHECK (done BETWEEN 0 AND 1)",
)
CURRENT = sa.text("voided_at IS NULL")


def _index(*more: str) -> None:
    op.create_index(
        INDEX, TABLE, [*PLACE, *more], unique=True, sqlite_where=CURRENT, postgresql_where=CURRENT
    )


def upgrade() -> None:
    """Add the columns. Their defaults stay: a release of before that still runs names none of them."""
    op.drop_index(INDEX, TABLE)
    for column in COLUMNS:
        op.execute(f"ALTER TABLE {TABLE} ADD COLUMN {column}")
    _index("part")


def downgrade() -> None:
    """Void the grants of parts, whose jobs a release of before does not know, and drop the columns."""
    op.execute(f"UPDATE {TABLE} SET voided_at = created_at WHERE parts > 0 AND voided_at IS NULL")  # noqa: S608 - constants
    op.drop_index(INDEX, TABLE)
    for column in reversed(COLUMNS):
        op.drop_column(TABLE, column.partition(" ")[0])
    _index()
