"""Whether there is room for a version, before anything is materialised for it.

What does not fit beside what stands waits, with its reason in the log; what would not fit
on an empty cluster is given up. A rotation needs room for both versions at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from anamorph.serve.cluster.placement import Demand, DoesNotFit, demand_of, fits, without_memory
from anamorph.serve.cluster.sizing import Size
from anamorph.wire.admin import ModelRead
from anamorph.wire.serving import EngineSettings, PoolSettings, pool_name
from anamorph_operator.state import Application, Desired, Observed, Ref


@dataclass(frozen=True)
class NoRoom:
    """Why a version is not begun; ``never`` if an empty cluster would not do either."""

    reason: str
    never: bool = False


def no_room(
    observed: Observed, standing: Sequence[Application], coming: Sequence[Demand], wanted: Wanted
) -> NoRoom | None:
    """Whether a version cannot be served; ``None`` if it can, or if the nodes are not known.

    Args:
        observed: the cluster.
        standing: what is there after the next write.
        coming: versions that are being materialised.
        wanted: what it would take.
    """
    if observed.cluster is None or wanted.demand is None:
        return None
    alone = fits(observed.cluster, (), wanted.demand)
    if isinstance(alone, DoesNotFit):
        return NoRoom(alone.reason, never=True)
    verdict = fits(observed.cluster, [*_placed(standing, wanted), *coming], wanted.demand)
    return NoRoom(verdict.reason) if isinstance(verdict, DoesNotFit) else None


@dataclass(frozen=True)
class Wanted:
    """What a version would take; ``demand`` is ``None`` where its pool is there already."""

    ref: Ref
    demand: Demand | None
    asleep: bool = False


def wanted(desired: Desired, observed: Observed, ref: Ref, model: ModelRead) -> Wanted:
    """What a version takes when it is awake."""
    pool = model.serving.pool
    if pool is not None:
        return Wanted(ref, _pool(desired, observed, pool, model))
    settings = EngineSettings.model_validate(
        {"tenant": ref.tenant, "model": ref.model, "version": ref.version, "replica": ""}
        | engine_fields(observed, model)
    )
    asleep = settings.autoscaling.min_replicas == 0
    return Wanted(ref, demand_of(ref.app, settings, waking=True), asleep)


def _pool(desired: Desired, observed: Observed, pool: str, model: ModelRead) -> Demand | None:
    if pool_name(pool) in (observed.deployed or {}):
        return None
    return demand_of(
        pool_name(pool), PoolSettings.model_validate(pool_fields(desired, observed, pool, [model]))
    )


def _placed(standing: Sequence[Application], wanted: Wanted) -> list[Demand]:
    """What stands, with what must be able to wake beside the wanted version.

    Those that sleep share the room for the largest of them; a version that will sleep itself
    needs none of that, but must be verified while its predecessor may be awake.
    """
    served = [(app, app.settings) for app in standing if app.settings is not None]
    always = [demand_of(app.name, settings) for app, settings in served]
    asleep = [
        demand_of(app.name, settings, waking=True)
        for app, settings in served
        if isinstance(settings, EngineSettings) and settings.autoscaling.min_replicas == 0
    ]
    family = f"{wanted.ref.tenant}.{wanted.ref.model}.v"
    own = [demand for demand in asleep if demand.app.startswith(family)]
    others = [demand for demand in asleep if not demand.app.startswith(family)]
    largest = sorted(others, key=lambda d: (d.each.memory_mib or 0, d.each.gpus, d.ranks))[-1:]
    return always + own + ([] if wanted.asleep else largest)


def engine_fields(observed: Observed, model: ModelRead) -> dict[str, Any]:
    """What a model's record decides of its application's settings."""
    serving = model.serving
    fields = {
        "engine": model.engine,
        "dtype": model.dtype,
        "context_length": model.context_length,
        "tensor_parallel": serving.tensor_parallel,
        "pipeline_parallel": serving.pipeline_parallel,
        "num_gpus": serving.num_gpus,
        "max_concurrent": serving.max_concurrent,
        "autoscaling": serving.autoscaling,
        "request_timeout_s": model.policy.longest_request_s,
    }
    size = _size(observed, model)
    if size is not None:
        ranks = serving.tensor_parallel * serving.pipeline_parallel
        blocks = EngineSettings.model_fields["num_blocks"].default
        fields["memory_mib"] = size.mib(num_blocks=blocks, ranks=ranks)
    return fields


def pool_fields(
    desired: Desired, observed: Observed, pool: str, models: Sequence[ModelRead]
) -> dict[str, Any]:
    """What a pool is started with: the kind of engine of its first member, and room for all."""
    first = models[0]
    fields: dict[str, Any] = {
        "pool": pool,
        "engine": first.engine,
        "dtype": first.dtype,
        "context_length": max(model.context_length for model in models),
        "max_concurrent": max(model.serving.max_concurrent for model in models),
        "num_gpus": first.serving.num_gpus,
        "request_timeout_s": max(model.policy.longest_request_s for model in models),
        **desired.pools.get(pool, {}),
    }
    size = _size(observed, first)
    if size is not None and "memory_mib" not in fields:
        chosen = PoolSettings.model_validate(fields)
        # On a GPU what nodes announce is the device's memory, and copies in the host's take none of it;
        # on a CPU there are none.
        fields["memory_mib"] = size.mib(num_blocks=chosen.num_blocks, copies=chosen.slots)
    return fields


def _size(observed: Observed, model: ModelRead) -> Size | None:
    """A model's size, where nodes announce memory: a request for what nobody has would wait for good."""
    if observed.cluster is None or without_memory(observed.cluster):
        return None
    return observed.sizes.get((model.base, model.dtype))
