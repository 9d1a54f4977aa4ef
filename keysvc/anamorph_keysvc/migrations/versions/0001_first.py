"""Tenants, models, key versions, operations, grants, credentials, audit."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0001"
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


def _number(name: str, kind: type[sa.Integer] = sa.Integer) -> sa.Column[int]:
    return sa.Column(name, kind(), nullable=False)


def _time(name: str, *, nullable: bool = False) -> sa.Column[Any]:
    return sa.Column(name, sa.DateTime(timezone=True), nullable=nullable)


def _choice(name: str, values: tuple[str, ...], *, nullable: bool = False) -> sa.Column[str]:
    kind = sa.Enum(*values, name=name, native_enum=False, create_constraint=True, length=20)
    return sa.Column(name, kind, nullable=nullable)


def _tenants() -> None:
    op.create_table(
        "tenant",
        _text("id"),
        _text("display_name"),
        _time("created_at"),
        sa.PrimaryKeyConstraint("id", name="pk_tenant"),
    )
    op.create_table(
        "api_key",
        _text("id"),
        _text("tenant", nullable=True),
        _text("name"),
        _choice("role", ("admin", "rotator", "client", "materializer", "auditor", "platform")),
        _text("hash"),
        _time("created_at"),
        _time("revoked_at", nullable=True),
        sa.CheckConstraint("(role = 'platform') = (tenant IS NULL)", name=op.f("ck_api_key_platform")),
        sa.ForeignKeyConstraint(["tenant"], ["tenant.id"], name="fk_api_key_tenant"),
        sa.PrimaryKeyConstraint("id", name="pk_api_key"),
        sa.UniqueConstraint("hash", name="uq_api_key_hash"),
    )


def _models() -> None:
    op.create_table(
        "model",
        *(_text(name) for name in ("tenant", "id", "base", "profile", "engine", "dtype")),
        _number("vocab_size"),
        _number("context_length"),
        _text("tokenizer_digest", nullable=True),
        _text("chat_template_digest", nullable=True),
        sa.Column("policy", sa.JSON(), nullable=False),
        _number("last_version"),
        _time("created_at"),
        sa.CheckConstraint("last_version >= 0", name=op.f("ck_model_last_version")),
        sa.ForeignKeyConstraint(["tenant"], ["tenant.id"], name="fk_model_tenant"),
        sa.PrimaryKeyConstraint("tenant", "id", name="pk_model"),
    )


def _version_columns() -> list[sa.Column[Any]]:
    return [
        _text("tenant"),
        _text("model"),
        _number("version"),
        _choice("state", STATES),
        _choice("previous_state", STATES, nullable=True),
        *(_text(name) for name in ("key_id", "kcv", "vocab_kcv", "public_key")),
        sa.Column("ciphertext", sa.LargeBinary(), nullable=True),
        _number("row_version"),
        _time("created_at"),
        _time("updated_at"),
        *(_time(name, nullable=True) for name in ("activated_at", "drain_until", "destroy_at")),
        _text("endpoint", nullable=True),
        sa.Column("artifact", sa.JSON(none_as_null=True), nullable=True),
        _text("failure", nullable=True),
        _number("served_tokens", sa.BigInteger),
    ]


def _version_checks() -> list[sa.CheckConstraint]:
    checks = {
        "version": "version >= 1",
        "served_tokens": "served_tokens >= 0",
        "erased": "state <> 'DESTROYED' OR ciphertext IS NULL",
        "drain_until": "state <> 'DRAINING' OR drain_until IS NOT NULL",
        "destroy_at": "state <> 'DESTROY_SCHEDULED' OR destroy_at IS NOT NULL",
        "origin": "state NOT IN ('SUSPENDED', 'DESTROY_SCHEDULED') OR previous_state IS NOT NULL",
        "served": "state NOT IN ('ACTIVE', 'DRAINING', 'SUSPENDED')"
        " OR (endpoint IS NOT NULL AND artifact IS NOT NULL)",
    }
    return [sa.CheckConstraint(rule, name=op.f(f"ck_key_version_{name}")) for name, rule in checks.items()]


def _versions() -> None:
    op.create_table(
        "key_version",
        *_version_columns(),
        *_version_checks(),
        sa.ForeignKeyConstraint(
            ["tenant", "model"], ["model.tenant", "model.id"], name="fk_key_version_model"
        ),
        sa.PrimaryKeyConstraint("tenant", "model", "version", name="pk_key_version"),
        sa.UniqueConstraint("key_id", name="uq_key_version_key_id"),
    )
    _unique_where("key_version", "active", ["tenant", "model"], "state = 'ACTIVE'")
    _unique_where(
        "key_version", "in_flight", ["tenant", "model"], "state IN ('PENDING', 'MATERIALIZING', 'STAGED')"
    )


def _unique_where(table: str, name: str, columns: list[str], condition: str) -> None:
    where = sa.text(condition)
    op.create_index(
        f"uq_{table}_{name}", table, columns, unique=True, sqlite_where=where, postgresql_where=where
    )


def _of_version(table: str) -> sa.ForeignKeyConstraint:
    columns = ["tenant", "model", "version"]
    return sa.ForeignKeyConstraint(
        columns, [f"key_version.{column}" for column in columns], name=f"fk_{table}_key_version"
    )


def _operations() -> None:
    op.create_table(
        "operation",
        *(_text(name) for name in ("id", "tenant", "model")),
        _number("version"),
        _choice("status", ("running", "succeeded", "failed", "cancelled")),
        _text("phase"),
        sa.Column("progress", sa.Float(), nullable=False),
        _text("error", nullable=True),
        _time("created_at"),
        _time("updated_at"),
        sa.CheckConstraint("progress BETWEEN 0 AND 1", name=op.f("ck_operation_progress")),
        _of_version("operation"),
        sa.PrimaryKeyConstraint("id", name="pk_operation"),
        sa.UniqueConstraint("tenant", "model", "version", name="uq_operation_tenant_model_version"),
    )


def _grants() -> None:
    op.create_table(
        "release_grant",
        *(_text(name) for name in ("id", "hash", "tenant", "model")),
        _number("version"),
        _time("created_at"),
        _time("expires_at"),
        _time("used_at", nullable=True),
        _time("voided_at", nullable=True),
        _of_version("release_grant"),
        sa.PrimaryKeyConstraint("id", name="pk_release_grant"),
        sa.UniqueConstraint("hash", name="uq_release_grant_hash"),
    )
    _unique_where("release_grant", "current", ["tenant", "model", "version"], "voided_at IS NULL")


def _usage() -> None:
    op.create_table(
        "usage",
        _text("tenant"),
        _text("model"),
        _number("version"),
        _text("source"),
        _number("tokens", sa.BigInteger),
        _of_version("usage"),
        sa.PrimaryKeyConstraint("tenant", "model", "version", "source", name="pk_usage"),
    )


def _records() -> None:
    op.create_table(
        "signing_key",
        _text("kid"),
        _text("public_key"),
        sa.Column("ciphertext", sa.LargeBinary(), nullable=False),
        _time("created_at"),
        _time("retired_at", nullable=True),
        sa.PrimaryKeyConstraint("kid", name="pk_signing_key"),
    )
    op.create_table(
        "audit",
        _text("tenant"),
        _number("sequence"),
        _time("at"),
        *(_text(name) for name in ("actor", "action", "subject")),
        sa.Column("detail", sa.JSON(), nullable=False),
        _text("previous"),
        _text("digest"),
        sa.PrimaryKeyConstraint("tenant", "sequence", name="pk_audit"),
    )
    op.create_table(
        "answer",
        *(_text(name) for name in ("actor", "key", "request_digest", "body")),
        _time("created_at"),
        sa.PrimaryKeyConstraint("actor", "key", name="pk_answer"),
    )
    op.create_index("ix_answer_created_at", "answer", ["created_at"])


def upgrade() -> None:
    """Create everything."""
    for create in (_tenants, _models, _versions, _operations, _grants, _usage, _records):
        create()


def downgrade() -> None:
    """The first revision has nothing before it; delete the database instead."""
    raise NotImplementedError("there is nothing before the first revision")
