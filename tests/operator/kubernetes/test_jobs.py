"""Materialisation Jobs on a real API server; the tests write what Kubernetes' controllers would."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from kubernetes import client as kubernetes_client
from tests.operator.kubernetes.conftest import Kubernetes
from tests.servers.kubeconfig import write_kubeconfig

from anamorph import errors
from anamorph.wire.admin import ModelRead
from anamorph_operator.kubernetes.api import Api, Client, configuration
from anamorph_operator.kubernetes.catalogue import CONFIG_MAPS, JOBS, SERVICE_ACCOUNTS
from anamorph_operator.kubernetes.jobs import KubernetesJobs, Materialization
from anamorph_operator.state import Job, Ref

pytestmark = pytest.mark.real

Object = dict[str, Any]
REF = Ref("acme", "smol", 3)
ENDED = datetime(2026, 1, 1, 12, tzinfo=UTC)


class Site:
    """A namespace for jobs, the driver's view of it, and the hand of Kubernetes' controllers."""

    def __init__(self, kubernetes: Kubernetes, client: Client) -> None:
        self.namespace = kubernetes.namespace()
        self.client = client
        self.batch = kubernetes_client.BatchV1Api(kubernetes.server.admin)
        self.core = kubernetes_client.CoreV1Api(kubernetes.server.admin)
        self.core.create_namespaced_service_account(self.namespace, {"metadata": {"name": "default"}})
        self.stages = ["fold-0"]
        self.jobs = self.driver()

    def driver(self, cluster: str = "main") -> KubernetesJobs:
        return KubernetesJobs(Api(self.client), self.namespace, cluster, self.build, ref_of)

    async def build(self, ref: Ref, model: ModelRead) -> Materialization:
        assert (ref.tenant, ref.model) == (model.tenant, model.id)
        mounted = {"apiVersion": "v1", "kind": "ConfigMap", "data": {"task": str(ref.version)}}
        return Materialization(
            account=self.named("v1", "ServiceAccount", "materializer-acme"),
            mounted=(self.named("v1", "ConfigMap", "fold-0") | mounted,),
            stages=tuple(self.job(name, ref) for name in self.stages),
        )

    def named(self, version: str, kind: str, name: str) -> Object:
        return {
            "apiVersion": version,
            "kind": kind,
            "metadata": {"name": name, "namespace": self.namespace, "labels": {}},
        }

    def job(self, name: str, ref: Ref) -> Object:
        made = self.named("batch/v1", "Job", name)
        made["metadata"]["labels"] = {"of": f"{ref.tenant}.{ref.model}.{ref.version}"}
        pod = {"restartPolicy": "Never", "containers": [{"name": "materialize", "image": "none"}]}
        indexed = {"completionMode": "Indexed", "completions": 2} if name != self.stages[-1] else {}
        return made | {"spec": {"template": {"spec": pod}, "backoffLimit": 4, **indexed}}

    def read(self, name: str = "fold-0") -> Object:
        return self.client.get(JOBS, self.namespace, name)

    def end(self, name: str, kind: str, reason: str = "", **counts: int) -> None:
        before = {"Complete": "SuccessCriteriaMet", "Failed": "FailureTarget"}[kind]
        times = {"lastTransitionTime": ENDED.isoformat(), "lastProbeTime": ENDED.isoformat()}
        status: Object = {
            "startTime": ENDED.isoformat(),
            "conditions": [
                {"type": one, "status": "True", "reason": reason, **times} for one in (before, kind)
            ],
            **counts,
        }
        if kind == "Complete":
            status["completionTime"] = ENDED.isoformat()
        self.batch.patch_namespaced_job_status(name, self.namespace, {"status": status})

    def pod(self, job: str, exit_code: int) -> None:
        name = f"{job}-{exit_code}"
        spec = self.job(job, REF)["spec"]["template"]["spec"]
        labels = {"batch.kubernetes.io/job-name": job}
        self.core.create_namespaced_pod(
            self.namespace, {"metadata": {"name": name, "labels": labels}, "spec": spec}
        )
        terminated = {"exitCode": exit_code, "finishedAt": f"2026-01-01T00:00:{exit_code:02d}Z"}
        of = {"name": "materialize", "image": "none", "imageID": "", "ready": False, "restartCount": 0}
        status = {"phase": "Failed", "containerStatuses": [{**of, "state": {"terminated": terminated}}]}
        self.core.patch_namespaced_pod_status(name, self.namespace, {"status": status})

    def collect(self, name: str) -> None:
        """What the garbage collector does at the end of a foreground deletion."""
        self.batch.patch_namespaced_job(name, self.namespace, {"metadata": {"finalizers": None}})


def ref_of(labels: dict[str, str]) -> Ref | None:
    tenant, model, version = labels["of"].split(".")
    return Ref(tenant, model, int(version))


@pytest.fixture
def site(kubernetes: Kubernetes, tmp_path: Path) -> Iterator[Site]:
    client = Client(configuration(write_kubeconfig(kubernetes.server, tmp_path / "config")))
    yield Site(kubernetes, client)
    client.close()


async def test_a_job_runs_with_what_it_mounts_and_takes_it_along(site: Site, model: ModelRead) -> None:
    await site.jobs.start(REF, model)
    job = site.read()
    assert job["spec"]["suspend"] is False
    [owner] = site.client.get(CONFIG_MAPS, site.namespace, "fold-0")["metadata"]["ownerReferences"]
    assert owner["uid"] == job["metadata"]["uid"]
    account = site.client.get(SERVICE_ACCOUNTS, site.namespace, "materializer-acme")
    assert "ownerReferences" not in account["metadata"]
    assert await site.jobs.observe() == {REF: Job(True, 0)}


async def test_a_second_start_changes_nothing(site: Site, model: ModelRead) -> None:
    """Another operator, who has not looked yet, finds the Job by its name."""
    await site.jobs.start(REF, model)
    before = site.read()
    await site.driver().start(REF, model)
    assert site.read()["metadata"]["resourceVersion"] == before["metadata"]["resourceVersion"]


async def test_what_a_dead_operator_left_half_done_goes_on(
    site: Site, model: ModelRead, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def die(*_: Any, **__: Any) -> Object:
        raise errors.Unavailable("dead")

    with monkeypatch.context() as patch:
        patch.setattr(site.jobs, "_begin", die)
        with pytest.raises(errors.Unavailable):
            await site.jobs.start(REF, model)
    assert site.read()["spec"]["suspend"] is True
    assert await site.driver().observe() == {REF: Job(False, 0)}
    await site.driver().start(REF, model)
    assert await site.driver().observe() == {REF: Job(True, 0)}
    assert site.client.get(CONFIG_MAPS, site.namespace, "fold-0")["data"] == {"task": "3"}


async def test_failed_pods_are_attempts_while_it_goes_on(site: Site, model: ModelRead) -> None:
    await site.jobs.start(REF, model)
    site.batch.patch_namespaced_job_status("fold-0", site.namespace, {"status": {"failed": 2, "active": 1}})
    assert await site.jobs.observe() == {REF: Job(True, 2)}


async def test_a_refusal_is_known_by_its_exit_code(site: Site, model: ModelRead) -> None:
    await site.jobs.start(REF, model)
    site.pod("fold-0", 1)
    site.pod("fold-0", 3)
    site.end("fold-0", "Failed", "PodFailurePolicy", failed=2)
    assert await site.jobs.observe() == {REF: Job(False, 2, 3, ENDED)}
    assert await site.driver().observe() == {REF: Job(False, 2, 3, ENDED)}


async def test_a_job_that_ran_out_of_time_counts_and_is_tried_again(site: Site, model: ModelRead) -> None:
    """Attempts are not counted anew by the next Job, nor by the next operator."""
    await site.jobs.start(REF, model)
    first = site.read()
    site.end("fold-0", "Failed", "DeadlineExceeded")
    assert await site.jobs.observe() == {REF: Job(False, 1, None, ENDED)}
    await site.jobs.start(REF, model)
    second = site.read()
    assert second["metadata"]["uid"] != first["metadata"]["uid"]
    site.batch.patch_namespaced_job_status("fold-0", site.namespace, {"status": {"failed": 2}})
    assert await site.driver().observe() == {REF: Job(True, 3)}


async def test_a_job_that_staged_nothing_is_a_failed_attempt(site: Site, model: ModelRead) -> None:
    await site.jobs.start(REF, model)
    site.end("fold-0", "Complete", succeeded=1)
    assert await site.jobs.observe() == {REF: Job(False, 1, 0, ENDED)}
    await site.jobs.start(REF, model)
    assert await site.jobs.observe() == {REF: Job(True, 1)}


async def test_stages_follow_each_other(site: Site, model: ModelRead) -> None:
    """The first one's failed pods do not count against the second."""
    site.stages = ["fold-0", "fold-0-finish"]
    await site.jobs.start(REF, model)
    assert await site.jobs.observe() == {REF: Job(True, 0)}
    site.end("fold-0", "Complete", succeeded=2, failed=3)
    assert await site.jobs.observe() == {REF: Job(False, 0, 0, ENDED)}
    await site.jobs.start(REF, model)
    assert await site.jobs.observe() == {REF: Job(True, 0)}
    owners = site.client.get(CONFIG_MAPS, site.namespace, "fold-0")["metadata"]["ownerReferences"]
    assert {owner["name"] for owner in owners} == {"fold-0", "fold-0-finish"}
    site.end("fold-0-finish", "Failed", "BackoffLimitExceeded", failed=5)
    assert await site.jobs.observe() == {REF: Job(False, 5, None, ENDED)}


async def test_what_is_stopped_is_seen_until_its_pods_are_gone(site: Site, model: ModelRead) -> None:
    await site.jobs.start(REF, model)
    await site.jobs.observe()
    await site.jobs.stop(REF)
    assert (await site.jobs.observe())[REF].running
    await site.jobs.start(REF, model)  # nothing begins beside it
    await site.jobs.stop(REF)
    site.collect("fold-0")
    assert await site.jobs.observe() == {}
    await site.jobs.start(REF, model)
    assert await site.jobs.observe() == {REF: Job(True, 0)}


async def test_another_cluster_s_jobs_are_its_own(site: Site, model: ModelRead) -> None:
    await site.driver("other").start(REF, model)
    assert await site.jobs.observe() == {}
    assert set(await site.driver("other").observe()) == {REF}


async def test_a_successor_s_job_is_not_deleted_for_its_predecessor(site: Site, model: ModelRead) -> None:
    """By its name it would be; what is stopped is the very Job that was seen."""
    await site.jobs.start(REF, model)
    await site.jobs.observe()
    site.batch.delete_namespaced_job("fold-0", site.namespace, propagation_policy="Background")
    await site.driver().start(REF, model)
    with pytest.raises(errors.Conflict):
        await site.jobs.stop(REF)
    assert "deletionTimestamp" not in site.read()["metadata"]


async def test_nothing_ends_with_the_operator(site: Site, model: ModelRead) -> None:
    await site.jobs.start(REF, model)
    before = deepcopy(site.read())
    await site.jobs.close()
    assert site.read() == before
