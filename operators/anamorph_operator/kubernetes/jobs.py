"""Materialisation as Kubernetes Jobs, which outlive the operator.

Kubernetes replaces pods that fail; what is left to the plan is a Job that has ended. Another attempt is a
Job of the same name, which knows by an annotation how many failed before it. Each is created suspended,
gets what it mounts, which goes with it, and only then begins: whoever dies in between leaves nothing
that waits for ever, and nothing that stays.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from anamorph import errors
from anamorph.wire.admin import ModelRead
from anamorph_operator.kubernetes.api import Propagation
from anamorph_operator.kubernetes.build.pods import CLUSTER, owned
from anamorph_operator.kubernetes.catalogue import JOBS, PODS, Object, Resource
from anamorph_operator.kubernetes.resources.part import GROUP
from anamorph_operator.state import Job, Ref

ATTEMPTS = f"{GROUP}/attempts"
"""Annotation of a Job: attempts that failed before it."""
_JOB_NAME = "batch.kubernetes.io/job-name"


class Calls(Protocol):
    """What is needed of ``api.Api``."""

    async def get(self, resource: Resource, namespace: str | None, name: str) -> Object: ...

    async def list(self, resource: Resource, namespace: str | None, labels: str = "") -> list[Object]: ...

    async def create(self, body: Object) -> Object: ...

    async def merge(self, body: Object) -> Object: ...

    async def apply(self, body: Object, *, force: bool = False) -> Object: ...

    async def delete(
        self,
        resource: Resource,
        namespace: str,
        name: str,
        *,
        uid: str | None = None,
        propagation: Propagation = "Background",
    ) -> None: ...


@dataclass(frozen=True)
class Materialization:
    """The objects of one materialisation.

    Args:
        account: the service account of its pods; it stays.
        mounted: what they mount.
        stages: its Jobs; each begins when the one before is complete.
    """

    account: Object
    mounted: tuple[Object, ...]
    stages: tuple[Object, ...]


class KubernetesJobs:
    """The Jobs of one serving cluster.

    Args:
        namespace: of all Jobs.
        cluster: name of the serving cluster, which marks its Jobs.
        build: the objects of a version's materialisation; always the same for the same version.
        ref_of: the version that labels name.
    """

    def __init__(
        self,
        api: Calls,
        namespace: str,
        cluster: str,
        build: Callable[[Ref, ModelRead], Awaitable[Materialization]],
        ref_of: Callable[[dict[str, str]], Ref | None],
    ) -> None:
        self._api = api
        self._namespace = namespace
        self._cluster = cluster
        self._build = build
        self._ref_of = ref_of
        self._standing: dict[Ref, list[Object]] = {}
        self._exit_codes: dict[str, int | None] = {}

    async def observe(self) -> Mapping[Ref, Job]:
        """Every Job of the cluster that Kubernetes has, whoever started it.

        Raises:
            Unavailable: the API server does not answer.
            Forbidden: the operator may not list Jobs or pods.
        """
        listed = await self._api.list(JOBS, self._namespace, f"{CLUSTER}={self._cluster}")
        self._standing = {}
        for found in listed:
            ref = self._ref_of(found["metadata"].get("labels", {}))
            if ref is not None:
                self._standing.setdefault(ref, []).append(found)
        return {ref: await self._seen(jobs) for ref, jobs in self._standing.items()}

    async def start(self, ref: Ref, model: ModelRead) -> None:
        """Begin the first Job that has not succeeded; one that runs is left alone.

        Raises:
            Unavailable: the API server does not answer.
            Forbidden, Unprocessable: it refuses an object; the message says which and why.
        """
        wanted = await self._build(ref, model)
        await self._api.apply(wanted.account, force=True)
        jobs: list[Object] = []
        for stage in wanted.stages:
            last = stage is wanted.stages[-1]
            job = await self._stand(stage, last)
            jobs.append(job)
            if last or not _complete(job):
                return await self._begin(job, jobs, wanted.mounted)
        return None

    async def stop(self, ref: Ref) -> None:
        """End a version's Jobs and what they mount; they are seen until their pods are gone."""
        ending = [job for job in self._standing.get(ref, []) if not _deleted(job)]
        await asyncio.gather(*(self._delete(job, "Foreground") for job in ending))

    async def close(self) -> None:
        """Nothing ends: the next operator finds what runs."""

    async def _stand(self, stage: Object, last: bool) -> Object:
        """The Job of a stage as it is to go on: the one that is there, or a new one, suspended."""
        name, failed = stage["metadata"]["name"], 0
        with suppress(errors.NotFound):
            standing = await self._api.get(JOBS, self._namespace, name)
            if _deleted(standing) or not _over(standing, last):
                return standing
            failed = _attempts(standing)
            await self._delete(standing, "Background")
        return await self._api.create(_attempt(stage, failed, self._cluster))

    async def _begin(self, job: Object, jobs: Sequence[Object], mounted: Sequence[Object]) -> None:
        if _deleted(job) or not job["spec"].get("suspend"):
            return
        for one in mounted:
            await self._api.apply(owned(one, *jobs), force=True)
        await self._api.merge(_resumed(job))

    async def _delete(self, job: Object, propagation: Propagation) -> None:
        metadata = job["metadata"]
        await self._api.delete(
            JOBS, self._namespace, metadata["name"], uid=metadata["uid"], propagation=propagation
        )

    async def _seen(self, jobs: list[Object]) -> Job:
        """How a version stands by the newest of its Jobs."""
        job = max(jobs, key=lambda one: (one["metadata"]["creationTimestamp"], one["metadata"]["name"]))
        if any(_running(one) for one in jobs):
            return Job(True, _attempts(job))
        code = 0 if _complete(job) else await self._exit_code(job)
        return Job(False, _attempts(job), code, _ended_at(job))

    async def _exit_code(self, job: Object) -> int | None:
        """Exit status of the latest of a failed Job's containers, where one of its pods is left."""
        uid, name = job["metadata"]["uid"], job["metadata"]["name"]
        if _condition(job, "Failed") is None:
            return None
        if uid not in self._exit_codes:
            pods = await self._api.list(PODS, self._namespace, f"{_JOB_NAME}={name}")
            self._exit_codes[uid] = _latest(pods)
        return self._exit_codes[uid]


def _attempt(stage: Object, failed: int, cluster: str) -> Object:
    """A Job that waits for what it mounts."""
    metadata = stage["metadata"]
    annotations = {**metadata.get("annotations", {}), ATTEMPTS: str(failed)}
    labels = {**metadata["labels"], CLUSTER: cluster}
    return {
        **stage,
        "metadata": {**metadata, "labels": labels, "annotations": annotations},
        "spec": {**stage["spec"], "suspend": True},
    }


def _resumed(job: Object) -> Object:
    metadata = {key: job["metadata"][key] for key in ("name", "namespace", "uid")}
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": {"suspend": False}}


def _condition(job: Object, kind: str) -> Object | None:
    conditions = job.get("status", {}).get("conditions") or []
    return next((one for one in conditions if one["type"] == kind and one["status"] == "True"), None)


def _complete(job: Object) -> bool:
    return _condition(job, "Complete") is not None


def _deleted(job: Object) -> bool:
    return "deletionTimestamp" in job["metadata"]


def _over(job: Object, last: bool) -> bool:
    """Whether a Job needs another attempt; the plan starts none for a version that is staged."""
    return _condition(job, "Failed") is not None or (last and _complete(job))


def _running(job: Object) -> bool:
    """Also one that is being deleted: its pods may still be there."""
    ended = _complete(job) or _condition(job, "Failed") is not None
    return _deleted(job) or not (ended or job["spec"].get("suspend"))


def _attempts(job: Object) -> int:
    """Attempts that failed: none of a stage that is complete; the last stage failed if it staged nothing."""
    before = int(job["metadata"].get("annotations", {}).get(ATTEMPTS, "0"))
    if _complete(job):
        return before + (0 if job["spec"].get("completionMode") == "Indexed" else 1)
    failed = int(job.get("status", {}).get("failed") or 0)
    return before + (max(failed, 1) if _condition(job, "Failed") else failed)


def _ended_at(job: Object) -> datetime | None:
    ended = _condition(job, "Complete") or _condition(job, "Failed")
    return None if ended is None else datetime.fromisoformat(ended["lastTransitionTime"])


def _latest(pods: Sequence[Object]) -> int | None:
    ended = [
        (status["state"]["terminated"]["finishedAt"], int(status["state"]["terminated"]["exitCode"]))
        for pod in pods
        for status in pod.get("status", {}).get("containerStatuses") or []
        if "terminated" in status.get("state", {})
    ]
    return max(ended)[1] if ended else None
