"""A grant for each part of a materialisation; those from before are for one in a single piece."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "k005g"
down_revision = "k004"
branch_labels = None
depends_on = None

TABLE, INDEX = "release_grant", "uq_release_grant_current"
PLACE = ["tenant", "model", "version"]
CURRENT = sa.text("voided_at IS NULL")


def _index(*more: str) -> None:
    op.create_index(
        INDEX, TABLE, [*PLACE, *more], unique=True, sqlite_where=CURRENT, postgresql_where=CURRENT
    )


def upgrade() -> None:
    """Add the columns. Their defaults stay: a release of before that still runs names none of them."""
    op.drop_index(INDEX, TABLE)
    with op.batch_alter_table(TABLE) as table:
        table.add_column(sa.Column("parts", sa.Integer(), nullable=False, server_default="0"))
        table.add_column(sa.Column("part", sa.Integer(), nullable=False, server_default="0"))
        table.add_column(sa.Column("done", sa.Float(), nullable=False, server_default="0"))
        table.create_check_constraint("part", "part BETWEEN 0 AND parts")
        table.create_check_constraint("done", "done BETWEEN 0 AND 1")
    _index("part")


def downgrade() -> None:
    """Void the grants of parts, whose jobs a release of before does not know, and drop the columns."""
    op.execute(f"UPDATE {TABLE} SET voided_at = created_at WHERE parts > 0 AND voided_at IS NULL")  # noqa: S608 - constants
    op.drop_index(INDEX, TABLE)
    with op.batch_alter_table(TABLE) as table:
        table.drop_constraint("done", type_="check")
        table.drop_constraint("part", type_="check")
        for name in ("done", "part", "parts"):
            table.drop_column(name)
    _index()
