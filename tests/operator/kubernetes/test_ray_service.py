"""The RayService of a serving cluster: what Ray is told, what its pods hold and what they do not."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from tests.operator.kubernetes.manifests import ALL, COMPUTE, SCALING, SECURED, cluster

from anamorph.serve.cluster.renewal import FOLDER
from anamorph.wire.serving import DoorState, EngineSettings, KeyState
from anamorph_operator.kubernetes.build import ray_volumes
from anamorph_operator.kubernetes.build.ray_group import Compute
from anamorph_operator.kubernetes.build.ray_service import applications_of, ray_service
from anamorph_operator.kubernetes.build.serve_config import (
    FIRST,
    cache,
    dashboard_url,
    serve_config,
    serve_url,
)
from anamorph_operator.ray_serve import _deployed, from_config
from anamorph_operator.state import Application, AppStatus

CASES: dict[str, tuple[dict[str, Any], Compute]] = {
    "smallest": ({}, COMPUTE),
    "all": (ALL, SECURED),
    "scaling": (SCALING, SECURED),
}
Object = dict[str, Any]


def ray_cluster(changes: Object, compute: Compute = COMPUTE) -> Object:
    made = ray_service("main", cluster(**changes), compute)
    return dict(made["spec"]["rayClusterConfig"])


def templates(of: Object) -> list[Object]:
    return [group["template"]["spec"] for group in (of["headGroupSpec"], *of.get("workerGroupSpecs", ()))]


def containers(of: Object) -> list[Object]:
    return [one for spec in templates(of) for one in (*spec["containers"], *spec.get("initContainers", ()))]


@pytest.mark.parametrize("case", CASES)
def test_no_pod_of_ray_gets_a_service_accounts_token(case: str) -> None:
    """Not even the head's, where the autoscaler needs one: it alone mounts it."""
    made = ray_cluster(*CASES[case])
    assert all(spec["automountServiceAccountToken"] is False for spec in templates(made))
    mounted = {mount["name"] for one in containers(made) for mount in one["volumeMounts"]}
    assert "account" not in mounted
    scaling = made.get("autoscalerOptions", {"volumeMounts": []})["volumeMounts"]
    assert ("account" in {mount["name"] for mount in scaling}) is (case == "scaling")


@pytest.mark.parametrize("case", CASES)
def test_every_container_is_restricted(case: str) -> None:
    made = ray_cluster(*CASES[case])
    scaling = [made["autoscalerOptions"]] if "autoscalerOptions" in made else []
    for one in [*containers(made), *scaling]:
        assert one["securityContext"]["readOnlyRootFilesystem"] is True
        assert one["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert all(spec["securityContext"]["runAsNonRoot"] is True for spec in templates(made))


@pytest.mark.parametrize("case", CASES)
def test_every_mount_has_its_volume_and_every_volume_its_mount(case: str) -> None:
    made = ray_cluster(*CASES[case])
    groups = [made["headGroupSpec"], *made.get("workerGroupSpecs", ())]
    for group in groups:
        spec = group["template"]["spec"]
        mounts = [
            m["name"]
            for c in (*spec["containers"], *spec.get("initContainers", ()))
            for m in c["volumeMounts"]
        ]
        if group is groups[0]:
            mounts += [m["name"] for m in made.get("autoscalerOptions", {}).get("volumeMounts", ())]
        assert set(mounts) == {volume["name"] for volume in spec["volumes"]}


@pytest.mark.parametrize("case", CASES)
def test_the_same_cluster_gives_the_same_manifest(case: str) -> None:
    changes, compute = CASES[case]
    first, second = (json.dumps(ray_service("main", cluster(**changes), compute)) for _ in range(2))
    assert first == second


def test_every_call_to_ray_needs_the_token() -> None:
    assert ray_cluster({})["authOptions"] == {"mode": "token", "secretName": "ray-token"}


def test_nothing_is_reported_to_rays_makers() -> None:
    for one in (spec["containers"][0] for spec in templates(ray_cluster(ALL))):
        assert {"name": "RAY_USAGE_STATS_ENABLED", "value": "0"} in one["env"]


def test_the_heads_state_outlives_it_where_redis_is_given() -> None:
    assert "gcsFaultToleranceOptions" not in ray_cluster({})
    assert ray_cluster(ALL)["gcsFaultToleranceOptions"] == {
        "redisAddress": "redis.anamorph.svc:6379",
        "redisPassword": {"valueFrom": {"secretKeyRef": {"name": "redis", "key": "password"}}},
    }


def test_replicas_are_on_workers_if_there_are_any() -> None:
    """So they outlive the head, and requests go past it."""
    alone, with_workers = ray_cluster({}), ray_cluster(ALL)
    assert alone["headGroupSpec"]["rayStartParams"]["num-cpus"] == "1"
    assert with_workers["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for changes, location in (({}, "HeadOnly"), (ALL, "EveryNode")):
        made = ray_service("main", cluster(**changes), COMPUTE)["spec"]
        assert made["excludeHeadPodFromServeSvc"] is (location == "EveryNode")
        config = json.loads(serve_config(cluster(**changes), COMPUTE, FIRST))
        assert config["proxy_location"] == location


def test_a_group_announces_what_its_pods_have() -> None:
    gpu, cpu = ray_cluster(ALL)["workerGroupSpecs"]
    params = gpu["rayStartParams"]
    assert (params["num-cpus"], params["num-gpus"]) == ("7", "1")
    custom = params["resources"]
    assert custom[0] == custom[-1] == "'"  # KubeRay hands it to a shell
    assert json.loads(custom[1:-1]) == {"accelerator_type:H100": 1, "anamorph_memory_mib": 78 * 1024}
    assert "resources" not in cpu["rayStartParams"]
    limits = {"memory": "64Gi", "nvidia.com/gpu": "1"}
    found = gpu["template"]["spec"]["containers"][0]["resources"]
    assert found == {"requests": {"cpu": "7500m", **limits}, "limits": limits}


def test_ray_may_count_more_cpus_than_are_kept_for_it() -> None:
    [made] = ray_cluster({"ray.workerGroups": [{"name": "small", "logicalCpus": 6}]})["workerGroupSpecs"]
    assert made["rayStartParams"]["num-cpus"] == "6"
    assert made["template"]["spec"]["containers"][0]["resources"]["requests"]["cpu"] == "1"


def test_a_group_goes_where_it_is_told() -> None:
    gpu, _ = ray_cluster(ALL)["workerGroupSpecs"]
    spec = gpu["template"]["spec"]
    assert spec["nodeSelector"] == {"pool": "gpu"}
    assert spec["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    assert spec["priorityClassName"] == "serving"


def test_only_a_scaling_cluster_has_room_to_scale() -> None:
    fixed, _ = ray_cluster(ALL)["workerGroupSpecs"]
    [scaling] = ray_cluster(SCALING)["workerGroupSpecs"]
    bounds = ("replicas", "minReplicas", "maxReplicas")
    assert [fixed[name] for name in bounds] == [2, 2, 2]
    assert [scaling[name] for name in bounds] == [2, 2, 4]
    assert "enableInTreeAutoscaling" not in ray_cluster(ALL)
    assert ray_cluster(SCALING)["enableInTreeAutoscaling"] is True


def test_a_change_never_builds_a_second_cluster() -> None:
    assert ray_service("main", cluster(), COMPUTE)["spec"]["upgradeStrategy"] == {"type": "None"}


def test_serve_answers_by_https_where_a_certificate_is_given() -> None:
    """The probe of a worker too, as KubeRay's own knows no HTTPS."""
    for compute, scheme in ((COMPUTE, "http"), (SECURED, "https")):
        options = json.loads(serve_config(cluster(**ALL), compute, FIRST))["http_options"]
        assert ("ssl_certfile" in options) is (scheme == "https")
        worker = ray_cluster(ALL, compute)["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]
        assert worker["readinessProbe"]["httpGet"]["scheme"] == scheme.upper()
        assert serve_url("main", cluster(**ALL), compute).startswith(scheme + "://")


def test_the_files_of_https_are_mounted() -> None:
    options = json.loads(serve_config(cluster(), SECURED, FIRST))["http_options"]
    paths = {m["mountPath"] for m in templates(ray_cluster({}, SECURED))[0]["containers"][0]["volumeMounts"]}
    folder = options["ssl_certfile"].rpartition("/")[0]
    assert {folder, ray_volumes.CACHE, "/tmp"} <= paths
    # Mounted as a whole, a renewed one comes into the pod, and the proxy is told where to look for it.
    for spec in templates(ray_cluster(ALL, SECURED)):
        [ray] = spec["containers"][:1]
        assert {"name": FOLDER, "value": folder} in ray["env"]
        assert all("subPath" not in mount for mount in ray["volumeMounts"])
    assert FOLDER not in {one["name"] for one in templates(ray_cluster({}))[0]["containers"][0]["env"]}


def test_each_pod_makes_its_own_certificate_for_rays_traffic() -> None:
    """Peers verify addresses. Ray sees the certificate, and not the authority's key."""
    for spec in templates(ray_cluster(ALL, SECURED)):
        [maker] = spec["initContainers"]
        assert "ray-ca" in {mount["name"] for mount in maker["volumeMounts"]}
        ray = spec["containers"][0]
        assert "ray-ca" not in {mount["name"] for mount in ray["volumeMounts"]}
        env = {one["name"]: one.get("value") for one in ray["env"]}
        assert env["RAY_USE_TLS"] == "1"
        assert env["RAY_TLS_SERVER_CERT"] == f"{ray_volumes.RAY_TLS}/tls.crt"
    assert "initContainers" not in templates(ray_cluster(ALL))[0]


def test_the_cache_has_a_bound_and_a_folder_in_its_volume() -> None:
    spec = cluster(cacheBytes=10 * 2**30)
    [cached] = [
        v for v in templates(ray_cluster({"cacheBytes": 10 * 2**30}))[0]["volumes"] if v["name"] == "cache"
    ]
    assert cached["emptyDir"] == {"sizeLimit": "20480Mi"}
    assert cache(spec).folder == f"{ray_volumes.CACHE}/replicas"  # the volume itself is the node's
    assert cache(spec).limit_bytes == 10 * 2**30


def test_applications_come_back_as_they_were_written() -> None:
    """What Ray reports of our list is what we wanted: so a settled cluster is not written again."""
    settings = EngineSettings(tenant="acme", model="chat", version=1, replica="s3://r/1", context_length=64)
    apps = (*FIRST, Application("acme.chat.v1", "/acme/chat/v1", settings, KeyState(status="gone")))
    listed = json.loads(serve_config(cluster(), COMPUTE, apps))["applications"]
    assert tuple(from_config(one) for one in listed) == apps


def test_the_first_write_has_a_door() -> None:
    """A RayService without applications never becomes ready."""
    [door] = json.loads(serve_config(cluster(), COMPUTE, FIRST))["applications"]
    details = {"status": "RUNNING", "deployed_app_config": door, "last_deployed_time_s": 1.0}
    deployed = _deployed(door["name"], details)
    assert (deployed.status, deployed.deployed_at) == (AppStatus.RUNNING, datetime.fromtimestamp(1, UTC))
    assert deployed.application is not None
    assert deployed.application.state == DoorState()


def test_a_thousand_applications_fit_an_object_of_etcd() -> None:
    settings = EngineSettings(
        tenant="acme",
        model="chat-with-a-long-name",
        version=1,
        replica="s3://replicas-of-everybody/all/acme/chat-with-a-long-name/v1",
        key_id="acme.chat-with-a-long-name.v1." + "0" * 16,
        public_key="A" * 44,
        manifest_sha256="0" * 64,
        context_length=2048,
    )
    app = Application("acme.chat-with-a-long-name.v1", "/acme/chat-with-a-long-name/v1", settings, KeyState())
    many = (replace(app, name=f"{app.name}{number}") for number in range(1000))
    assert len(serve_config(cluster(), COMPUTE, many)) < 2**20


def test_the_list_alone_says_nothing_of_the_cluster() -> None:
    """Two field managers: the pods' never takes away what the list's wrote, nor the reverse."""
    assert set(applications_of("main", COMPUTE, "{}")["spec"]) == {"serveConfigV2"}
    assert "serveConfigV2" not in ray_service("main", cluster(), COMPUTE)["spec"]
    assert ray_service("main", cluster(), COMPUTE, "{}")["spec"]["serveConfigV2"] == "{}"


def test_where_ray_is_found() -> None:
    """A lone head by its own Service: KubeRay takes it into the other only after a probe in the clear."""
    assert serve_url("main", cluster(), SECURED) == "https://main-head-svc.anamorph-compute.svc:8000"
    assert serve_url("main", cluster(**ALL), COMPUTE) == "http://main-serve-svc.anamorph-compute.svc:8000"
    assert dashboard_url("main", cluster(), COMPUTE) == "http://main-head-svc.anamorph-compute.svc:8265"


def test_an_existing_cluster_is_found_where_it_says_and_gets_no_pods() -> None:
    urls = {"dashboardUrl": "http://ray:8265", "serveUrl": "http://ray:8000"}
    spec = cluster(existing=urls)
    existing = spec.model_copy(update={"ray": None})
    assert serve_url("main", existing, COMPUTE) == "http://ray:8000"
    assert dashboard_url("main", existing, COMPUTE) == "http://ray:8265"
    assert cache(existing).folder is None
    with pytest.raises(ValueError, match="existing"):
        ray_service("main", existing, COMPUTE)
