"""Which key versions the canary may measure: those that are loaded anyway.

A request of the canary must neither wake a replica nor keep one from leaving its device.
So a model that may go down to zero replicas is left out while it is up, too: each request
would begin its idle time anew. A member of a pool is left out because a request would
bring it into a slot, and another member out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from anamorph.wire.admin import KeyVersionRead, ModelRead
from anamorph.wire.serving import route_prefix
from anamorph.wire.states import State


@dataclass(frozen=True)
class Served:
    """A key version that is always loaded, and the baseline that it is compared with.

    Args:
        endpoint: of the version, without ``/v1``.
        baseline: name of the plaintext baseline, the base itself or its twin.
        plaintext: its endpoint.
    """

    tenant: str
    model: str
    version: int
    key_id: str
    endpoint: str
    baseline: str
    plaintext: str
    vocab_size: int
    context_length: int


@dataclass(frozen=True)
class Baselines:
    """Where baselines are.

    Args:
        serve_url: ``http://host:port`` of Ray Serve.
        names: model id → name of its baseline; a model that is not named has one of its own name.
    """

    serve_url: str
    names: Mapping[str, str] = field(default_factory=dict)

    def of(self, model: str) -> tuple[str, str]:
        """Name and endpoint of a model's baseline."""
        name = self.names.get(model, model)
        return name, self.serve_url.rstrip("/") + route_prefix("plaintext", name, 0)


def loaded(
    versions: Iterable[KeyVersionRead], models: Iterable[ModelRead], baselines: Baselines
) -> tuple[list[Served], Counter[str]]:
    """The ACTIVE versions that are always loaded; and how many are left out, by reason.

    A DRAINING version is not asked for either: it ends when nothing is in flight.
    """
    known = {(model.tenant, model.id): model for model in models}
    found, left_out = [], Counter[str]()
    for version in versions:
        model = known.get((version.tenant, version.model))
        if version.state is not State.ACTIVE or model is None:
            continue
        reason = _reason(version, model)
        if reason is None:
            found.append(_served(version, model, baselines))
        else:
            left_out[reason] += 1
    return found, left_out


def _reason(version: KeyVersionRead, model: ModelRead) -> str | None:
    if version.endpoint is None or version.key_id is None:
        return "no_endpoint"
    if model.serving.placement == "shared":
        return "shared"
    return "scales_to_zero" if model.serving.autoscaling.min_replicas == 0 else None


def _served(version: KeyVersionRead, model: ModelRead, baselines: Baselines) -> Served:
    name, plaintext = baselines.of(model.id)
    return Served(
        tenant=version.tenant,
        model=version.model,
        version=version.version,
        key_id=version.require_key_id(),
        endpoint=version.endpoint or "",
        baseline=name,
        plaintext=plaintext,
        vocab_size=model.vocab_size,
        context_length=model.context_length,
    )
