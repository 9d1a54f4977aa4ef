"""Messages of the key service's admin API (keyservice.md), shared by server and callers.

``…Create`` is what a caller sends, ``…Read`` what the service answers. All times
are UTC, all durations seconds. Unknown fields are refused.
"""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Generic, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from anamorph.wire.ids import Label
from anamorph.wire.states import State

Digest = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]
Profile = Literal["permute", "rotate"]
Engine = Literal["torch", "fake"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Base64 = Annotated[str, Field(pattern=r"^[A-Za-z0-9+/]+={0,2}$", max_length=1024)]

# Numbers stay within what JSON readers, the audit log's canonical form and SQL integers all hold.
Count = Annotated[int, Field(ge=0, le=2**53 - 1)]
LONGEST_S = 10 * 366 * 86400

T = TypeVar("T")


class Message(BaseModel):
    """Base of everything on this wire: immutable, unknown fields refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Role(StrEnum):
    """What an API key may do inside its tenant; ``platform`` stands above tenants."""

    ADMIN = "admin"
    ROTATOR = "rotator"
    CLIENT = "client"
    MATERIALIZER = "materializer"
    AUDITOR = "auditor"
    PLATFORM = "platform"


class TenantCreate(Message):
    id: Label
    display_name: str = Field(default="", max_length=200)


class TenantRead(TenantCreate):
    created_at: datetime


class RotationPolicy(Message):
    """When a version is replaced and how long the old one lingers.

    ``grace_s`` must be at least ``client_cache_ttl_s + longest_request_s +
    clock_skew_s + propagation_s``: a client may use a cached key that long.
    """

    period_s: int | None = Field(default=None, ge=60, le=LONGEST_S)
    token_budget: Count | None = Field(default=None, ge=1)
    grace_s: int = Field(default=900, ge=1, le=LONGEST_S)
    client_cache_ttl_s: int = Field(default=300, ge=1, le=600)
    longest_request_s: int = Field(default=300, ge=1, le=LONGEST_S)
    clock_skew_s: int = Field(default=30, ge=0, le=LONGEST_S)
    propagation_s: int = Field(default=30, ge=0, le=LONGEST_S)
    destroy_delay_s: int = Field(default=30 * 86400, ge=0, le=LONGEST_S)

    @model_validator(mode="after")
    def _grace_covers_every_client(self) -> Self:
        least = self.client_cache_ttl_s + self.longest_request_s + self.clock_skew_s + self.propagation_s
        if self.grace_s < least:
            raise ValueError(
                f"grace_s must be at least {least}: client_cache_ttl_s + longest_request_s"
                " + clock_skew_s + propagation_s"
            )
        return self


class RotationPolicyPatch(Message):
    """Fields of a ``RotationPolicy`` to change; ``null`` switches a period or token budget off."""

    period_s: int | None = None
    token_budget: int | None = None
    grace_s: int | None = None
    client_cache_ttl_s: int | None = None
    longest_request_s: int | None = None
    clock_skew_s: int | None = None
    propagation_s: int | None = None
    destroy_delay_s: int | None = None


class ModelCreate(Message):
    """A model to be served in the tenant's coordinates.

    Args:
        base: folder of the plaintext checkpoint, or ``hf://org/name[@revision]``; the operator's
            allow-list must cover it.
        vocab_size: rows of the embedding, which is what the vocabulary permutation acts on.
        tokenizer_digest, chat_template_digest: a client refuses any other tokenizer or template.
        context_length: most tokens of prompt and answer together.
    """

    id: Label
    base: str = Field(min_length=1, max_length=2000)
    profile: Profile = "rotate"
    engine: Engine = "torch"
    dtype: Dtype = "auto"
    vocab_size: int = Field(ge=2, le=2**31 - 1)
    context_length: int = Field(ge=1, le=2**31 - 1)
    tokenizer_digest: Digest | None = None
    chat_template_digest: Digest | None = None
    policy: RotationPolicy = RotationPolicy()


class ModelRead(ModelCreate):
    tenant: Label
    created_at: datetime


class Probe(Message):
    """Random encrypted ids and the greedy continuation the replica must give.

    Computed at materialisation from independent uniform ids, so it carries nothing
    of the tenant; "verified" means that the served replica answers with the same.
    """

    prompts: tuple[tuple[int, ...], ...]
    expected: tuple[tuple[int, ...], ...]


class Materialized(Message):
    """What a materialisation job reports with its grant when the replica is published."""

    replica: str = Field(min_length=1, max_length=2000)
    manifest_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    probe: Probe


class KeyVersionRead(Message):
    """One key version: metadata only, never key bytes."""

    tenant: Label
    model: Label
    version: int = Field(ge=1)
    state: State
    key_id: str
    kcv: str
    vocab_kcv: str
    public_key: Base64
    """Raw Ed25519 public key (32 bytes, base64): the trust anchor of the replica's manifest."""
    row_version: int
    created_at: datetime
    updated_at: datetime
    activated_at: datetime | None = None
    drain_until: datetime | None = None
    destroy_at: datetime | None = None
    endpoint: str | None = None
    artifact: Materialized | None = None
    failure: str | None = None
    served_tokens: int = 0


class Page(BaseModel, Generic[T]):
    """One page of a list; ``next_page`` is opaque and absent on the last page."""

    items: list[T]
    next_page: str | None = None


class OperationStatus(StrEnum):
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


class OperationRead(Message):
    """A rotation in progress: one operation per version it creates."""

    id: str
    kind: Literal["rotate"]
    tenant: Label
    model: Label
    version: int
    status: OperationStatus
    phase: str
    progress: float = Field(ge=0, le=1)
    error: str | None = None
    created_at: datetime
    updated_at: datetime


class Progress(Message):
    """Progress of a materialisation, reported under its grant; ``done`` in 0..1."""

    phase: str = Field(max_length=60)
    done: float = Field(ge=0, le=1)


class GrantRead(Message):
    """A single-use permission to read one root. ``secret`` is shown once."""

    secret: str
    expires_at: datetime


class Failure(Message):
    reason: str = Field(max_length=500)


class Activation(Message):
    endpoint: str = Field(min_length=1, max_length=2000)


class ReleaseRequest(Message):
    purpose: Literal["client", "materialize"]


class ReleaseRead(Message):
    """The only message that carries key bytes; answered with ``Cache-Control: no-store``.

    ``secret`` is the ``vocab`` subkey for ``client`` and the root for ``materialize``
    (32 bytes, base64). A client drops it at ``expires_at`` at the latest.
    """

    purpose: Literal["client", "materialize"]
    key_id: str
    kcv: str
    vocab_kcv: str
    vocab_size: int
    secret: Base64 = Field(repr=False)
    expires_at: datetime


class ApiKeyCreate(Message):
    name: str = Field(min_length=1, max_length=100)
    role: Role


class ApiKeyRead(ApiKeyCreate):
    id: str
    tenant: Label | None
    created_at: datetime
    revoked_at: datetime | None = None


class ApiKeySecret(ApiKeyRead):
    """Answer to a creation: the only time the key itself is shown."""

    secret: str = Field(repr=False)


class InferenceTokenRead(Message):
    token: str = Field(repr=False)
    expires_at: datetime


class PublicKey(Message):
    """One Ed25519 key that inference tokens are verified with (JWK, RFC 8037)."""

    kid: str
    x: str
    kty: Literal["OKP"] = "OKP"
    crv: Literal["Ed25519"] = "Ed25519"


class JwkSet(Message):
    keys: tuple[PublicKey, ...]


class UsageReport(Message):
    """Tokens served by one engine process since it started; reporting twice counts once."""

    source: str = Field(min_length=1, max_length=100)
    tokens: Count


class AuditRead(Message):
    """One row of a tenant's hash chain; see ``anamorph.wire.audit``."""

    tenant: str
    sequence: int
    at: datetime
    actor: str
    action: str
    subject: str
    detail: dict[str, str | int | None]
    previous: str
    digest: str
