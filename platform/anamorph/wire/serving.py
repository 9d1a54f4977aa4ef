"""What the operator tells the compute zone: settings of applications, and key state.

These travel as Ray Serve application arguments and ``user_config``, which anyone
with access to the cluster can read: references and public keys only.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from anamorph.wire.admin import Autoscaling, Dtype, Engine, Message, PublicKey
from anamorph.wire.ids import Label

Protection = Literal["plaintext", "encrypted"]

APP_IMPORT_PATH = "anamorph.serve.applications.engine:build"
POOL_IMPORT_PATH = "anamorph.serve.applications.pool:build"
DOOR_IMPORT_PATH = "anamorph.serve.applications.door:build"
# Code of a pool's 503 for a member that will never be served: another attempt makes no sense.
REPLICA_REFUSED = "replica_refused"


def app_name(tenant: str, model: str, version: int) -> str:
    """Name of the Ray Serve application of one key version."""
    return f"{tenant}.{model}.v{version}"


def pool_name(pool: str) -> str:
    """Name of the Ray Serve application of one pool; a version has three parts, so the two never meet."""
    return f"shared.{pool}"


def deployment_name(app: str) -> str:
    """Name of the one deployment of an application that is not the door: a pool's, or a version's."""
    return "pool" if app.count(".") == 1 else "engine"


def route_prefix(tenant: str, model: str, version: int) -> str:
    """Path under which one key version is served, without a trailing slash."""
    return f"/{tenant}/{model}/v{version}"


class Cache(Message):
    """The node-local cache of replicas that are fetched from a store.

    Args:
        folder: on every node; by default one for each user in the temporary folder.
        limit_bytes: entries that are not in use are evicted beyond it.
    """

    folder: str | None = None
    limit_bytes: int = Field(default=200 * 2**30, ge=1)


class EngineSettings(Message):
    """Arguments of one application: one (tenant, model, version).

    The plaintext baseline is ``tenant="plaintext"``, ``version=0`` with
    ``protection="plaintext"``; it has no key id and no trust anchor.
    """

    tenant: str
    model: Label
    version: int = Field(ge=0)
    protection: Protection = "encrypted"
    replica: str
    key_id: str | None = None
    public_key: str | None = None
    """Trust anchor of the replica's manifest: raw Ed25519 public key, base64."""
    manifest_sha256: str | None = None
    engine: Engine = "torch"
    dtype: Dtype = "auto"
    context_length: int = Field(ge=1)
    max_batch_tokens: int = Field(default=2048, ge=16)
    num_blocks: int = Field(default=512, ge=2)
    max_concurrent: int = Field(default=16, ge=1)
    max_queued: int = Field(default=64, ge=0)
    max_body_bytes: int = Field(default=2**20, ge=1024)
    num_gpus: float = Field(default=0, ge=0)
    """What Ray reserves for each rank; with 0 it sees no GPU and computes on the CPU."""
    memory_mib: int = Field(default=0, ge=0)
    """What Ray reserves for each rank of the memory that nodes announce; with 0 nothing."""
    tensor_parallel: int = Field(default=1, ge=1)
    pipeline_parallel: int = Field(default=1, ge=1)
    autoscaling: Autoscaling = Autoscaling()
    cache: Cache = Cache()
    request_timeout_s: float = Field(default=300, gt=0)
    otlp_endpoint: str | None = None


class KeyState(Message):
    """``user_config`` of an engine application: pushed, never fetched.

    ``status`` is how the version is to be answered: ``serving`` normally,
    ``suspended`` 403, ``gone`` 410.
    """

    status: Literal["serving", "suspended", "gone"] = "serving"
    jwks: tuple[PublicKey, ...] = ()


class PoolSettings(Message):
    """Arguments of one pool: an engine that several tenants' replicas of equal shapes share.

    Args:
        slots: replicas that are computed with at a time, each with a cache of ``num_blocks``.
        host_bytes: bound of copies kept in host memory before a GPU; on a CPU the files are read.
        max_concurrent: sequences per step of one slot.
        max_queued: sequences that one tenant may have waiting.
    """

    pool: Label
    engine: Engine = "torch"
    dtype: Dtype = "auto"
    context_length: int = Field(ge=1)
    slots: int = Field(default=2, ge=1, le=64)
    host_bytes: int = Field(default=8 * 2**30, ge=0)
    max_batch_tokens: int = Field(default=2048, ge=16)
    num_blocks: int = Field(default=512, ge=2)
    max_concurrent: int = Field(default=16, ge=1)
    max_queued: int = Field(default=64, ge=0)
    max_body_bytes: int = Field(default=2**20, ge=1024)
    num_gpus: float = Field(default=0, ge=0)
    memory_mib: int = Field(default=0, ge=0)
    cache: Cache = Cache()
    request_timeout_s: float = Field(default=300, gt=0)
    otlp_endpoint: str | None = None


class PoolMember(Message):
    """One version that a pool serves; what ``EngineSettings`` and ``KeyState`` say of a dedicated one."""

    tenant: Label
    model: Label
    version: int = Field(ge=1)
    replica: str
    key_id: str
    public_key: str
    manifest_sha256: str
    status: Literal["serving", "suspended", "gone"] = "serving"
    weight: float = Field(default=1, gt=0)
    max_concurrent: int = Field(default=16, ge=1)
    tokens_per_s: float | None = Field(default=None, gt=0)


class PoolState(Message):
    """``user_config`` of a pool: pushed, never fetched."""

    jwks: tuple[PublicKey, ...] = ()
    members: tuple[PoolMember, ...] = ()


class Route(Message):
    """One version as the door knows it.

    ``app`` is the application that the door forwards to, absent for one with a route of its own;
    ``max_held`` bounds the requests that wait for its first byte. With ``affinity``, prompts that
    begin alike go to the same one of its replicas.
    """

    tenant: str
    model: Label
    version: int
    key_id: str
    status: Literal["pending", "serving", "suspended", "gone"]
    app: str | None = None
    max_held: int = Field(default=64, ge=1)
    affinity: bool = False
    request_timeout_s: float = Field(default=300, gt=0)


class Ended(Message):
    """Versions of a model up to ``up_to`` that have no ``Route`` have ended: they are answered 410."""

    tenant: str
    model: Label
    up_to: int = Field(ge=1)


class DoorState(Message):
    """``user_config`` of the door."""

    jwks: tuple[PublicKey, ...] = ()
    routes: tuple[Route, ...] = ()
    ended: tuple[Ended, ...] = ()
    otlp_endpoint: str | None = None


class Usage(Message):
    """Answer of an application's ``GET /usage``: tokens served since this process started.

    ``in_flight`` counts the requests that are queued or being answered now: the
    operator deletes an application only at zero.
    """

    source: str
    tokens: int = Field(ge=0)
    in_flight: int = Field(default=0, ge=0)
