"""Messages of the key service's admin API (keyservice.md), shared by server and callers.

``…Create`` is what a caller sends, ``…Read`` what the service answers. All times
are UTC, all durations seconds. Unknown fields are refused.
"""

from __future__ import annotations

import base64
from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any, Generic, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)
from pydantic.json_schema import SkipJsonSchema

from anamorph.errors import Conflict, InvalidKey
from anamorph.wire.ids import Label
from anamorph.wire.recipient import check_recipient
from anamorph.wire.states import State

Digest = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]
Profile = Literal["permute", "rotate"]
Engine = Literal["torch", "vllm", "fake"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Base64 = Annotated[str, Field(pattern=r"^[A-Za-z0-9+/]+={0,2}$", max_length=1024)]

# Numbers stay within what JSON readers, the audit log's canonical form and SQL integers all hold.
# A true is no 1 here, nor a "1".
Int = Annotated[int, Field(strict=True)]
Real = Annotated[float, Field(strict=True)]
Count = Annotated[int, Field(strict=True, ge=0, le=2**53 - 1)]
LONGEST_S = 10 * 366 * 86400
MOST_PARTS = 1024

T = TypeVar("T")


class Message(BaseModel):
    """Base of everything on this wire: immutable, unknown fields and NUL characters refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("*", mode="after")
    @classmethod
    def _no_nul(cls, value: Any) -> Any:
        # No text column can hold one.
        if isinstance(value, str) and "\0" in value:
            raise ValueError("a text without NUL characters is needed")
        return value


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

    period_s: Int | None = Field(default=None, ge=60, le=LONGEST_S)
    token_budget: Count | None = Field(default=None, ge=1)
    grace_s: Int = Field(default=900, ge=1, le=LONGEST_S)
    client_cache_ttl_s: Int = Field(default=300, ge=1, le=600)
    longest_request_s: Int = Field(default=300, ge=1, le=LONGEST_S)
    clock_skew_s: Int = Field(default=30, ge=0, le=LONGEST_S)
    propagation_s: Int = Field(default=30, ge=0, le=LONGEST_S)
    destroy_delay_s: Int = Field(default=30 * 86400, ge=0, le=LONGEST_S)
    jitter: Real = Field(default=0.1, ge=0, le=0.5)
    """Rotations begin up to this fraction earlier than ``period_s`` and ``token_budget`` say,
    by chance, so that not all tenants rotate at once."""

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

    period_s: Int | None = None
    token_budget: Int | None = None
    grace_s: Int | None = None
    client_cache_ttl_s: Int | None = None
    longest_request_s: Int | None = None
    clock_skew_s: Int | None = None
    propagation_s: Int | None = None
    destroy_delay_s: Int | None = None
    jitter: Real | None = None


class Autoscaling(Message):
    """How many replicas of a dedicated model there are, by what is being answered.

    Args:
        min_replicas: 0 lets an idle model leave its device; the door holds the next request.
        target_ongoing_requests: per replica; more are started above it.
        idle_s: seconds without a request after which a replica leaves.
    """

    min_replicas: Int = Field(default=1, ge=0, le=1000)
    max_replicas: Int = Field(default=1, ge=1, le=1000)
    target_ongoing_requests: Real = Field(default=8, gt=0, le=100_000)
    idle_s: Real = Field(default=300, gt=0, le=LONGEST_S)

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"max_replicas must be at least min_replicas, {self.min_replicas}")
        return self

    @property
    def single(self) -> bool:
        """Whether there is always exactly one replica, which can have a route of its own."""
        return self.min_replicas == self.max_replicas == 1


class Serving(Message):
    """How a model is served; a change counts for versions that are issued after it.

    Args:
        placement: ``dedicated``, an engine of its own, or ``shared``, a slot in ``pool``.
        tensor_parallel, pipeline_parallel: ranks, as serving engines call them.
        num_gpus: per rank.
        max_concurrent: sequences of this model that are computed at a time.
        weight: share of a pool, against its other members'.
        tokens_per_s: bound of ids computed per second in a pool; none by default.
    """

    placement: Literal["dedicated", "shared"] = "dedicated"
    pool: Label | None = None
    tensor_parallel: Int = Field(default=1, ge=1, le=1024)
    pipeline_parallel: Int = Field(default=1, ge=1, le=1024)
    autoscaling: Autoscaling = Autoscaling()
    num_gpus: Real = Field(default=0, ge=0, le=1024)
    max_concurrent: Int = Field(default=16, ge=1, le=4096)
    weight: Real = Field(default=1, gt=0, le=1000)
    tokens_per_s: Real | None = Field(default=None, gt=0, le=10**9)

    @model_validator(mode="after")
    def _fits_its_placement(self) -> Self:
        if self.placement == "shared":
            self._check_shared()
        elif self.pool is not None or self.weight != 1 or self.tokens_per_s is not None:
            raise ValueError("pool, weight and tokens_per_s need placement 'shared'")
        return self

    def _check_shared(self) -> None:
        if self.pool is None:
            raise ValueError("placement 'shared' needs a pool")
        if self.tensor_parallel > 1 or self.pipeline_parallel > 1:
            raise ValueError("a pool has one process: tensor_parallel and pipeline_parallel must be 1")
        if self.autoscaling != Autoscaling():
            raise ValueError("a pool is always on: autoscaling needs placement 'dedicated'")


BaseUri = Annotated[str, Field(min_length=1, max_length=2000)]
ContextLength = Annotated[int, Field(strict=True, ge=1, le=2**31 - 1)]


class ModelCreate(Message):
    """A model to be served in the tenant's coordinates.

    Args:
        base: folder of the plaintext checkpoint, ``hf://org/name[@revision]``, or ``s3://bucket/path``;
            the operator's allow-list must cover it.
        base_digest: what the base must be, as a fold reports it; any base at that place if absent.
        vocab_size: rows of the embedding, which is what the vocabulary permutation acts on.
        tokenizer_digest, chat_template_digest: a client refuses any other tokenizer or template.
        context_length: most tokens of prompt and answer together.
    """

    id: Label
    base: BaseUri
    base_digest: Digest | None = None
    profile: Profile = "rotate"
    engine: Engine = "torch"
    dtype: Dtype = "auto"
    vocab_size: Int = Field(ge=2, le=2**31 - 1)
    context_length: ContextLength
    tokenizer_digest: Digest | None = None
    chat_template_digest: Digest | None = None
    policy: RotationPolicy = RotationPolicy()
    serving: Serving = Serving()


class ModelRead(ModelCreate):
    """A model; ``last_version`` is the highest version number ever given out, 0 before the first.

    ``row_version`` grows with every change of the record, rotations included: it is the ETag.
    """

    tenant: Label
    created_at: datetime
    last_version: Int = Field(default=0, ge=0)
    row_version: Int = Field(default=1, ge=1)


class ModelSettings(Message):
    """What of a model's record may change. A version keeps what it was issued under."""

    base: BaseUri
    base_digest: Digest | None = None
    engine: Engine
    dtype: Dtype
    context_length: ContextLength
    serving: Serving


class ModelPatch(Message):
    """Fields of a model's record to change, at least one; they count from the next rotation on.

    ``serving`` is replaced as a whole. Only ``base_digest`` may be null, which takes it away.
    Anything else of the record is fixed: clients hold keys and tokenizers for it.
    """

    model_config = ConfigDict(json_schema_extra={"minProperties": 1})

    base: BaseUri | SkipJsonSchema[None] = None
    base_digest: Digest | None = None
    engine: Engine | SkipJsonSchema[None] = None
    dtype: Dtype | SkipJsonSchema[None] = None
    context_length: ContextLength | SkipJsonSchema[None] = None
    serving: Serving | SkipJsonSchema[None] = None

    @model_validator(mode="after")
    def _changes_something(self) -> Self:
        if not self.model_fields_set:
            raise ValueError(f"nothing to change: give one of {', '.join(type(self).model_fields)}")
        void = sorted(name for name in self.model_fields_set - {"base_digest"} if getattr(self, name) is None)
        if void:
            raise ValueError(f"{', '.join(void)} cannot be null: leave out what stays as it is")
        return self

    def changes(self) -> dict[str, Any]:
        """The fields that are set, as JSON has them."""
        return self.model_dump(mode="json", exclude_unset=True)


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
    """One key version: metadata only, never key bytes.

    ``key_id``, the check values and the public key are absent while a version in PENDING is
    being prepared. ``destroy_complete_after`` is when a destroyed key is gone from backups
    and caches too. ``settings`` are the model's when the version was issued: it is made and
    served by them, whatever the record says by now; absent in versions of earlier releases.
    """

    tenant: Label
    model: Label
    version: Int = Field(ge=1)
    state: State
    key_id: str | None = None
    kcv: str | None = None
    vocab_kcv: str | None = None
    public_key: Base64 | None = None
    """Raw Ed25519 public key (32 bytes, base64): the trust anchor of the replica's manifest."""
    row_version: Int
    created_at: datetime
    updated_at: datetime
    activated_at: datetime | None = None
    drain_until: datetime | None = None
    destroy_at: datetime | None = None
    destroyed_at: datetime | None = None
    destroy_complete_after: datetime | None = None
    endpoint: str | None = None
    artifact: Materialized | None = None
    failure: str | None = None
    served_tokens: Int = 0
    settings: ModelSettings | None = None

    def require_key_id(self) -> str:
        """The key id of a version that must have one by now.

        Raises:
            Conflict: it is still being prepared.
        """
        if self.key_id is None:
            raise Conflict(
                "the key of this version is still being prepared", code="key_pending", retry_after=1
            )
        return self.key_id


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
    """Long work and how far it is: ``rotate`` makes a version, ``shred`` erases old KEK versions."""

    id: str
    kind: Literal["rotate", "shred"]
    tenant: Label
    model: Label | None = None
    version: Int | None = None
    status: OperationStatus
    phase: str
    progress: Real = Field(ge=0, le=1)
    error: str | None = None
    created_at: datetime
    updated_at: datetime


class RotationRead(OperationRead):
    """A rotation, which always has the version that it makes."""

    kind: Literal["rotate"]
    model: Label
    version: Int


class Progress(Message):
    """Progress of a materialisation, reported under its grant; ``done`` in 0..1."""

    phase: str = Field(max_length=60)
    done: Real = Field(ge=0, le=1)


class GrantCreate(Message):
    """Which grant of a materialisation is wanted; nothing of it for one in a single piece.

    With ``parts`` a materialisation begins, or begins anew, that is folded in so many parts; the
    grant is that of the job that finishes. With ``part`` too, 0 to ``parts`` - 1, it is that
    part's, of the materialisation that has begun.
    """

    parts: Int | None = Field(default=None, ge=1, le=MOST_PARTS)
    part: Int | None = Field(default=None, ge=0, le=MOST_PARTS - 1)

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if self.part is not None and self.part >= (self.parts or 0):
            raise ValueError("a part is 0 to parts - 1")
        return self


class GrantRead(Message):
    """A single-use permission to read one root. ``secret`` is shown once."""

    secret: str
    expires_at: datetime


class Failure(Message):
    reason: str = Field(max_length=500)


class Activation(Message):
    endpoint: str = Field(min_length=1, max_length=2000)


class Address(Message):
    """Where clients reach a version that is served already."""

    endpoint: str = Field(min_length=1, max_length=2000)


def _recipient_for_pydantic(value: str) -> str:
    try:
        check_recipient(value)
    except InvalidKey as error:
        raise ValueError(str(error)) from None
    return value


# 32 bytes in base64 leave two zero bits in the last digit.
RecipientKey = Annotated[
    str, Field(pattern=r"^[A-Za-z0-9+/]{42}[AEIMQUYcgkosw048]=$"), AfterValidator(_recipient_for_pydantic)
]


class ReleaseRequest(Message):
    """``recipient`` is the raw X25519 public key to seal the answer to; see ``wire.sealed``.

    ``part`` is the part that the asking job folds, which must be its grant's; absent for any other job.
    """

    purpose: Literal["client", "materialize"]
    recipient: RecipientKey | None = None
    part: Int | None = Field(default=None, ge=0, le=MOST_PARTS - 1)

    @model_validator(mode="after")
    def _part_of_a_materialisation(self) -> Self:
        if self.part is not None and self.purpose != "materialize":
            raise ValueError("only a materialisation has parts")
        return self


class ReleaseRead(Message):
    """The only message that carries key bytes; answered with ``Cache-Control: no-store``.

    ``secret`` is the ``vocab`` subkey for ``client`` and the root for ``materialize``
    (32 bytes, base64); ``sealed`` stands in its place where the request named a
    recipient. A client drops it at ``expires_at`` at the latest.
    """

    model_config = ConfigDict(hide_input_in_errors=True)

    purpose: Literal["client", "materialize"]
    key_id: str
    kcv: str
    vocab_kcv: str
    vocab_size: Int
    secret: Base64 | None = Field(default=None, repr=False)
    sealed: Base64 | None = Field(default=None, repr=False)
    """Encapsulated key (32 bytes) and ciphertext, base64."""
    expires_at: datetime

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.secret is None) == (self.sealed is None):
            raise ValueError("a release holds either 'secret' or 'sealed'")
        return self

    def material(self) -> bytes:
        """The key bytes.

        Raises:
            InvalidKey: they are still sealed.
        """
        if self.secret is None:
            raise InvalidKey("this release is sealed: open it with the recipient that asked for it")
        return base64.b64decode(self.secret)


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


class BackupCreate(Message):
    """A backup of the key service's database that was taken, checked and kept."""

    taken_at: AwareDatetime


class BackupRead(BackupCreate):
    id: str
    recorded_at: datetime


class UsageReport(Message):
    """Tokens served by one engine process since it started; reporting twice counts once."""

    source: str = Field(min_length=1, max_length=100)
    tokens: Count


class AuditRead(Message):
    """One row of a tenant's hash chain; see ``anamorph.wire.audit``."""

    tenant: str
    sequence: Int
    at: datetime
    actor: str
    action: str
    subject: str
    detail: dict[str, str | int | None]
    previous: str
    digest: str


class Event(StrEnum):
    """What a webhook is told of; ``webhook.test`` is what a test sends, whatever was asked for."""

    ROTATION_STARTED = "rotation.started"
    ROTATION_STAGED = "rotation.staged"
    ROTATION_ACTIVATED = "rotation.activated"
    ROTATION_FAILED = "rotation.failed"
    KEY_DRAINING = "key.draining"
    KEY_RETIRED = "key.retired"
    KEY_SUSPENDED = "key.suspended"
    KEY_RESUMED = "key.resumed"
    KEY_REVOKED = "key.revoked"
    KEY_DESTROY_SCHEDULED = "key.destroy_scheduled"
    KEY_RESTORED = "key.restored"
    KEY_DESTROYED = "key.destroyed"
    WEBHOOK_TEST = "webhook.test"


class WebhookCreate(Message):
    """Where to send events: https, port 443 or from 1024, at public addresses; all events by default."""

    url: str = Field(min_length=1, max_length=2000, examples=["https://hooks.example.com/anamorph"])
    events: tuple[Event, ...] = Field(default=tuple(Event), min_length=1, max_length=50)


class WebhookRead(WebhookCreate):
    id: str
    tenant: Label
    enabled: bool
    disabled_reason: str | None = None
    created_at: datetime


class WebhookSecret(WebhookRead):
    """Answer to a creation: the only time the signing secret is shown."""

    secret: str = Field(repr=False)


class DeliveryRead(Message):
    """One event on its way to one webhook; ``last_error`` is one of a few phrases of ours."""

    id: str
    tenant: Label
    webhook: str
    event: Event
    status: Literal["pending", "delivered", "dead"]
    attempts: Int
    created_at: datetime
    next_attempt_at: datetime | None = None
    delivered_at: datetime | None = None
    last_status: Int | None = None
    last_error: str | None = None


class EventSubject(Message):
    """The key version that an event is about; only the tenant is known in a test."""

    tenant: Label
    model: Label | None = None
    version: Int | None = None
    key_id: str | None = None
    state: State | None = None


class WebhookEvent(Message):
    """Body of a webhook's request: metadata only.

    ``id`` is also the header ``webhook-id``: the same at each attempt and for each webhook.
    """

    id: str
    type: Event
    timestamp: datetime
    data: EventSubject


class TenantQuota(Message):
    """How many objects a tenant may have at once: API keys that are not revoked, and key
    versions from PENDING to RETIRED or SUSPENDED, which are those it has yet to destroy;
    and how much all of its models together may ask for in their ``Serving``.

    Args:
        devices: ranks times replicas at most, each rank counted as its GPUs where it has several;
            a model in a pool counts as its ``num_gpus`` alone.
        concurrent: sequences that are computed at a time, in all replicas.
        weight: of the models in pools.
        tokens_per_s: of the models in pools, each of which must then name its bound; no quota by
            default, since members without a bound still share by weight.
    """

    models: Int = Field(default=100, ge=0, le=100_000)
    api_keys: Int = Field(default=200, ge=0, le=100_000)
    webhooks: Int = Field(default=10, ge=0, le=1000)
    versions: Int = Field(default=1000, ge=0, le=1_000_000)
    devices: Int = Field(default=200, ge=0, le=10**9)
    concurrent: Int = Field(default=4096, ge=0, le=10**9)
    weight: Int = Field(default=100, ge=0, le=10**9)
    tokens_per_s: Int | None = Field(default=None, ge=0, le=10**12)


class TenantQuotaPatch(Message):
    """Fields of a ``TenantQuota`` to change; ``null`` takes one back to its default."""

    models: Int | None = None
    api_keys: Int | None = None
    webhooks: Int | None = None
    versions: Int | None = None
    devices: Int | None = None
    concurrent: Int | None = None
    weight: Int | None = None
    tokens_per_s: Int | None = None
