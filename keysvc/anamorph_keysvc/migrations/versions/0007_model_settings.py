"""A model's record may change: its row version, its base's digest, and what each version was issued under."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "k007"
down_revision = "k006"
branch_labels = None
depends_on = None

SETTINGS = ("base", "base_digest", "engine", "dtype", "context_length", "serving")
ONGOING = ("PENDING", "MATERIALIZING", "STAGED", "ACTIVE", "DRAINING", "SUSPENDED")

_MODEL = sa.table(
    "model",
    *(sa.column(name) for name in ("tenant", "id", *SETTINGS[:-1])),
    sa.column("serving", sa.JSON()),
)
_VERSION = sa.table(
    "key_version",
    *(sa.column(name) for name in ("tenant", "model", "state", "row_version")),
    sa.column("settings", sa.JSON(none_as_null=True)),
)


def upgrade() -> None:
    """Add the columns; versions that are not over get their models' settings, fixed so far."""
    op.add_column("model", sa.Column("base_digest", sa.String(), nullable=True))
    op.add_column("model", sa.Column("row_version", sa.Integer(), nullable=False, server_default="1"))
    op.add_column("key_version", sa.Column("settings", sa.JSON(none_as_null=True), nullable=True))
    connection = op.get_bind()
    for row in connection.execute(sa.select(_MODEL)).mappings().all():
        own = (_VERSION.c.tenant == row["tenant"], _VERSION.c.model == row["id"])
        connection.execute(
            sa.update(_VERSION)
            .where(*own, _VERSION.c.state.in_(ONGOING))
            .values(settings=_settings(row), row_version=_VERSION.c.row_version + 1)
        )


def _settings(row: sa.RowMapping) -> dict[str, object]:
    return {name: row[name] for name in SETTINGS}


def downgrade() -> None:
    """Drop the columns, and with them what versions were issued under before a change."""
    op.drop_column("key_version", "settings")
    op.drop_column("model", "row_version")
    op.drop_column("model", "base_digest")
