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
    Column,
    ForeignKeyConstraint,
    Index,
    Integer,
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

# Conditions of partial indexes, as both databases read them.
_ACTIVE = text("state = 'ACTIVE'")
_IN_FLIGHT = text("state IN ('PENDING', 'MATERIALIZING', 'STAGED')")
_ONGOING = text("state IN ('PENDING', 'MATERIALIZING', 'STAGED', 'ACTIVE', 'DRAINING', 'SUSPENDED')")
_SCHEDULED = text("state = 'DESTROY_SCHEDULED'")
_SPENT = text("state = 'ACTIVE' AND served_tokens >= token_limit")
_RUNNING = text("status = 'running'")
_SHREDDING = text("kind = 'shred' AND status = 'running'")
_ROTATION = text("kind = 'rotate'")
_CURRENT = text("voided_at IS NULL")
_UNSENT = text("status = 'pending'")


_model_row_version = Column("row_version", Integer, nullable=False, server_default="1")


class Tenant(Base, table=True):
    """``kek`` is the opaque name of the tenant's key-encryption key."""

    __tablename__: ClassVar[Any] = "tenant"
    __table_args__ = (UniqueConstraint("kek"),)

    id: str = Field(primary_key=True)
    display_name: str
    kek: str
    quota: dict[str, Any] = Field(default_factory=dict, sa_type=JSON)
    created_at: datetime = Field(sa_type=UtcDateTime)


class Model(Base, table=True):
    """A model; ``last_version`` is the highest version number ever given out.

    SQLAlchemy raises ``row_version`` with every change, and compares it.
    """

    __tablename__: ClassVar[Any] = "model"
    __table_args__ = (
        ForeignKeyConstraint(["tenant"], ["tenant.id"]),
        CheckConstraint("last_version >= 0", name="last_version"),
    )
    __mapper_args__: ClassVar[Any] = {"version_id_col": _model_row_version}

    tenant: str = Field(primary_key=True)
    id: str = Field(primary_key=True)
    base: str
    base_digest: str | None = None
    profile: str
    engine: str
    dtype: str
    vocab_size: int
    context_length: int
    tokenizer_digest: str | None = None
    chat_template_digest: str | None = None
    policy: dict[str, Any] = Field(sa_type=JSON)
    serving: dict[str, Any] = Field(
        default_factory=dict, sa_type=JSON, sa_column_kwargs={"server_default": "{}"}
    )
    last_version: int = 0
    row_version: int = Field(default=1, sa_column=_model_row_version)
    created_at: datetime = Field(sa_type=UtcDateTime)


class KeyVersion(Base, table=True):
    """One key version. ``ciphertext`` is the wrapped root, erased when DESTROYED.

    Until it is prepared, ``key_id`` and what goes with it are absent. ``rotate_at`` and
    ``token_limit`` are when an ACTIVE version is replaced, drawn from the policy when it
    became ACTIVE or the policy changed. ``kek_version`` is the version of the tenant's
    KEK that ``ciphertext`` opens with.

    ``previous_state`` is where SUSPENDED returns to, and for DESTROY_SCHEDULED
    where it came from, which decides whether it may be restored.

    ``settings`` are the model's when the version was issued; absent in versions that a
    release issued which did not know of them, and whose models could not change.
    """

    __tablename__: ClassVar[Any] = "key_version"
    __table_args__ = (
        ForeignKeyConstraint(["tenant", "model"], ["model.tenant", "model.id"]),
        UniqueConstraint("key_id"),
        CheckConstraint("version >= 1", name="version"),
        CheckConstraint("served_tokens >= 0", name="served_tokens"),
        CheckConstraint("state <> 'DESTROYED' OR ciphertext IS NULL", name="erased"),
        CheckConstraint(
            "state IN ('PENDING', 'FAILED', 'COMPROMISED', 'DESTROY_SCHEDULED', 'DESTROYED')"
            " OR key_id IS NOT NULL",
            name="prepared",
        ),
        CheckConstraint(
            "(key_id IS NULL) = (kcv IS NULL) AND (key_id IS NULL) = (vocab_kcv IS NULL)"
            " AND (key_id IS NULL) = (public_key IS NULL) AND (ciphertext IS NULL OR key_id IS NOT NULL)"
            " AND (ciphertext IS NULL) = (kek_version IS NULL)",
            name="whole",
        ),
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
            sqlite_where=_ACTIVE,
            postgresql_where=_ACTIVE,
        ),
        Index("ix_key_version_state", "state"),
        # What the operator lists in every turn: it must not read the versions of the past.
        Index(
            "ix_key_version_ongoing",
            "tenant",
            "model",
            "version",
            sqlite_where=_ONGOING,
            postgresql_where=_ONGOING,
        ),
        Index(
            "ix_key_version_destroy_at", "destroy_at", sqlite_where=_SCHEDULED, postgresql_where=_SCHEDULED
        ),
        Index("ix_key_version_rotate_at", "rotate_at", sqlite_where=_ACTIVE, postgresql_where=_ACTIVE),
        Index("ix_key_version_token_limit", "tenant", "model", sqlite_where=_SPENT, postgresql_where=_SPENT),
        Index(
            "uq_key_version_in_flight",
            "tenant",
            "model",
            unique=True,
            sqlite_where=_IN_FLIGHT,
            postgresql_where=_IN_FLIGHT,
        ),
    )

    tenant: str = Field(primary_key=True)
    model: str = Field(primary_key=True)
    version: int = Field(primary_key=True)
    state: State = Field(sa_type=enum_column(State, "state"))
    previous_state: State | None = Field(default=None, sa_type=enum_column(State, "previous_state"))
    key_id: str | None = None
    kcv: str | None = None
    vocab_kcv: str | None = None
    public_key: str | None = None
    ciphertext: bytes | None = Field(default=None, sa_type=LargeBinary, repr=False)
    kek_version: int | None = None
    row_version: int = 1
    created_at: datetime = Field(sa_type=UtcDateTime)
    updated_at: datetime = Field(sa_type=UtcDateTime)
    activated_at: datetime | None = Field(default=None, sa_type=UtcDateTime)
    drain_until: datetime | None = Field(default=None, sa_type=UtcDateTime)
    destroy_at: datetime | None = Field(default=None, sa_type=UtcDateTime)
    destroyed_at: datetime | None = Field(default=None, sa_type=UtcDateTime)
    destroy_complete_after: datetime | None = Field(default=None, sa_type=UtcDateTime)
    rotate_at: datetime | None = Field(default=None, sa_type=UtcDateTime)
    token_limit: int | None = Field(default=None, sa_type=BigInteger)
    endpoint: str | None = None
    artifact: dict[str, Any] | None = Field(default=None, sa_type=JSON(none_as_null=True))
    failure: str | None = None
    served_tokens: int = Field(default=0, sa_type=BigInteger)
    settings: dict[str, Any] | None = Field(default=None, sa_type=JSON(none_as_null=True))


def _of_version(*more: Any) -> tuple[Any, ...]:
    columns = ["tenant", "model", "version"]
    return (ForeignKeyConstraint(columns, [f"key_version.{column}" for column in columns]), *more)


class Operation(Base, table=True):
    """Long work as its caller follows it, and the lease of whoever is at it.

    A ``rotate`` belongs to a version; a ``shred`` to a tenant's KEK, of whose versions
    it erases those below ``floor``. ``next_attempt_at`` is absent while the next step is
    somebody else's, such as the operator's.
    """

    __tablename__: ClassVar[Any] = "operation"
    __table_args__ = _of_version(
        ForeignKeyConstraint(["tenant"], ["tenant.id"]),
        CheckConstraint("kind IN ('rotate', 'shred')", name="kind"),
        CheckConstraint("kind <> 'rotate' OR (model IS NOT NULL AND version IS NOT NULL)", name="subject"),
        CheckConstraint("progress BETWEEN 0 AND 1", name="progress"),
        CheckConstraint("(leased_by IS NULL) = (leased_until IS NULL)", name="lease"),
        Index(
            "uq_operation_rotation",
            "tenant",
            "model",
            "version",
            unique=True,
            sqlite_where=_ROTATION,
            postgresql_where=_ROTATION,
        ),
        Index(
            "uq_operation_shred", "tenant", unique=True, sqlite_where=_SHREDDING, postgresql_where=_SHREDDING
        ),
        Index("ix_operation_tenant", "tenant", "id"),
        Index("ix_operation_due", "next_attempt_at", sqlite_where=_RUNNING, postgresql_where=_RUNNING),
    )

    id: str = Field(primary_key=True)
    kind: str
    tenant: str
    model: str | None = None
    version: int | None = None
    status: OperationStatus = Field(sa_type=enum_column(OperationStatus, "status"))
    phase: str
    progress: float = 0.0
    error: str | None = None
    created_at: datetime = Field(sa_type=UtcDateTime)
    updated_at: datetime = Field(sa_type=UtcDateTime)
    attempts: int = 0
    next_attempt_at: datetime | None = Field(default=None, sa_type=UtcDateTime)
    leased_by: str | None = None
    leased_until: datetime | None = Field(default=None, sa_type=UtcDateTime)
    floor: int | None = None


class Grant(Base, table=True):
    """Permission to read one root once; at most one for each part of a version is not void.

    ``part`` is 0 to ``parts`` - 1 for a job that folds that part, and ``parts`` for the one
    that finishes. A materialisation in a single piece has 0 parts, so its one job finishes.
    ``done``, 0 to 1, is how far a part says it is.
    """

    __tablename__: ClassVar[Any] = "release_grant"
    __table_args__ = _of_version(
        UniqueConstraint("hash"),
        CheckConstraint("part >= 0 AND part <= parts", name="part"),
        CheckConstraint("done BETWEEN 0 AND 1", name="done"),
        Index(
            "uq_release_grant_current",
            "tenant",
            "model",
            "version",
            "part",
            unique=True,
            sqlite_where=_CURRENT,
            postgresql_where=_CURRENT,
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
    parts: int = Field(default=0, sa_column_kwargs={"server_default": "0"})
    part: int = Field(default=0, sa_column_kwargs={"server_default": "0"})
    done: float = Field(default=0.0, sa_column_kwargs={"server_default": "0"})


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
        Index("ix_api_key_tenant", "tenant", "id"),
    )

    id: str = Field(primary_key=True)
    tenant: str | None = None
    name: str
    role: Role = Field(sa_type=enum_column(Role, "role"))
    hash: str
    created_at: datetime = Field(sa_type=UtcDateTime)
    revoked_at: datetime | None = Field(default=None, sa_type=UtcDateTime)


class SigningKey(Base, table=True):
    """An Ed25519 key that signs inference tokens: public in clear, seed wrapped.

    It signs from ``signs_from`` until the next key does, is published from the start
    until ``retired_at``, and its seed is erased then.
    """

    __tablename__: ClassVar[Any] = "signing_key"
    __table_args__ = (CheckConstraint("retired_at IS NULL OR ciphertext IS NULL", name="erased"),)

    kid: str = Field(primary_key=True)
    public_key: str
    ciphertext: bytes | None = Field(default=None, sa_type=LargeBinary, repr=False)
    created_at: datetime = Field(sa_type=UtcDateTime)
    signs_from: datetime = Field(sa_type=UtcDateTime)
    retired_at: datetime | None = Field(default=None, sa_type=UtcDateTime)


class Backup(Base, table=True):
    """A backup that was reported: ciphertexts in older ones may be made useless from then on."""

    __tablename__: ClassVar[Any] = "backup"

    id: str = Field(primary_key=True)
    taken_at: datetime = Field(sa_type=UtcDateTime)
    recorded_at: datetime = Field(sa_type=UtcDateTime)


class Audit(Base, table=True):
    """One row of a tenant's hash chain (``anamorph.wire.audit``); never changed."""

    __tablename__: ClassVar[Any] = "audit"
    __table_args__ = (ForeignKeyConstraint(["tenant"], ["tenant.id"]),)

    tenant: str = Field(primary_key=True)
    sequence: int = Field(primary_key=True)
    at: datetime = Field(sa_type=UtcDateTime)
    actor: str
    action: str
    subject: str
    detail: dict[str, Any] = Field(sa_type=JSON)
    previous: str
    digest: str


class AuditCheckpoint(Base, table=True):
    """A signed head of a tenant's chain; ``exported_at`` is absent until it lies outside."""

    __tablename__: ClassVar[Any] = "audit_checkpoint"
    __table_args__ = (ForeignKeyConstraint(["tenant"], ["tenant.id"]),)

    tenant: str = Field(primary_key=True)
    sequence: int = Field(primary_key=True)
    digest: str
    at: datetime = Field(sa_type=UtcDateTime)
    key_version: int
    signature: str
    exported_at: datetime | None = Field(default=None, sa_type=UtcDateTime)


class Webhook(Base, table=True):
    """Where a tenant wants to hear of rotations; ``ciphertext`` is its signing secret, wrapped."""

    __tablename__: ClassVar[Any] = "webhook"
    __table_args__ = (ForeignKeyConstraint(["tenant"], ["tenant.id"]), UniqueConstraint("tenant", "id"))

    id: str = Field(primary_key=True)
    tenant: str
    url: str
    events: list[str] = Field(sa_type=JSON)
    ciphertext: bytes = Field(sa_type=LargeBinary, repr=False)
    kek_version: int
    enabled: bool = True
    disabled_reason: str | None = None
    created_at: datetime = Field(sa_type=UtcDateTime)


class Delivery(Base, table=True):
    """One event on its way to one webhook, written in the transaction of what it tells."""

    __tablename__: ClassVar[Any] = "delivery"
    __table_args__ = (
        ForeignKeyConstraint(["tenant", "webhook"], ["webhook.tenant", "webhook.id"], ondelete="CASCADE"),
        CheckConstraint("status IN ('pending', 'delivered', 'dead')", name="status"),
        Index("ix_delivery_due", "next_attempt_at", sqlite_where=_UNSENT, postgresql_where=_UNSENT),
        Index("ix_delivery_webhook", "tenant", "webhook"),
    )

    id: str = Field(primary_key=True)
    tenant: str
    webhook: str
    event: str
    payload: str
    status: str = "pending"
    attempts: int = 0
    created_at: datetime = Field(sa_type=UtcDateTime)
    next_attempt_at: datetime = Field(sa_type=UtcDateTime)
    leased_until: datetime | None = Field(default=None, sa_type=UtcDateTime)
    delivered_at: datetime | None = Field(default=None, sa_type=UtcDateTime)
    last_status: int | None = None
    last_error: str | None = None


class Answer(Base, table=True):
    """What a request under an Idempotency-Key was answered; never holds a secret."""

    __tablename__: ClassVar[Any] = "answer"
    __table_args__ = (Index(None, "created_at"),)

    actor: str = Field(primary_key=True)
    key: str = Field(primary_key=True)
    tenant: str | None = None
    request_digest: str
    body: str
    created_at: datetime = Field(sa_type=UtcDateTime)


# Tables with a ``tenant`` column, whose rows are that tenant's (or, without one, the platform's).
OWNED = (
    Model,
    KeyVersion,
    Operation,
    Grant,
    Usage,
    ApiKey,
    Audit,
    AuditCheckpoint,
    Webhook,
    Delivery,
    Answer,
)

# By their names in the database, for statements that name tables rather than classes.
TABLES = Base.metadata.tables
