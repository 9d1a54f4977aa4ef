"""Pools as a function of their members: one application each, which its members share.

A pool's settings are those that it was started with for as long as it stands; only its
members change. A version is a member from STAGED until it is gone *and* idle.
"""

from __future__ import annotations

from collections import defaultdict

from anamorph.wire.admin import KeyVersionRead, ModelRead
from anamorph.wire.serving import PoolMember, PoolSettings, pool_name
from anamorph.wire.states import SERVABLE, State
from anamorph_operator import capacity
from anamorph_operator.state import Deployed, Desired, Observed, Ref

Sharing = list[tuple[KeyVersionRead, ModelRead]]
_IN_USE = SERVABLE - {State.STAGED}


def sharing(desired: Desired) -> dict[str, Sharing]:
    """The versions of each pool, whatever their state."""
    found: dict[str, Sharing] = defaultdict(list)
    for version in desired.versions:
        model = desired.model_of(Ref.of(version))
        if model is not None and model.serving.pool is not None:
            found[model.serving.pool].append((version, model))
    return found


def in_use(desired: Desired, pool: str) -> bool:
    """Whether a pool serves more than versions that nobody uses yet."""
    return any(version.state in _IN_USE for version, _ in sharing(desired).get(pool, ()))


def standing(pool: str, observed: Observed) -> PoolSettings | None:
    """The settings that a pool runs with, if it stands."""
    deployed: Deployed | None = (observed.deployed or {}).get(pool_name(pool))
    settings = deployed.application.settings if deployed and deployed.application else None
    return settings if isinstance(settings, PoolSettings) else None


def settings(desired: Desired, observed: Observed, pool: str, sharing: Sharing) -> PoolSettings:
    """What a pool that does not stand is started with."""
    models = [model for _, model in sorted(sharing, key=lambda pair: pair[0].created_at)]
    fields = capacity.pool_fields(desired, observed, pool, models)
    if desired.otlp_endpoint is not None:
        fields["otlp_endpoint"] = desired.otlp_endpoint
    if desired.cache is not None:
        fields["cache"] = desired.cache
    return PoolSettings.model_validate(fields)


def refusal(model: ModelRead, pool: PoolSettings) -> str | None:
    """Why a model cannot be served by a pool, in words; None if it can. Shapes are the engine's to check."""
    if (model.engine, model.dtype) != (pool.engine, pool.dtype):
        wanted, there = f"{model.engine} in {model.dtype}", f"{pool.engine} in {pool.dtype}"
        return f"pool '{pool.pool}' computes with {there}, the model with {wanted}: choose another pool"
    if model.context_length > pool.context_length:
        return (
            f"pool '{pool.pool}' was started for contexts of {pool.context_length} tokens,"
            f" the model has {model.context_length}: choose another pool"
        )
    return None


def member(version: KeyVersionRead, model: ModelRead, status: str) -> PoolMember:
    """A version as its pool knows it."""
    assert version.artifact is not None  # noqa: S101 - it is staged
    serving = model.serving
    return PoolMember.model_validate(
        {
            "tenant": version.tenant,
            "model": version.model,
            "version": version.version,
            "replica": version.artifact.replica,
            "key_id": version.key_id,
            "public_key": version.public_key,
            "manifest_sha256": version.artifact.manifest_sha256,
            "status": status,
            "weight": serving.weight,
            "max_concurrent": serving.max_concurrent,
            "tokens_per_s": serving.tokens_per_s,
        }
    )
