"""What `make test-cluster-faults` goes by, as far as it can be known without a cluster."""

from __future__ import annotations

import subprocess
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from sqlmodel import Session, create_engine
from tests.cluster.grid import LEFT_OUT, Fault, Step, cases, missed, step_of
from tests.cluster.guide import step
from tests.cluster.settled import OPEN_GRANTS, Shape, fixed, lost, named, running, settled, told
from tests.cluster.stand import again, model, pushing
from tests.cluster.strikes import PODS, Vault

from anamorph.wire.admin import KeyVersionRead
from anamorph.wire.states import State
from anamorph_keysvc.columns import Base
from anamorph_keysvc.tables import Grant, KeyVersion
from anamorph_operator.kubernetes.resources.encrypted_model import EncryptedModelSpec

if TYPE_CHECKING:
    from tests.servers.vault import VaultServer

ROOT = Path(__file__).parents[2]
THEN = datetime(2026, 1, 1, tzinfo=UTC)
BASE = {
    "uri": "s3://bases/tiny",
    "vocab_size": 49152,
    "context_length": 512,
    **dict.fromkeys(("digest", "tokenizer_digest", "chat_template_digest"), f"sha256:{'0' * 64}"),
}


def version(number: int, state: State, key_id: str | None = "k") -> KeyVersionRead:
    fields = {"row_version": 1, "created_at": THEN, "updated_at": THEN, "key_id": key_id}
    return KeyVersionRead.model_validate(
        {"tenant": "acme", "model": "smol", "version": number, "state": state, **fields}
    )


def test_every_case_is_there_or_says_why_not() -> None:
    """The grid has no hole that nobody has thought of, and the page about tests shows each reason."""
    chosen = list(cases())
    assert len(set(chosen)) == len(chosen)
    assert {*chosen, *LEFT_OUT} == {(fault, at) for fault in Fault for at in Step}
    assert not {*chosen} & {*LEFT_OUT}
    assert {fault for fault, _ in chosen} == {*PODS, Fault.VAULT}
    page = (ROOT / "docs" / "design" / "kubernetes.md").read_text()
    for reason in LEFT_OUT.values():
        assert reason in page


STANDS = [
    (None, State.ACTIVE, Step.ASKED),
    (version(2, State.PENDING, None), State.ACTIVE, Step.ASKED),
    (version(2, State.PENDING), State.ACTIVE, Step.ISSUED),
    (version(2, State.MATERIALIZING), State.ACTIVE, Step.FOLDING),
    (version(2, State.STAGED), State.ACTIVE, Step.PUBLISHED),
    (version(2, State.ACTIVE), State.DRAINING, Step.DRAINING),
    (version(2, State.ACTIVE), State.RETIRED, None),
    (version(2, State.FAILED), State.ACTIVE, None),
]


@pytest.mark.parametrize(
    ("newest", "before", "stands"), STANDS, ids=lambda one: str(getattr(one, "state", one))
)
def test_steps(newest: KeyVersionRead | None, before: State, stands: Step | None) -> None:
    """Where a rotation stands is told by its version, by the one before, and by what is served."""
    assert step_of(newest, version(1, before), ["door", "acme.smol.v1"]) is stands


def test_probing_begins_with_the_list() -> None:
    """A version is served before it is probed, and that is in ``serveConfigV2``."""
    served = ["door", "acme.smol.v1", "acme.smol.v2"]
    assert step_of(version(2, State.STAGED), version(1, State.ACTIVE), served) is Step.PROBING


def test_a_step_is_missed_by_a_later_one() -> None:
    """Not by an earlier one, nor by itself; and the end of a rotation misses them all."""
    assert [missed(seen, Step.PUBLISHED) for seen in Step] == [False] * 4 + [True] * 2
    assert all(missed(None, one) for one in Step)


GOOD = Shape(
    conditions={
        **dict.fromkeys(("Ready", "KeyIssued", "Materialized", "Verified", "Serving"), ("True", "Word")),
        **dict.fromkeys(("Rotating", "Draining", "Degraded"), ("False", "Settled")),
    },
    cluster={"Ready": ("True", "Running"), "CapacityLeft": ("True", "Room")},
    newest="ACTIVE",
    others=frozenset({"RETIRED"}),
    active=True,
    told=True,
    listed=("door", "newest"),
    deployed=2,
    jobs=0,
    grants=0,
    pods=8,
    ready=True,
)
BAD = [
    replace(GOOD, conditions={**GOOD.conditions, "Degraded": ("True", "Failed")}),
    replace(GOOD, cluster={"Ready": ("Unknown", "ClusterAway")}),
    replace(GOOD, newest="STAGED"),
    replace(GOOD, others=frozenset({"RETIRED", "DRAINING"})),
    replace(GOOD, active=False),
    replace(GOOD, told=False),
    replace(GOOD, listed=("acme.smol.v1", "door", "newest")),
    replace(GOOD, deployed=3),
    replace(GOOD, jobs=1),
    replace(GOOD, grants=1),
    replace(GOOD, ready=False),
]


@pytest.mark.parametrize("bad", BAD, ids=lambda one: one.differences(GOOD)[0].partition(" ")[0])
def test_whatever_is_left_over_is_found(bad: Shape) -> None:
    """One thing at a time that is not as after a rotation, by the documentation and by comparison."""
    assert len(list(settled(bad))) >= 1
    assert len(bad.differences(GOOD)) == 1
    assert list(settled(GOOD)) == GOOD.differences(GOOD) == []


def test_a_lost_pod_is_found() -> None:
    """It is not among those that are not ready: it is not there."""
    assert replace(GOOD, pods=7).differences(GOOD) == ["pods is 8, not 7"]


def test_records() -> None:
    """A version may grow old; nothing else of it changes, and none goes."""
    before = dict(map(fixed, [version(1, State.RETIRED), version(2, State.ACTIVE)]))
    assert lost(before, dict(map(fixed, [version(2, State.RETIRED), version(1, State.RETIRED)]))) == []
    assert lost(before, dict(map(fixed, [version(2, State.RETIRED)]))) == ["version 1"]
    other = dict(map(fixed, [version(1, State.RETIRED), version(2, State.ACTIVE, "other")]))
    assert lost(before, other) == ["version 2"]


def test_a_status_tells_the_newest_versions() -> None:
    """Newest first, at most ten; one that is behind does not count as told."""
    versions = [version(1, State.RETIRED), version(2, State.ACTIVE)]
    shown = [
        {"version": 2, "state": "ACTIVE", "keyId": "k"},
        {"version": 1, "state": "RETIRED", "keyId": "k"},
    ]
    assert told({"status": {"versions": shown}}, versions)
    assert told({"status": {"versions": shown[:1]}}, versions)
    assert not told({"status": {"versions": shown[1:]}}, versions)
    assert not told({}, versions)
    assert named(["acme.smol.v2", "door", "acme.smol.v1"], versions[1]) == ("acme.smol.v1", "door", "newest")


def test_jobs_that_run() -> None:
    """One that is over may stay to be looked at; one that is being deleted may still have a pod."""
    over = {"status": {"conditions": [{"type": "Complete", "status": "True"}]}}
    assert running({"metadata": {}})
    assert not running({"metadata": {}, **over})
    assert running({"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}, **over})


def test_open_grants_are_counted_by_what_the_tables_say() -> None:
    """Those that are neither used nor void, and whose version has not failed."""
    engine = create_engine("sqlite://")
    Base.metadata.create_all(engine)
    made: dict[str, Any] = {"model": "smol", "version": 1, "created_at": THEN}
    with Session(engine) as session:
        for name, state, when in (
            ("used", State.PENDING, {"used_at": THEN}),
            ("void", State.PENDING, {"voided_at": THEN}),
            ("open", State.PENDING, {}),
            ("failed", State.FAILED, {}),
        ):
            session.add(KeyVersion(tenant=name, state=state, updated_at=THEN, **made))
            row: dict[str, Any] = {**made, **when, "tenant": name, "expires_at": THEN}
            session.add(Grant(id=name, hash=name, **row))
        session.flush()
        assert session.connection().exec_driver_sql(OPEN_GRANTS).scalar() == 1
    engine.dispose()


def test_the_tiny_model_is_one() -> None:
    """Its object is what the operator reads, in float32, and its policy holds the rule of the definition."""
    spec = model(dict(BASE))["spec"]
    read = EncryptedModelSpec.model_validate(spec)
    policy = read.rotation_policy
    assert read.dtype == "float32"
    assert policy.grace_seconds >= (
        policy.client_cache_ttl_seconds
        + policy.longest_request_seconds
        + policy.clock_skew_seconds
        + policy.propagation_seconds
    )


def test_the_guide_with_another_base() -> None:
    """Its chapter about the base says in one place each where that is and goes; both are replaced."""
    script = pushing(step("The base").script, Path("/tmp/tiny"))
    assert 'export BASE="/tmp/tiny"' in script
    assert 'push "$BASE" s3://bases/tiny --json' in script
    assert "smollm2" not in script
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    with pytest.raises(LookupError, match="export BASE"):
        pushing("true", Path("/tmp/tiny"))


@pytest.mark.parametrize(
    ("title", "kept", "left"),
    [
        ("The cluster", "export WORK", None),
        ("The first administrator", "export ANAMORPH_KEYSVC_URL", "logs job"),
        ("The first answer", "anamorph proxy", "ask.py"),
    ],
)
def test_what_of_the_guide_is_run_again(title: str, kept: str, left: str | None) -> None:
    """On a cluster that stayed up only a shell is made anew: ports, variables, the proxy."""
    assert kept in again(title)
    assert left is None or (left in step(title).script and left not in again(title))


@pytest.mark.real
def test_vault_is_sealed_by_its_unseal_key_alone(vault_server: VaultServer) -> None:
    """And again once it was unsealed; in the end the token for it is void."""
    try:
        with closing(Vault(vault_server.url, vault_server.ca_file, vault_server.unseal_key)) as vault:
            vault.open()
            for _ in range(2):
                assert not vault.sealed()
                vault.seal(0)
                assert vault.sealed()
                vault_server.unseal()
            token = vault._http.headers["X-Vault-Token"]
        with vault_server.client(token) as client:
            assert client.get("auth/token/lookup-self").status_code == 403
    finally:
        vault_server.unseal()


@pytest.mark.real
def test_a_vault_that_refuses_is_no_fault(vault_server: VaultServer) -> None:
    """Without its key there is no token, and without a token no seal."""
    with closing(Vault(vault_server.url, vault_server.ca_file, "00" * 32)) as vault:
        for attempt in (vault.open, lambda: vault.seal(0)):
            with pytest.raises(httpx.HTTPStatusError):
                attempt()
        assert not vault.sealed()
