"""The Jobs of one materialisation.

In one piece it is one Job. In parts an Indexed Job folds, and when it is complete a second Job
publishes; both see one volume. Whoever is evicted is replaced and does not count; whoever refuses ends
the Job at once.
"""

from __future__ import annotations

from typing import Any

from anamorph_operator.kubernetes.build import materialization as made
from anamorph_operator.kubernetes.build import pods
from anamorph_operator.kubernetes.build.materialization import Making, Materializer
from anamorph_operator.kubernetes.build.pods import Manifest

CONTAINER = "materialize"
FINISH = "-finish"
"""Ending of the name of the Job that publishes what parts have folded."""
TASK_MOUNT = "/etc/anamorph/task"
TOKEN_MOUNT = "/var/run/secrets/anamorph"  # noqa: S105 - where the token is
TOKEN_SECONDS = 600
# Exit codes of a job for which no other attempt makes sense: a malformed order, a refusal.
FINAL_EXIT_CODES = (2, 3)

_TASK = f"{TASK_MOUNT}/{made.TASK_KEY}"
_OPTIONS = ["--task", _TASK, "--token-file", f"{TOKEN_MOUNT}/token"]


def whole(settings: Materializer, making: Making) -> Manifest:
    """The Job of a materialisation in one piece."""
    return _job(settings, making, "", ["materialize", *_OPTIONS], {"backoffLimit": settings.attempts})


def fold(settings: Materializer, making: Making) -> Manifest:
    """The Indexed Job that folds, a pod for each part; an index that fails too often ends it."""
    indexed = {
        "completionMode": "Indexed",
        "completions": settings.parts,
        "parallelism": min(settings.parts, settings.parallel),
        "backoffLimitPerIndex": settings.attempts,
        "maxFailedIndexes": 0,
    }
    return _job(settings, making, "", ["parts", "fold", *_OPTIONS], indexed)


def finish(settings: Materializer, making: Making) -> Manifest:
    """The Job that publishes, once the parts are all there."""
    command = ["parts", "finish", *_OPTIONS]
    return _job(settings, making, FINISH, command, {"backoffLimit": settings.attempts})


def claim(settings: Materializer, making: Making) -> Manifest:
    """The volume that the pods of a materialisation in parts share; it goes with them, not before."""
    spec = {
        "accessModes": [settings.access_mode],
        "storageClassName": settings.storage_class,
        "resources": {"requests": {"storage": f"{made.scratch_mib(settings, making)}Mi"}},
    }
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": made.metadata(settings, making.ref),
        "spec": pods.present(spec),
    }


def _job(
    settings: Materializer, making: Making, suffix: str, command: list[str], attempts: Manifest
) -> Manifest:
    spec = {
        **attempts,
        "activeDeadlineSeconds": settings.deadline_s,
        "ttlSecondsAfterFinished": settings.keep_s,
        "podFailurePolicy": {"rules": _failure_rules()},
        "podReplacementPolicy": "Failed",
        "template": {
            "metadata": {"labels": made.labels(making.ref)},
            "spec": _pod(settings, making, command),
        },
    }
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": made.metadata(settings, making.ref, suffix),
        "spec": spec,
    }


def _failure_rules() -> list[Manifest]:
    codes = {"containerName": CONTAINER, "operator": "In", "values": list(FINAL_EXIT_CODES)}
    return [
        {"action": "FailJob", "onExitCodes": codes},
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
    ]


def _pod(settings: Materializer, making: Making, command: list[str]) -> Manifest:
    volumes, mounts = _volumes(settings, making)
    spec = {
        "restartPolicy": "Never",
        "serviceAccountName": made.account_name(making.ref.tenant),
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": pods.pod_security(),
        "imagePullSecrets": [{"name": secret} for secret in settings.pull_secrets],
        "priorityClassName": settings.priority_class,
        "nodeSelector": dict(settings.node_selector),
        "tolerations": [one.manifest() for one in settings.tolerations],
        "containers": [_container(settings, making, command, mounts)],
        "volumes": volumes,
    }
    return pods.present(spec)


def _container(
    settings: Materializer, making: Making, command: list[str], mounts: list[Manifest]
) -> Manifest:
    return {
        "name": CONTAINER,
        "image": settings.image,
        "imagePullPolicy": settings.pull_policy,
        "command": ["anamorph"],
        "args": command,
        "env": _env(settings),
        "resources": _resources(settings, making),
        "securityContext": pods.container_security(),
        "volumeMounts": mounts,
    }


def _env(settings: Materializer) -> list[Manifest]:
    values = {"HOME": made.WORK, "TMPDIR": made.WORK, "HF_HOME": f"{made.WORK}/hub"}
    if settings.ca_config_map is not None:
        values["ANAMORPH_CA_FILE"] = pods.CA_FILE
    return pods.variables(values) + pods.store_env(settings.storage, settings.ca_config_map)


def _resources(settings: Materializer, making: Making) -> Manifest:
    # What is written to memory counts against the limit of the container that writes it.
    memory = made.mib(settings.memory) + made.scratch_mib(settings, making)
    wanted = {"cpu": settings.cpu, "memory": f"{memory}Mi"}
    return {"requests": dict(wanted), "limits": {"memory": wanted["memory"]}}


def _volumes(settings: Materializer, making: Making) -> tuple[list[Manifest], list[Manifest]]:
    """Volumes of a pod, and where its container sees them."""
    ca, ca_mounts = pods.ca_volume(settings.ca_config_map)
    volumes = [
        {"name": "task", "configMap": {"name": made.name(making.ref), "defaultMode": pods.READABLE}},
        {"name": "token", "projected": {"sources": [_token(settings)], "defaultMode": pods.READABLE}},
        pods.memory_volume("work", f"{made.scratch_mib(settings, making)}Mi"),
        *ca,
    ]
    mounts = [
        _mount("task", TASK_MOUNT, read_only=True),
        _mount("token", TOKEN_MOUNT, read_only=True),
        _mount("work", made.WORK),
        *ca_mounts,
    ]
    for name, claim_name, path, read_only in _claims(settings, making):
        source = {"claimName": claim_name, **({"readOnly": True} if read_only else {})}
        volumes.append({"name": name, "persistentVolumeClaim": source})
        mounts.append(_mount(name, path, read_only=read_only))
    return volumes, mounts


def _claims(settings: Materializer, making: Making) -> list[tuple[str, str, str, bool]]:
    found = []
    if settings.bases_claim is not None:
        found.append(("bases", settings.bases_claim, made.BASES, True))
    if settings.parts > 1:
        found.append(("shared", made.name(making.ref), made.SHARED, False))
    return found


def _mount(name: str, path: str, *, read_only: bool = False) -> dict[str, Any]:
    return {"name": name, "mountPath": path, **({"readOnly": True} if read_only else {})}


def _token(settings: Materializer) -> Manifest:
    source = {"audience": settings.audience, "expirationSeconds": TOKEN_SECONDS, "path": "token"}
    return {"serviceAccountToken": source}
