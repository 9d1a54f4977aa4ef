"""What the operator lists in every turn is found without reading the versions of the past."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "k005"
down_revision = "k004"
branch_labels = None
depends_on = None

_ONGOING = "state IN ('PENDING', 'MATERIALIZING', 'STAGED', 'ACTIVE', 'DRAINING', 'SUSPENDED')"
_INDEXES = {
    "ix_key_version_ongoing": (["tenant", "model", "version"], _ONGOING),
    "ix_key_version_destroy_at": (["destroy_at"], "state = 'DESTROY_SCHEDULED'"),
}


def upgrade() -> None:
    """Add the indexes. PostgreSQL lets nobody write key versions meanwhile: seconds at some millions."""
    for name, (columns, where) in _INDEXES.items():
        condition = sa.text(where)
        op.create_index(name, "key_version", columns, sqlite_where=condition, postgresql_where=condition)


def downgrade() -> None:
    """Drop the indexes; nothing else depends on them."""
    for name in _INDEXES:
        op.drop_index(name, "key_version")
