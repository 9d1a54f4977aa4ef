"""Tenants, models, key versions, operations, grants, credentials, webhooks, audit."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "k001"
down_revision = None
branch_labels = None
depends_on = None

STATES = (
    "PENDING",
    "MATERIALIZING",
    "STAGED",
    "ACTIVE",
    "DRAINING",
    "RETIRED",
    "SUSPENDED",
    "COMPROMISED",
    "FAILED",
    "DESTROY_SCHEDULED",
    "DESTROYED",
)


def _text(name: str, *, nullable: bool = False) -> sa.Column[str]:
    return sa.Column(name, sa.String(), nullable=nullable)


def _column(name: str, kind: type[sa.types.TypeEngine[Any]], *, nullable: bool = False) -> sa.Column[Any]:
    return sa.Column(name, kind(), nullable=nullable)


def _time(name: str, *, nullable: bool = False) -> sa.Column[Any]:
    return sa.Column(name, sa.DateTime(timezone=True), nullable=nullable)


def _choice(name: str, values: tuple[str, ...], *, nullable: bool = False) -> sa.Column[str]:
    kind = sa.Enum(*values, name=name, native_enum=False, create_constraint=True, length=20)
    return sa.Column(name, kind, nullable=nullable)


def _answer() -> None:
    op.create_table(
        "answer",
        _text("actor"),
        _text("key"),
        _text("tenant", nullable=True),
        _text("request_digest"),
        _text("body"),
        _time("created_at"),
        sa.PrimaryKeyConstraint("actor", "key", name="pk_answer"),
    )
    op.create_index("ix_answer_created_at", "answer", ["created_at"])


def _backup() -> None:
    op.create_table(
        "backup",
        _text("id"),
        _time("taken_at"),
        _time("recorded_at"),
        sa.PrimaryKeyConstraint("id", name="pk_backup"),
    )


def _signing_key() -> None:
    op.create_table(
        "signing_key",
        _text("kid"),
        _text("public_key"),
        _column("ciphertext", sa.LargeBinary, nullable=True),
        _time("created_at"),
        _time("signs_from"),
        _time("retired_at", nullable=True),
        sa.CheckConstraint("retired_at IS NULL OR ciphertext IS NULL", name="erased"),
        sa.PrimaryKeyConstraint("kid", name="pk_signing_key"),
    )


def _tenant() -> None:
    op.create_table(
        "tenant",
        _text("id"),
        _text("display_name"),
        _text("kek"),
        _column("quota", sa.JSON),
        _time("created_at"),
        sa.PrimaryKeyConstraint("id", name="pk_tenant"),
        sa.UniqueConstraint("kek", name="uq_tenant_kek"),
    )


def _api_key() -> None:
    op.create_table(
        "api_key",
        _text("id"),
        _text("tenant", nullable=True),
        _text("name"),
        _choice("role", ("admin", "rotator", "client", "materializer", "auditor", "platform")),
        _text("hash"),
        _time("created_at"),
        _time("revoked_at", nullable=True),
        sa.CheckConstraint("(role = 'platform') = (tenant IS NULL)", name="platform"),
        sa.ForeignKeyConstraint(["tenant"], ["tenant.id"], name="fk_api_key_tenant"),
        sa.PrimaryKeyConstraint("id", name="pk_api_key"),
        sa.UniqueConstraint("hash", name="uq_api_key_hash"),
    )
    op.create_index("ix_api_key_tenant", "api_key", ["tenant", "id"])


def _audit() -> None:
    op.create_table(
        "audit",
        _text("tenant"),
        _column("sequence", sa.Integer),
        _time("at"),
        _text("actor"),
        _text("action"),
        _text("subject"),
        _column("detail", sa.JSON),
        _text("previous"),
        _text("digest"),
        sa.ForeignKeyConstraint(["tenant"], ["tenant.id"], name="fk_audit_tenant"),
        sa.PrimaryKeyConstraint("tenant", "sequence", name="pk_audit"),
    )


def _audit_checkpoint() -> None:
    op.create_table(
        "audit_checkpoint",
        _text("tenant"),
        _column("sequence", sa.Integer),
        _text("digest"),
        _time("at"),
        _column("key_version", sa.Integer),
        _text("signature"),
        _time("exported_at", nullable=True),
        sa.ForeignKeyConstraint(["tenant"], ["tenant.id"], name="fk_audit_checkpoint_tenant"),
        sa.PrimaryKeyConstraint("tenant", "sequence", name="pk_audit_checkpoint"),
    )


def _model() -> None:
    op.create_table(
        "model",
        _text("tenant"),
        _text("id"),
        _text("base"),
        _text("profile"),
        _text("engine"),
        _text("dtype"),
        _column("vocab_size", sa.Integer),
        _column("context_length", sa.Integer),
        _text("tokenizer_digest", nullable=True),
        _text("chat_template_digest", nullable=True),
        _column("policy", sa.JSON),
        _column("last_version", sa.Integer),
        _time("created_at"),
        sa.CheckConstraint("last_version >= 0", name="last_version"),
        sa.ForeignKeyConstraint(["tenant"], ["tenant.id"], name="fk_model_tenant"),
        sa.PrimaryKeyConstraint("tenant", "id", name="pk_model"),
    )


def _webhook() -> None:
    op.create_table(
        "webhook",
        _text("id"),
        _text("tenant"),
        _text("url"),
        _column("events", sa.JSON),
        _column("ciphertext", sa.LargeBinary),
        _column("kek_version", sa.Integer),
        _column("enabled", sa.Boolean),
        _text("disabled_reason", nullable=True),
        _time("created_at"),
        sa.ForeignKeyConstraint(["tenant"], ["tenant.id"], name="fk_webhook_tenant"),
        sa.PrimaryKeyConstraint("id", name="pk_webhook"),
        sa.UniqueConstraint("tenant", "id", name="uq_webhook_tenant_id"),
    )


def _delivery() -> None:
    op.create_table(
        "delivery",
        _text("id"),
        _text("tenant"),
        _text("webhook"),
        _text("event"),
        _text("payload"),
        _text("status"),
        _column("attempts", sa.Integer),
        _time("created_at"),
        _time("next_attempt_at"),
        _time("leased_until", nullable=True),
        _time("delivered_at", nullable=True),
        _column("last_status", sa.Integer, nullable=True),
        _text("last_error", nullable=True),
        sa.CheckConstraint("status IN ('pending', 'delivered', 'dead')", name="status"),
        sa.ForeignKeyConstraint(
            ["tenant", "webhook"],
            ["webhook.tenant", "webhook.id"],
            name="fk_delivery_webhook",
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("id", name="pk_delivery"),
    )
    op.create_index(
        "ix_delivery_due",
        "delivery",
        ["next_attempt_at"],
        sqlite_where=sa.text("status = 'pending'"),
        postgresql_where=sa.text("status = 'pending'"),
    )
    op.create_index("ix_delivery_webhook", "delivery", ["tenant", "webhook"])


def _key_version() -> None:
    op.create_table(
        "key_version",
        _text("tenant"),
        _text("model"),
        _column("version", sa.Integer),
        _choice("state", STATES),
        _choice("previous_state", STATES, nullable=True),
        _text("key_id", nullable=True),
        _text("kcv", nullable=True),
        _text("vocab_kcv", nullable=True),
        _text("public_key", nullable=True),
        _column("ciphertext", sa.LargeBinary, nullable=True),
        _column("kek_version", sa.Integer, nullable=True),
        _column("row_version", sa.Integer),
        _time("created_at"),
        _time("updated_at"),
        _time("activated_at", nullable=True),
        _time("drain_until", nullable=True),
        _time("destroy_at", nullable=True),
        _time("destroyed_at", nullable=True),
        _time("destroy_complete_after", nullable=True),
        _time("rotate_at", nullable=True),
        _column("token_limit", sa.BigInteger, nullable=True),
        _text("endpoint", nullable=True),
        _column("artifact", sa.JSON, nullable=True),
        _text("failure", nullable=True),
        _column("served_tokens", sa.BigInteger),
        sa.CheckConstraint("state <> 'DESTROYED' OR ciphertext IS NULL", name="erased"),
        sa.CheckConstraint("state <> 'DESTROY_SCHEDULED' OR destroy_at IS NOT NULL", name="destroy_at"),
        sa.CheckConstraint("state <> 'DRAINING' OR drain_until IS NOT NULL", name="drain_until"),
        sa.CheckConstraint(
            "state IN ('PENDING', 'FAILED', 'COMPROMISED', 'DESTROY_SCHEDULED', 'DESTROYED')"
            " OR key_id IS NOT NULL",
            name="prepared",
        ),
        sa.CheckConstraint(
            "state NOT IN ('ACTIVE', 'DRAINING', 'SUSPENDED')"
            " OR (endpoint IS NOT NULL AND artifact IS NOT NULL)",
            name="served",
        ),
        sa.CheckConstraint(
            "state NOT IN ('SUSPENDED', 'DESTROY_SCHEDULED') OR previous_state IS NOT NULL",
            name="origin",
        ),
        sa.CheckConstraint(
            "(key_id IS NULL) = (kcv IS NULL) AND (key_id IS NULL) = (vocab_kcv IS NULL)"
            " AND (key_id IS NULL) = (public_key IS NULL) AND (ciphertext IS NULL OR key_id IS NOT NULL)"
            " AND (ciphertext IS NULL) = (kek_version IS NULL)",
            name="whole",
        ),
        sa.CheckConstraint("served_tokens >= 0", name="served_tokens"),
        sa.CheckConstraint("version >= 1", name="version"),
        sa.ForeignKeyConstraint(
            ["tenant", "model"], ["model.tenant", "model.id"], name="fk_key_version_model"
        ),
        sa.PrimaryKeyConstraint("tenant", "model", "version", name="pk_key_version"),
        sa.UniqueConstraint("key_id", name="uq_key_version_key_id"),
    )
    op.create_index(
        "ix_key_version_rotate_at",
        "key_version",
        ["rotate_at"],
        sqlite_where=sa.text("state = 'ACTIVE'"),
        postgresql_where=sa.text("state = 'ACTIVE'"),
    )
    op.create_index("ix_key_version_state", "key_version", ["state"])
    op.create_index(
        "ix_key_version_token_limit",
        "key_version",
        ["tenant", "model"],
        sqlite_where=sa.text("state = 'ACTIVE' AND served_tokens >= token_limit"),
        postgresql_where=sa.text("state = 'ACTIVE' AND served_tokens >= token_limit"),
    )
    op.create_index(
        "uq_key_version_active",
        "key_version",
        ["tenant", "model"],
        unique=True,
        sqlite_where=sa.text("state = 'ACTIVE'"),
        postgresql_where=sa.text("state = 'ACTIVE'"),
    )
    op.create_index(
        "uq_key_version_in_flight",
        "key_version",
        ["tenant", "model"],
        unique=True,
        sqlite_where=sa.text("state IN ('PENDING', 'MATERIALIZING', 'STAGED')"),
        postgresql_where=sa.text("state IN ('PENDING', 'MATERIALIZING', 'STAGED')"),
    )


def _operation() -> None:
    op.create_table(
        "operation",
        _text("id"),
        _text("kind"),
        _text("tenant"),
        _text("model", nullable=True),
        _column("version", sa.Integer, nullable=True),
        _choice("status", ("running", "succeeded", "failed", "cancelled")),
        _text("phase"),
        _column("progress", sa.Float),
        _text("error", nullable=True),
        _time("created_at"),
        _time("updated_at"),
        _column("attempts", sa.Integer),
        _time("next_attempt_at", nullable=True),
        _text("leased_by", nullable=True),
        _time("leased_until", nullable=True),
        _column("floor", sa.Integer, nullable=True),
        sa.CheckConstraint("kind <> 'rotate' OR (model IS NOT NULL AND version IS NOT NULL)", name="subject"),
        sa.CheckConstraint("kind IN ('rotate', 'shred')", name="kind"),
        sa.CheckConstraint("(leased_by IS NULL) = (leased_until IS NULL)", name="lease"),
        sa.CheckConstraint("progress BETWEEN 0 AND 1", name="progress"),
        sa.ForeignKeyConstraint(
            ["tenant", "model", "version"],
            ["key_version.tenant", "key_version.model", "key_version.version"],
            name="fk_operation_key_version",
        ),
        sa.ForeignKeyConstraint(["tenant"], ["tenant.id"], name="fk_operation_tenant"),
        sa.PrimaryKeyConstraint("id", name="pk_operation"),
    )
    op.create_index(
        "ix_operation_due",
        "operation",
        ["next_attempt_at"],
        sqlite_where=sa.text("status = 'running'"),
        postgresql_where=sa.text("status = 'running'"),
    )
    op.create_index("ix_operation_tenant", "operation", ["tenant", "id"])
    op.create_index(
        "uq_operation_rotation",
        "operation",
        ["tenant", "model", "version"],
        unique=True,
        sqlite_where=sa.text("kind = 'rotate'"),
        postgresql_where=sa.text("kind = 'rotate'"),
    )
    op.create_index(
        "uq_operation_shred",
        "operation",
        ["tenant"],
        unique=True,
        sqlite_where=sa.text("kind = 'shred' AND status = 'running'"),
        postgresql_where=sa.text("kind = 'shred' AND status = 'running'"),
    )


def _release_grant() -> None:
    op.create_table(
        "release_grant",
        _text("id"),
        _text("hash"),
        _text("tenant"),
        _text("model"),
        _column("version", sa.Integer),
        _time("created_at"),
        _time("expires_at"),
        _time("used_at", nullable=True),
        _time("voided_at", nullable=True),
        sa.ForeignKeyConstraint(
            ["tenant", "model", "version"],
            ["key_version.tenant", "key_version.model", "key_version.version"],
            name="fk_release_grant_key_version",
        ),
        sa.PrimaryKeyConstraint("id", name="pk_release_grant"),
        sa.UniqueConstraint("hash", name="uq_release_grant_hash"),
    )
    op.create_index(
        "uq_release_grant_current",
        "release_grant",
        ["tenant", "model", "version"],
        unique=True,
        sqlite_where=sa.text("voided_at IS NULL"),
        postgresql_where=sa.text("voided_at IS NULL"),
    )


def _usage() -> None:
    op.create_table(
        "usage",
        _text("tenant"),
        _text("model"),
        _column("version", sa.Integer),
        _text("source"),
        _column("tokens", sa.BigInteger),
        sa.ForeignKeyConstraint(
            ["tenant", "model", "version"],
            ["key_version.tenant", "key_version.model", "key_version.version"],
            name="fk_usage_key_version",
        ),
        sa.PrimaryKeyConstraint("tenant", "model", "version", "source", name="pk_usage"),
    )


_TABLES = (
    _answer,
    _backup,
    _signing_key,
    _tenant,
    _api_key,
    _audit,
    _audit_checkpoint,
    _model,
    _webhook,
    _delivery,
    _key_version,
    _operation,
    _release_grant,
    _usage,
)


def upgrade() -> None:
    """Create everything."""
    for create in _TABLES:
        create()


def downgrade() -> None:
    """Drop everything, what refers to others first."""
    for create in reversed(_TABLES):
        op.drop_table(create.__name__.removeprefix("_"))
