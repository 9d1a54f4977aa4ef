"""The tables. What a caller sends or reads is in ``anamorph.wire.admin``.

Table models do not validate: rows are built from messages that were validated at
the edge. Constraints that keep the invariants are declared here where SQLAlchemy
can express them; those it cannot (triggers) are in the migrations.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, ClassVar

from sqlalchemy import (
    JSON,
    BigInteger,
    CheckConstraint,
    ForeignKeyConstraint,
    Index,
    LargeBinary,
    UniqueConstraint,
    text,
)
from sqlmodel import Field

from anamorph.wire.admin import OperationStatus, Role
from anamorph.wire.states import State
from anamorph_keysvc.columns import Base, UtcDateTime, enum_column

# A rotation is in flight while its version is in one of these.
IN_FLIGHT = (State.PENDING, State.MATERIALIZING, State.STAGED)


class Tenant(Base, table=True):
    __tablename__: ClassVar[Any] = "tenant"

    id: str = Field(primary_key=True)
    display_name: str
    created_at: datetime = Field(sa_type=UtcDateTime)


class Model(Base, table=True):
    """A model; ``last_version`` is the highest version number ever given out."""

    __tablename__: ClassVar[Any] = "model"
    __table_args__ = (
        ForeignKeyConstraint(["tenant"], ["tenant.id"]),
        CheckConstraint("last_version >= 0", name="last_version"),
    )

    tenant: str = Field(primary_key=True)
    id: str = Field(primary_key=True)
    base: str
    profile: str
    engine: str
    dtype: str
    vocab_size: int
    context_length: int
    tokenizer_digest: str | None = None
    chat_template_digest: str | None = None
    policy: dict[str, Any] = Field(sa_type=JSON)
    last_version: int = 0
    created_at: datetime = Field(sa_type=UtcDateTime)


class KeyVersion(Base, table=True):
    """One key version. ``ciphertext`` is the wrapped root, erased when DESTROYED.

    ``previous_state`` is where SUSPENDED returns to, and for DESTROY_SCHEDULED
    where it came from, which decides whether it may be restored.
    """

    __tablename__: ClassVar[Any] = "key_version"
    __table_args__ = (
        ForeignKeyConstraint(["tenant", "model"], ["model.tenant", "model.id"]),
        UniqueConstraint("key_id"),
        CheckConstraint("version >= 1", name="version"),
        CheckConstraint("served_tokens >= 0", name="served_tokens"),
        CheckConstraint("state <> 'DESTROYED' OR ciphertext IS NULL", name="erased"),
        CheckConstraint("state <> 'DRAINING' OR drain_until IS NOT NULL", name="drain_until"),
        CheckConstraint("state <> 'DESTROY_SCHEDULED' OR destroy_at IS NOT NULL", name="destroy_at"),
        CheckConstraint(
            "state NOT IN ('SUSPENDED', 'DESTROY_SCHEDULED') OR previous_state IS NOT NULL", name="origin"
        ),
        CheckConstraint(
            "state NOT IN ('ACTIVE', 'DRAINING', 'SUSPENDED')"
            " OR (endpoint IS NOT NULL AND artifact IS NOT NULL)",
            name="served",
        ),
        Index(
            "uq_key_version_active",
            "tenant",
            "model",
            unique=True,
            sqlite_where=text("state = 'ACTIVE'"),
            postgresql_where=text("state = 'ACTIVE'"),
        ),
        Index(
            "uq_key_version_in_flight",
            "tenant",
            "model",
            unique=True,
            sqlite_where=text("state IN ('PENDING', 'MATERIALIZING', 'STAGED')"),
            postgresql_where=text("state IN ('PENDING', 'MATERIALIZING', 'STAGED')"),
        ),
    )

    tenant: str = Field(primary_key=True)
    model: str = Field(primary_key=True)
    version: int = Field(primary_key=True)
    state: State = Field(sa_type=enum_column(State, "state"))
    previous_state: State | None = Field(default=None, sa_type=enum_column(State, "previous_state"))
    key_id: str
    kcv: str
    vocab_kcv: str
    public_key: str
    ciphertext: bytes | None = Field(sa_type=LargeBinary, repr=False)
    row_version: int = 1
    created_at: datetime = Field(sa_type=UtcDateTime)
    updated_at: datetime = Field(sa_type=UtcDateTime)
    activated_at: datetime | None = Field(default=None, sa_type=UtcDateTime)
    drain_until: datetime | None = Field(default=None, sa_type=UtcDateTime)
    destroy_at: datetime | None = Field(default=None, sa_type=UtcDateTime)
    endpoint: str | None = None
    artifact: dict[str, Any] | None = Field(default=None, sa_type=JSON(none_as_null=True))
    failure: str | None = None
    served_tokens: int = Field(default=0, sa_type=BigInteger)


def _of_version(*more: Any) -> tuple[Any, ...]:
    columns = ["tenant", "model", "version"]
    return (ForeignKeyConstraint(columns, [f"key_version.{column}" for column in columns]), *more)


class Operation(Base, table=True):
    """A rotation as its caller follows it: one per version."""

    __tablename__: ClassVar[Any] = "operation"
    __table_args__ = _of_version(
        UniqueConstraint("tenant", "model", "version"),
        CheckConstraint("progress BETWEEN 0 AND 1", name="progress"),
    )

    id: str = Field(primary_key=True)
    tenant: str
    model: str
    version: int
    status: OperationStatus = Field(sa_type=enum_column(OperationStatus, "status"))
    phase: str
    progress: float = 0.0
    error: str | None = None
    created_at: datetime = Field(sa_type=UtcDateTime)
    updated_at: datetime = Field(sa_type=UtcDateTime)


class Grant(Base, table=True):
    """Permission to read one root once; at most one per version is not void."""

    __tablename__: ClassVar[Any] = "release_grant"
    __table_args__ = _of_version(
        UniqueConstraint("hash"),
        Index(
            "uq_release_grant_current",
            "tenant",
            "model",
            "version",
            unique=True,
            sqlite_where=text("voided_at IS NULL"),
            postgresql_where=text("voided_at IS NULL"),
        ),
    )

    id: str = Field(primary_key=True)
    hash: str
    tenant: str
    model: str
    version: int
    created_at: datetime = Field(sa_type=UtcDateTime)
    expires_at: datetime = Field(sa_type=UtcDateTime)
    used_at: datetime | None = Field(default=None, sa_type=UtcDateTime)
    voided_at: datetime | None = Field(default=None, sa_type=UtcDateTime)


class Usage(Base, table=True):
    """Highest count of served tokens that each engine process has reported."""

    __tablename__: ClassVar[Any] = "usage"
    __table_args__ = _of_version()

    tenant: str = Field(primary_key=True)
    model: str = Field(primary_key=True)
    version: int = Field(primary_key=True)
    source: str = Field(primary_key=True)
    tokens: int = Field(sa_type=BigInteger)


class ApiKey(Base, table=True):
    """An API key as SHA-256; ``tenant`` is absent for platform keys only."""

    __tablename__: ClassVar[Any] = "api_key"
    __table_args__ = (
        ForeignKeyConstraint(["tenant"], ["tenant.id"]),
        UniqueConstraint("hash"),
        CheckConstraint("(role = 'platform') = (tenant IS NULL)", name="platform"),
    )

    id: str = Field(primary_key=True)
    tenant: str | None = None
    name: str
    role: Role = Field(sa_type=enum_column(Role, "role"))
    hash: str
    created_at: datetime = Field(sa_type=UtcDateTime)
    revoked_at: datetime | None = Field(default=None, sa_type=UtcDateTime)


class SigningKey(Base, table=True):
    """An Ed25519 key that signs inference tokens: public in clear, seed wrapped."""

    __tablename__: ClassVar[Any] = "signing_key"

    kid: str = Field(primary_key=True)
    public_key: str
    ciphertext: bytes = Field(sa_type=LargeBinary, repr=False)
    created_at: datetime = Field(sa_type=UtcDateTime)
    retired_at: datetime | None = Field(default=None, sa_type=UtcDateTime)


class Audit(Base, table=True):
    """One row of a tenant's hash chain (``anamorph.wire.audit``); never changed."""

    __tablename__: ClassVar[Any] = "audit"

    tenant: str = Field(primary_key=True)
    sequence: int = Field(primary_key=True)
    at: datetime = Field(sa_type=UtcDateTime)
    actor: str
    action: str
    subject: str
    detail: dict[str, Any] = Field(sa_type=JSON)
    previous: str
    digest: str


class Answer(Base, table=True):
    """What a request under an Idempotency-Key was answered; never holds a secret."""

    __tablename__: ClassVar[Any] = "answer"
    __table_args__ = (Index(None, "created_at"),)

    actor: str = Field(primary_key=True)
    key: str = Field(primary_key=True)
    request_digest: str
    body: str
    created_at: datetime = Field(sa_type=UtcDateTime)
