"""``EncryptedModel``: one model in one tenant's secret coordinates.

The key service is the record of the model and of its key versions; this resource says what is
wanted of it and shows how it stands.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from anamorph.wire.admin import Dtype, Engine, Profile
from anamorph_operator.kubernetes.resources.part import Condition, Label, Part, immutable, rule, rules

Digest = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$", max_length=71)]
Seconds = Annotated[int, Field(ge=1, le=10 * 366 * 86400)]
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]

CONDITIONS = (
    "Ready",
    "KeyIssued",
    "Materialized",
    "Verified",
    "Serving",
    "Rotating",
    "Draining",
    "Degraded",
)
MOST_VERSIONS = 10


class BaseModelSource(Part):
    """The plaintext checkpoint.

    Args:
        uri: ``hf://org/name[@revision]``, a folder of a store (``s3://…``), or one that is mounted into
            materialisation jobs (``/…``); the operator's allow-list must cover it.
        digest: of its tensors and configuration, as a fold prints it; another base is refused.
    """

    uri: Annotated[str, Field(pattern=r"^(hf://|s3://|gs://|/)[^\s]+$", max_length=2000)]
    digest: Digest | None = None


class RotationPolicySpec(Part):
    """When a version is replaced and how long the old one lingers: ``wire.admin.RotationPolicy``."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                "self.graceSeconds >= self.clientCacheTtlSeconds + self.longestRequestSeconds"
                " + self.clockSkewSeconds + self.propagationSeconds",
                "graceSeconds must be at least clientCacheTtlSeconds + longestRequestSeconds"
                " + clockSkewSeconds + propagationSeconds: a client may use a cached key that long",
            )
        )
    )

    period_seconds: Annotated[int, Field(ge=60, le=10 * 366 * 86400)] | None = None
    token_budget: Annotated[int, Field(ge=1, le=2**53 - 1)] | None = None
    grace_seconds: Seconds = 900
    client_cache_ttl_seconds: Annotated[int, Field(ge=1, le=600)] = 300
    longest_request_seconds: Seconds = 300
    clock_skew_seconds: Annotated[int, Field(ge=0, le=10 * 366 * 86400)] = 30
    propagation_seconds: Annotated[int, Field(ge=0, le=10 * 366 * 86400)] = 30
    destroy_delay_seconds: Annotated[int, Field(ge=0, le=10 * 366 * 86400)] = 30 * 86400
    jitter: Annotated[float, Field(ge=0, le=0.5)] = 0.1


class AutoscalingSpec(Part):
    """How many replicas of a dedicated model there are: ``wire.admin.Autoscaling``."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule("self.maxReplicas >= self.minReplicas", "maxReplicas must be at least minReplicas")
        )
    )

    min_replicas: Annotated[int, Field(ge=0, le=1000)] = 1
    max_replicas: Annotated[int, Field(ge=1, le=1000)] = 1
    target_ongoing_requests: Annotated[float, Field(gt=0, le=100_000)] = 8
    idle_seconds: Annotated[float, Field(gt=0, le=10 * 366 * 86400)] = 300


class ServingSpec(Part):
    """How the model is served: ``wire.admin.Serving``, and its engine.

    A change makes a new version, which is served so beside the old one: an application that stands never
    changes.
    """

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                "(self.placement == 'shared') == has(self.pool)",
                "placement 'shared' needs a pool, no other has one",
            ),
            rule(
                "self.placement == 'dedicated' || (self.tensorParallel == 1 && self.pipelineParallel == 1)",
                "a pool has one process: tensorParallel and pipelineParallel must be 1",
            ),
            rule(
                "self.placement == 'dedicated' || (self.autoscaling.minReplicas == 1 &&"
                " self.autoscaling.maxReplicas == 1)",
                "a pool is always on: autoscaling needs placement 'dedicated'",
            ),
            rule(
                "self.placement == 'shared' || (self.weight == 1.0 && !has(self.tokensPerSecond))",
                "weight and tokensPerSecond need placement 'shared'",
            ),
        )
    )

    engine: Engine = "torch"
    placement: Literal["dedicated", "shared"] = "dedicated"
    pool: Label | None = None
    tensor_parallel: Annotated[int, Field(ge=1, le=1024)] = 1
    pipeline_parallel: Annotated[int, Field(ge=1, le=1024)] = 1
    autoscaling: AutoscalingSpec = AutoscalingSpec()
    num_gpus: Annotated[float, Field(ge=0, le=1024)] = 0
    max_concurrent: Annotated[int, Field(ge=1, le=4096)] = 16
    weight: Annotated[float, Field(gt=0, le=1000)] = 1
    tokens_per_second: Annotated[float, Field(gt=0, le=10**9)] | None = None


class DeletionSpec(Part):
    """What happens when the resource is deleted.

    Args:
        deadline_seconds: after so long it goes, whatever still stands of it.
    """

    deadline_seconds: Annotated[int, Field(ge=0, le=7 * 86400)] = 3600


class EncryptedModelSpec(Part):
    """What is wanted of one model.

    Args:
        tenant: whose key it is under; the namespace must be bound to it.
        model: id in the key service and in URLs; the object's name if absent.
        vocab_size: rows of the embedding.
        context_length: most tokens of prompt and answer together.
        tokenizer_digest, chat_template_digest: clients refuse any other tokenizer or template.
        serving_cluster: ``ServingCluster`` that hosts it.
    """

    model_config = ConfigDict(
        json_schema_extra=rules(
            *(
                rule(
                    f"has(oldSelf.{field}) == has(self.{field})"
                    f" && (!has(self.{field}) || self.{field} == oldSelf.{field})",
                    f"{field} never changes, as clients hold keys and tokenizers for it: make another object",
                )
                for field in ("model", "tokenizerDigest", "chatTemplateDigest")
            )
        )
    )

    tenant: Annotated[Label, Field(json_schema_extra=immutable("tenant"))]
    model: Label | None = None
    base: BaseModelSource
    profile: Annotated[Profile, Field(json_schema_extra=immutable("profile"))] = "rotate"
    dtype: Dtype = "auto"
    vocab_size: Annotated[int, Field(ge=2, le=2**31 - 1, json_schema_extra=immutable("vocabSize"))]
    context_length: Count
    tokenizer_digest: Digest | None = None
    chat_template_digest: Digest | None = None
    rotation_policy: RotationPolicySpec = RotationPolicySpec()
    serving: ServingSpec = ServingSpec()
    serving_cluster: Label
    deletion: DeletionSpec = DeletionSpec()


class VersionStatus(Part):
    """One key version, as the key service records it."""

    version: Annotated[int, Field(ge=1)]
    state: Annotated[str, Field(max_length=32)]
    key_id: Annotated[str, Field(max_length=200)] | None = None
    serving_cluster: Label | None = None


class EncryptedModelStatus(Part):
    """How one model stands; written by the operator alone.

    Args:
        versions: newest first, at most ten.
        endpoint: URL of the active version, as clients see it.
        rotate_request: value of the annotation ``anamorph.dev/rotate`` that was last acted on.
    """

    observed_generation: Annotated[int, Field(ge=0)] = 0
    conditions: Annotated[tuple[Condition, ...], Field(max_length=len(CONDITIONS))] = ()
    versions: Annotated[tuple[VersionStatus, ...], Field(max_length=MOST_VERSIONS)] = ()
    active_version: Annotated[int, Field(ge=1)] | None = None
    endpoint: Annotated[str, Field(max_length=2000)] | None = None
    rotate_request: Annotated[str, Field(max_length=256)] | None = None
