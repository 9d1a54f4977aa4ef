"""One version's materialisation: its name, its labels, whose it is, and the task it is given."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field

from kubernetes.utils.quantity import parse_quantity

from anamorph.serve.cluster.sizing import Size
from anamorph.wire.admin import ModelRead
from anamorph_operator.kubernetes.build import pods
from anamorph_operator.kubernetes.build.pods import Manifest
from anamorph_operator.kubernetes.resources.serving_cluster import Storage, Toleration
from anamorph_operator.state import Ref

COMPONENT = "materializer"
TASK_KEY = "task.json"
BASES = "/bases"
"""Where jobs see the base weights of a volume."""
WORK = "/work"
"""Memory of a job: the base as it is fetched, temporary files and, in one piece, work in progress."""
SHARED = "/shared"
"""Work in progress of a materialisation in parts: parts of the replica, nothing plain."""
_MIB = 2**20
# Files that are no weights, and the blocks that a transfer holds.
_SLACK_MIB = 512


@dataclass(frozen=True)
class Materializer:
    """What all materialisation jobs have in common.

    Args:
        namespace: of jobs; nothing else may be in it.
        keysvc: URL of the key service.
        audience: of the tokens that it takes.
        storage: where replicas go, with a credential that may write.
        allow_base: where bases may come from.
        cpu, memory: of one pod, memory without its scratch.
        scratch: of one pod, in memory, where a base's size is not known.
        parts: jobs that fold one version together; with more than one they share a volume.
        parallel: parts that fold at a time.
        storage_class, access_mode: of that volume; several nodes need ``ReadWriteMany``.
        deadline_s: seconds after which a job is given up, attempts and pauses included.
        keep_s: seconds that an ended job can still be looked at.
        attempts: failed pods after which a job is given up.
        bases_claim: volume with base weights, seen at ``BASES``, read only.
        ca_config_map: certificate that signs the key service's, in ``ca.crt``.
    """

    namespace: str
    image: str
    keysvc: str
    audience: str
    storage: Storage
    allow_base: tuple[str, ...] = ()
    cpu: str = "2"
    memory: str = "8Gi"
    scratch: str = "16Gi"
    parts: int = 1
    parallel: int = 4
    storage_class: str | None = None
    access_mode: str = "ReadWriteMany"
    deadline_s: int = 4 * 3600
    keep_s: int = 3600
    attempts: int = 4
    bases_claim: str | None = None
    ca_config_map: str | None = None
    priority_class: str | None = None
    node_selector: dict[str, str] = field(default_factory=dict)
    tolerations: tuple[Toleration, ...] = ()
    pull_policy: str = "IfNotPresent"
    pull_secrets: tuple[str, ...] = ()


@dataclass(frozen=True)
class Making:
    """What one materialisation makes.

    Args:
        size: of the base, where it is known.
    """

    ref: Ref
    model: ModelRead
    size: Size | None = None


def name(ref: Ref) -> str:
    """Name of everything that belongs to one materialisation: 25 characters, no two versions alike."""
    digest = hashlib.sha256()
    for part in (ref.tenant, ref.model, str(ref.version)):
        content = part.encode()
        digest.update(len(content).to_bytes(4, "big") + content)
    return f"fold-{digest.hexdigest()[:20]}"


def labels(ref: Ref) -> dict[str, str]:
    """What it is of, in words that a selector can name."""
    of = {pods.TENANT: ref.tenant, pods.MODEL: ref.model, pods.VERSION: str(ref.version)}
    return pods.labels(COMPONENT, **of)


def ref_of(labelled: dict[str, str]) -> Ref | None:
    """The version whose labels these are; ``None`` for anything that is not ours."""
    try:
        return Ref(labelled[pods.TENANT], labelled[pods.MODEL], int(labelled[pods.VERSION]))
    except (KeyError, ValueError):
        return None


def account_name(tenant: str) -> str:
    """Service account of a tenant's jobs; the key service reads the tenant from it."""
    return f"materializer-{tenant}"


def service_account(settings: Materializer, tenant: str) -> Manifest:
    """The account, whose API token no pod gets by itself."""
    return {
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": {
            "name": account_name(tenant),
            "namespace": settings.namespace,
            "labels": pods.labels(COMPONENT, **{pods.TENANT: tenant}),
        },
        "automountServiceAccountToken": False,
    }


def config_map(settings: Materializer, making: Making) -> Manifest:
    """The task, as ``anamorph materialize --task`` and ``anamorph parts --task`` read it; no secret in it."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": metadata(settings, making.ref),
        "immutable": True,
        "data": {TASK_KEY: json.dumps(task(settings, making), sort_keys=True, indent=1) + "\n"},
    }


def metadata(settings: Materializer, ref: Ref, suffix: str = "") -> Manifest:
    """Name, namespace and labels of one of its objects."""
    return {"name": name(ref) + suffix, "namespace": settings.namespace, "labels": labels(ref)}


def task(settings: Materializer, making: Making) -> dict[str, object]:
    """What is to be made."""
    ref, model = making.ref, making.model
    alone = settings.parts == 1
    return {
        "keysvc": settings.keysvc,
        "tenant": ref.tenant,
        "model": ref.model,
        "version": ref.version,
        "store": settings.storage.uri,
        "scratch": f"{WORK if alone else SHARED}/scratch",
        "base": model.base,
        "profile": model.profile,
        "dtype": model.dtype,
        "allow_base": list(settings.allow_base),
        **({} if alone else {"parts": settings.parts}),
    }


def scratch_mib(settings: Materializer, making: Making) -> int:
    """Memory that a pod's scratch may take: the base as it is fetched and, in one piece, the replica."""
    if making.size is None:
        return mib(settings.scratch)
    copies = 2 if settings.parts == 1 else 1
    return copies * -(-making.size.weights // _MIB) + _SLACK_MIB


def mib(quantity: str) -> int:
    """A quantity of memory in MiB, rounded up."""
    return -(-int(parse_quantity(quantity)) // _MIB)
