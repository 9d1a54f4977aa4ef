"""``ServingCluster``: a Ray cluster that hosts replicas, made by KubeRay or there already."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from anamorph.wire.admin import Dtype, Engine
from anamorph_operator.kubernetes.resources.part import (
    Condition,
    Label,
    Part,
    Quantity,
    Url,
    immutable,
    rule,
    rules,
    unchanged,
)

MOST_APPLICATIONS = 500
"""During a rotation of all it is twice as many, and the whole list must fit one object of etcd."""
CONDITIONS = ("Ready", "CapacityLeft")


class Resources(Part):
    """What one pod of Ray asks for, and may take: no more memory and devices; CPUs that others leave.

    Args:
        cpu: that no other pod takes away.
        gpus: whole devices of ``gpuResource``.
    """

    cpu: Quantity = "1"
    memory: Quantity = "4Gi"
    gpus: Annotated[int, Field(ge=0, le=64)] = 0
    gpu_resource: Annotated[str, Field(pattern=r"^[a-z0-9.-]+/[a-z0-9.-]+$", max_length=100)] = (
        "nvidia.com/gpu"
    )


class Toleration(Part):
    """As in a pod's ``tolerations``."""

    key: Annotated[str, Field(max_length=317)]
    operator: Literal["Exists", "Equal"] = "Equal"
    value: Annotated[str, Field(max_length=63)] | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None


# KubeRay would answer by a second cluster of full size beside the first, without our models' consent.
_ANOTHER = "make another ServingCluster and move models to it"
_PODS = unchanged(
    "resources",
    "logicalCpus",
    "replicaMemory",
    "accelerator",
    "nodeSelector",
    "tolerations",
    "priorityClassName",
    why=_ANOTHER,
)


class PodSpec(Part):
    """What the pods of a group have in common.

    Args:
        accelerator: Ray's name of the device type.
        replica_memory: what replicas may take in one pod, of its devices or, for engines on the CPU, of
            the host: announced to Ray, so that models are placed by it. If no pod says it, they are not.
        logical_cpus: that Ray counts, of which a replica on the CPU takes one and a door a tenth; the
            whole CPUs of ``resources`` if absent. More of them share the pod's CPUs.
    """

    model_config = ConfigDict(json_schema_extra=rules(_PODS))

    resources: Resources = Resources()
    accelerator: Annotated[str, Field(pattern=r"^[A-Za-z0-9][-A-Za-z0-9_.]{0,62}$", max_length=63)] | None = (
        None
    )
    replica_memory: Quantity | None = None
    logical_cpus: Annotated[int, Field(ge=1, le=1024)] | None = None
    node_selector: Annotated[dict[str, Annotated[str, Field(max_length=63)]], Field(max_length=32)] = {}  # noqa: RUF012 - pydantic copies it
    tolerations: Annotated[tuple[Toleration, ...], Field(max_length=16)] = ()
    priority_class_name: Annotated[str, Field(max_length=253)] | None = None


class WorkerGroup(PodSpec):
    """Workers that are alike.

    Args:
        replicas: pods; with ``autoscaling`` the fewest.
        max_replicas: most pods with ``autoscaling``; ``replicas`` if absent.
    """

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                "!has(self.maxReplicas) || self.maxReplicas >= self.replicas",
                "maxReplicas must be at least replicas",
            ),
            rule("self.name != 'headgroup'", "headgroup is the head's own: choose another name"),
            _PODS,
        )
    )

    name: Label
    replicas: Annotated[int, Field(ge=0, le=1000)] = 1
    max_replicas: Annotated[int, Field(ge=1, le=1000)] | None = None


class Redis(Part):
    """Where Ray's head keeps its state, so that replicas outlive it.

    Args:
        address: ``host:port``.
        password_secret: Secret with the key ``password``, in the cluster's namespace.
    """

    address: Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?:[0-9]{1,5}$", max_length=259)]
    password_secret: Label | None = None


class RaySpec(Part):
    """A Ray cluster that KubeRay makes.

    Its image never changes: another cluster is made, and models move to it.

    Args:
        image: with a tag that is not ``latest``, or a digest.
        ray_version: of the Ray in it.
        token_secret: Secret with the key ``auth_token``, which every call to Ray needs.
        autoscaling: whether Ray may add and remove worker pods; needs the rights that the chart lists.
    """

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                "!self.autoscaling || self.workerGroups.all(g, has(g.maxReplicas))",
                "autoscaling needs maxReplicas in every worker group",
            ),
            unchanged("rayVersion", "tokenSecret", "redis", "autoscaling", why=_ANOTHER),
        )
    )

    image: Annotated[
        str,
        Field(
            pattern=r"^[^\s@]+(:[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}|@sha256:[0-9a-f]{64})$",
            max_length=500,
            json_schema_extra=rules(
                rule(
                    "self == oldSelf",
                    "a cluster's image never changes: make another ServingCluster and move models to it",
                ),
                rule("!self.endsWith(':latest')", "name a version or a digest, not latest"),
            ),
        ),
    ]
    ray_version: Annotated[str, Field(pattern=r"^[0-9]+\.[0-9]+\.[0-9]+$", max_length=20)] = "2.60.0"
    token_secret: Label
    head: PodSpec = PodSpec()
    worker_groups: Annotated[tuple[WorkerGroup, ...], Field(max_length=16)] = ()
    autoscaling: bool = False
    redis: Redis | None = None


class ExistingSpec(Part):
    """A Ray cluster that is there already: Serve's REST API is written to.

    Args:
        dashboard_url: of Ray's dashboard.
        serve_url: where Serve listens.
        token_secret: Secret with the key ``auth_token``.
    """

    dashboard_url: Url
    serve_url: Url
    token_secret: Label | None = None


class Storage(Part):
    """Where replicas are published.

    Args:
        uri: ``s3://bucket/prefix``, or a folder that jobs and engines have mounted.
        endpoint_url: of an S3-compatible store that is not AWS.
        credentials_secret: Secret with ``AWS_ACCESS_KEY_ID`` and ``AWS_SECRET_ACCESS_KEY``, in the namespaces
            of jobs and of the cluster; absent where pods have an identity of their own.
    """

    uri: Annotated[
        str,
        Field(
            pattern=r"^(s3://|gs://|/)[^\s]+$", max_length=2000, json_schema_extra=immutable("storage.uri")
        ),
    ]
    endpoint_url: Url | None = None
    credentials_secret: Label | None = None


class Pool(Part):
    """An engine that several tenants' models of equal shapes share: ``wire.serving.PoolSettings``."""

    name: Label
    slots: Annotated[int, Field(ge=1, le=64)] = 2
    host_bytes: Annotated[int, Field(ge=0, le=2**53 - 1)] = 8 * 2**30
    num_blocks: Annotated[int, Field(ge=2, le=2**31 - 1)] = 512


class BaselineSpec(Part):
    """A plaintext model that is served beside the replicas, for measurements only."""

    model: Label
    uri: Annotated[str, Field(pattern=r"^(s3://|gs://|/)[^\s]+$", max_length=2000)]
    context_length: Annotated[int, Field(ge=1, le=2**31 - 1)]
    engine: Engine = "torch"
    dtype: Dtype = "auto"


class ServingClusterSpec(Part):
    """What is wanted of a serving cluster.

    Args:
        public_url: where clients reach it; the cluster's own Service if absent.
        cache_bytes: bound of the replicas that a node keeps.
        max_applications: beyond it models are refused with the reason.
    """

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule("has(self.ray) != has(self.existing)", "give exactly one of ray and existing"),
            rule(
                "has(oldSelf.ray) == has(self.ray)",
                "a cluster does not change its kind: make another ServingCluster",
            ),
        )
    )

    ray: RaySpec | None = None
    existing: ExistingSpec | None = None
    storage: Storage
    public_url: Url | None = None
    cache_bytes: Annotated[int, Field(ge=2**20, le=2**53 - 1)] = 200 * 2**30
    max_applications: Annotated[int, Field(ge=1, le=MOST_APPLICATIONS)] = MOST_APPLICATIONS
    pools: Annotated[tuple[Pool, ...], Field(max_length=100)] = ()
    baselines: Annotated[tuple[BaselineSpec, ...], Field(max_length=100)] = ()


class ServingClusterStatus(Part):
    """How a serving cluster stands; written by the operator alone."""

    observed_generation: Annotated[int, Field(ge=0)] = 0
    conditions: Annotated[tuple[Condition, ...], Field(max_length=len(CONDITIONS))] = ()
    applications: Annotated[int, Field(ge=0)] = 0
    models: Annotated[int, Field(ge=0)] = 0
    serve_url: Annotated[str, Field(max_length=2000)] | None = None
    public_url: Annotated[str, Field(max_length=2000)] | None = None
