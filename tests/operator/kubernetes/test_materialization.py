"""Jobs of a materialisation: what they are called, what they are told, what they may do."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.operator.kubernetes.manifests import FULL, MAKING, MODEL, PLAIN, REF

from anamorph.cli.parts import PartsTask
from anamorph.cli.task import Task
from anamorph.serve.cluster.sizing import Size
from anamorph_operator.kubernetes.build import jobs, pods
from anamorph_operator.kubernetes.build import materialization as made
from anamorph_operator.kubernetes.build.materialization import Making, Materializer
from anamorph_operator.state import Ref

PARTS = replace(FULL, parts=8)
LABELS = st.from_regex(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", fullmatch=True)


def pod(job: dict[str, Any]) -> dict[str, Any]:
    return dict(job["spec"]["template"]["spec"])


def container(job: dict[str, Any]) -> dict[str, Any]:
    [only] = pod(job)["containers"]
    return dict(only)


def mounts(job: dict[str, Any]) -> dict[str, Any]:
    return {mount["mountPath"]: mount for mount in container(job)["volumeMounts"]}


def volumes(job: dict[str, Any]) -> dict[str, Any]:
    return {volume["name"]: volume for volume in pod(job)["volumes"]}


def test_a_name_is_the_digest_of_its_version() -> None:
    """A fixed value: jobs of a former release must be found again."""
    assert made.name(REF) == "fold-e84d4afab013507d6416"


@given(LABELS, LABELS, st.integers(1, 10**9), LABELS, LABELS, st.integers(1, 10**9))
def test_no_two_versions_have_one_name(t1: str, m1: str, v1: int, t2: str, m2: str, v2: int) -> None:
    """Lengths are part of what is hashed: no tenant can take another's name by moving a border."""
    one, other = Ref(t1, m1, v1), Ref(t2, m2, v2)
    assert (made.name(one) == made.name(other)) == (one == other)
    assert made.name(Ref(t1 + m1[:1], m1[1:], v1)) != made.name(one)


@given(LABELS, LABELS, st.integers(1, 10**9))
def test_labels_say_the_version(tenant: str, model: str, version: int) -> None:
    ref = Ref(tenant, model, version)
    assert made.ref_of(made.labels(ref)) == ref
    assert all(len(value) <= 63 for value in made.labels(ref).values())


@pytest.mark.parametrize("labels", [{}, {pods.TENANT: "a", pods.MODEL: "b", pods.VERSION: "x"}])
def test_what_is_not_ours_is_no_version(labels: dict[str, str]) -> None:
    assert made.ref_of(labels) is None


def test_the_task_is_one_that_a_job_reads() -> None:
    """In one piece and in parts; the commands refuse a field that they do not know."""
    whole = made.config_map(FULL, MAKING)["data"][made.TASK_KEY]
    assert Task.model_validate_json(whole).name == "acme/chat/v3"
    parts = made.config_map(PARTS, MAKING)["data"][made.TASK_KEY]
    assert PartsTask.model_validate_json(parts).parts == 8
    assert json.loads(parts)["scratch"].startswith(made.SHARED)


def test_a_task_holds_no_secret() -> None:
    """It names what it needs by place: a ConfigMap is readable by many."""
    assert not set(made.task(FULL, MAKING)) & {"grant", "token", "key", "secret", "password"}


@pytest.mark.parametrize("settings", [PLAIN, FULL, PARTS], ids=["plain", "full", "parts"])
def test_the_same_input_gives_the_same_manifest(settings: Materializer) -> None:
    """Written again, nothing changes."""
    for build in (jobs.whole, jobs.fold, jobs.finish, jobs.claim, made.config_map):
        assert json.dumps(build(settings, MAKING)) == json.dumps(build(settings, MAKING))


@pytest.mark.parametrize("build", [jobs.whole, jobs.fold, jobs.finish])
def test_a_refusal_ends_a_job_and_an_eviction_does_not_count(build: Any) -> None:
    refused, evicted = build(PARTS, MAKING)["spec"]["podFailurePolicy"]["rules"]
    assert refused["action"] == "FailJob"
    assert refused["onExitCodes"]["values"] == [2, 3]
    assert refused["onExitCodes"]["containerName"] == container(build(PARTS, MAKING))["name"]
    assert evicted["action"] == "Ignore"


def test_one_piece_is_one_job_in_memory() -> None:
    """Plain weights touch no disk: whatever can be written to is memory."""
    job = jobs.whole(replace(PLAIN, bases_claim="bases"), MAKING)
    assert container(job)["args"][0] == "materialize"
    assert job["spec"]["backoffLimit"] == PLAIN.attempts
    writable = [mount["name"] for mount in container(job)["volumeMounts"] if not mount.get("readOnly")]
    assert [volumes(job)[name]["emptyDir"]["medium"] for name in writable] == ["Memory"]


def test_scratch_counts_against_the_memory_of_a_pod() -> None:
    """Of a base of a known size: itself and the replica; else what the operator is told."""
    known = replace(MAKING, size=Size(weights=2 * 2**30, token=0))
    for making, scratch in ((known, 2 * 2048 + 512), (MAKING, 16 * 1024)):
        job = jobs.whole(PLAIN, making)
        assert volumes(job)["work"]["emptyDir"]["sizeLimit"] == f"{scratch}Mi"
        assert container(job)["resources"]["limits"]["memory"] == f"{8192 + scratch}Mi"


def test_parts_share_a_volume_and_fold_beside_each_other() -> None:
    fold, finish, claim = (build(PARTS, MAKING) for build in (jobs.fold, jobs.finish, jobs.claim))
    assert (fold["spec"]["completionMode"], fold["spec"]["completions"]) == ("Indexed", 8)
    assert fold["spec"]["parallelism"] == PARTS.parallel
    assert container(fold)["args"][:2] == ["parts", "fold"]
    assert container(finish)["args"][:2] == ["parts", "finish"]
    assert finish["metadata"]["name"] == fold["metadata"]["name"] + jobs.FINISH
    for job in (fold, finish):
        shared = volumes(job)["shared"]["persistentVolumeClaim"]["claimName"]
        assert shared == claim["metadata"]["name"]
        assert made.SHARED in mounts(job)


def test_a_pod_has_one_token_for_the_key_service_and_none_for_kubernetes() -> None:
    job = jobs.whole(FULL, MAKING)
    assert pod(job)["automountServiceAccountToken"] is False
    assert made.service_account(FULL, "acme")["automountServiceAccountToken"] is False
    assert pod(job)["serviceAccountName"] == made.service_account(FULL, "acme")["metadata"]["name"]
    [source] = volumes(job)["token"]["projected"]["sources"]
    token = source["serviceAccountToken"]
    assert (token["audience"], token["expirationSeconds"]) == ("anamorph-keysvc", 600)
    token_file = container(job)["args"][container(job)["args"].index("--token-file") + 1]
    assert token_file == f"{jobs.TOKEN_MOUNT}/{token['path']}"


def test_the_stores_credential_is_two_keys_of_a_secret() -> None:
    """By reference only, and nothing else of the Secret."""
    env = {one["name"]: one for one in container(jobs.whole(FULL, MAKING))["env"]}
    secrets = {name: one["valueFrom"]["secretKeyRef"] for name, one in env.items() if "valueFrom" in one}
    assert secrets == {
        name: {"name": "store", "key": name} for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    }
    assert "envFrom" not in container(jobs.whole(FULL, MAKING))


def test_a_public_store_is_not_held_against_our_own_authority() -> None:
    """The bundle would make every public store unbelievable."""
    public = replace(PLAIN, ca_config_map="anamorph-ca")
    for settings, bundle in ((public, False), (FULL, True)):
        names = [one["name"] for one in container(jobs.whole(settings, MAKING))["env"]]
        assert ("AWS_CA_BUNDLE" in names) is bundle
        assert "ANAMORPH_CA_FILE" in names


def test_an_object_goes_with_the_last_of_its_owners() -> None:
    job = jobs.fold(PARTS, MAKING)
    job["metadata"]["uid"] = "u-1"
    owned = pods.owned(jobs.claim(PARTS, MAKING), job)
    [owner] = owned["metadata"]["ownerReferences"]
    assert owner == {"apiVersion": "batch/v1", "kind": "Job", "name": made.name(REF), "uid": "u-1"}


def test_a_model_of_another_version_is_another_task() -> None:
    other = Making(replace(REF, version=4), MODEL)
    assert (
        made.config_map(FULL, other)["metadata"]["name"] != made.config_map(FULL, MAKING)["metadata"]["name"]
    )
