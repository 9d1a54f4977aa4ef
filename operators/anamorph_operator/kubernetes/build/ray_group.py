"""One group of a Ray cluster's pods, and what all Ray clusters have in common."""

from __future__ import annotations

from dataclasses import dataclass, field

from anamorph_operator.kubernetes.resources.serving_cluster import (
    PodSpec,
    RaySpec,
    ServingClusterSpec,
    Storage,
)


@dataclass(frozen=True)
class Compute:
    """What all Ray clusters have in common.

    Args:
        namespace: of serving clusters; nothing of ours but them may be in it.
        tls_secret: ``tls.crt`` and ``tls.key`` by which Serve answers; plain HTTP if absent.
        ray_ca_secret: ``tls.crt`` and ``tls.key`` of an authority for nothing but Ray's own traffic, which
            is in the clear if absent. Each pod makes itself a certificate for its address.
        ca_config_map: certificate that signs the store's, in ``ca.crt``.
        env: further variables of Ray's containers.
    """

    namespace: str
    tls_secret: str | None = None
    ray_ca_secret: str | None = None
    ca_config_map: str | None = None
    pull_policy: str = "IfNotPresent"
    pull_secrets: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Group:
    """One group of pods that are alike, and what they have from their cluster."""

    cluster: str
    compute: Compute
    ray: RaySpec
    storage: Storage
    cache_bytes: int
    pod: PodSpec
    head: bool = False

    @property
    def computes(self) -> bool:
        """Whether replicas run here: the head leaves them to workers, so that they outlive it."""
        return not (self.head and self.ray.worker_groups)

    @property
    def scales(self) -> bool:
        """Whether Ray's autoscaler runs beside Ray here."""
        return self.head and self.ray.autoscaling


def groups(name: str, spec: ServingClusterSpec, compute: Compute) -> tuple[Group, ...]:
    """The head's group and then the workers', in their order.

    Raises:
        ValueError: the cluster is there already, and none of our making.
    """
    if spec.ray is None:
        raise ValueError(f"serving cluster '{name}' is an existing one: it has no pods of ours")
    common = (name, compute, spec.ray, spec.storage, spec.cache_bytes)
    workers = (Group(*common, pod) for pod in spec.ray.worker_groups)
    return Group(*common, spec.ray.head, head=True), *workers
