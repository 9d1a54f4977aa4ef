"""How a model stands after a rotation, to be compared: with another rotation's end, and with before."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from tests.cluster.cluster import COMPUTE, JOBS, RELEASE, ZONES, Cluster, Object, is_ready

from anamorph.wire.admin import KeyVersionRead
from anamorph.wire.keyservice import KeyService, everything
from anamorph.wire.serving import app_name
from anamorph.wire.states import State

OPEN_GRANTS = (
    "SELECT count(*) FROM release_grant JOIN key_version USING (tenant, model, version) "
    "WHERE voided_at IS NULL AND used_at IS NULL AND state <> 'FAILED'"
)
_PSQL = (
    'PGPASSWORD="$(cat /etc/postgresql/password/superuser)" '
    'psql -h 127.0.0.1 -U postgres -d anamorph -Atc "$0"'
)


@dataclass(frozen=True)
class Shape:
    """How things stand, without what differs from rotation to rotation.

    Args:
        conditions: of the model: status and reason.
        cluster: the same of the serving cluster.
        newest: state of the version that was asked for.
        others: states of all others, without those that have failed: their own case has failed with them.
        active: whether the status names the newest as active.
        told: whether the status shows the versions as the key service has them.
        listed: applications in ``serveConfigV2``, the newest version's called ``newest``.
        deployed: how many Ray has.
        jobs: those that are not over.
        grants: those that could still be used.
        pods: in the three zones, done ones left out.
        ready: whether all of these are.
    """

    conditions: Mapping[str, tuple[str, str]]
    cluster: Mapping[str, tuple[str, str]]
    newest: str
    others: frozenset[str]
    active: bool
    told: bool
    listed: tuple[str, ...]
    deployed: int
    jobs: int
    grants: int
    pods: int
    ready: bool

    def differences(self, other: Shape) -> list[str]:
        """What is otherwise there, field by field."""
        pairs = ((one.name, getattr(self, one.name), getattr(other, one.name)) for one in fields(self))
        return [f"{name} is {theirs}, not {ours}" for name, ours, theirs in pairs if ours != theirs]


@dataclass(frozen=True)
class Place:
    """One model.

    Args:
        namespace: of its object.
        served_by: its serving cluster.
    """

    cluster: Cluster
    keys: KeyService
    tenant: str
    namespace: str
    model: str = "smol"
    served_by: str = "main"

    def versions(self) -> list[KeyVersionRead]:
        """All of them, oldest first."""
        return sorted(
            everything(self.keys.list_versions, self.tenant, self.model), key=lambda one: one.version
        )

    def served(self) -> list[str]:
        """Names of the applications in ``serveConfigV2``."""
        found = self.cluster.get("rayservice", "-n", COMPUTE, self.served_by)
        return [one["name"] for one in json.loads(found["spec"]["serveConfigV2"])["applications"]]

    def shape(self) -> Shape:
        """How it stands now.

        Raises:
            AnamorphError: the key service does not answer.
            AssertionError: the API server or the database does not.
        """
        versions = self.versions()
        of = self.cluster.model(self.namespace, self.model)
        serving = self.cluster.get("servingcluster", "-n", COMPUTE, self.served_by)
        newest = versions[-1]
        pods = [one for zone in ZONES for one in self.cluster.pods(zone)]
        return Shape(
            conditions=conditions(of),
            cluster=conditions(serving),
            newest=newest.state.value,
            others=frozenset(one.state.value for one in versions[:-1] if one.state is not State.FAILED),
            active=of.get("status", {}).get("activeVersion") == newest.version,
            told=told(of, versions),
            listed=named(self.served(), newest),
            deployed=serving.get("status", {}).get("applications", 0),
            jobs=sum(map(running, self.cluster.get("jobs", "-n", JOBS)["items"])),
            grants=open_grants(self.cluster),
            pods=len(pods),
            ready=all(map(is_ready, pods)),
        )

    def records(self) -> dict[str, Any]:
        """What must outlive every fault: tenants, API keys, what is fixed of the model and its versions."""
        tenants = list(everything(self.keys.list_tenants))
        found: dict[str, Any] = {f"tenant {one.id}": one for one in tenants}
        for tenant in tenants:
            for key in everything(self.keys.list_api_keys, tenant.id):
                found[f"API key {key.id}"] = key
        record = self.keys.get_model(self.tenant, self.model)
        found["model"] = record.model_dump(exclude={"last_version", "row_version"})
        return found | dict(map(fixed, self.versions()))


# What of a version changes as it gets older.
_CHANGES = {"state", "row_version", "updated_at", "drain_until", "destroy_at", "served_tokens"}


def fixed(version: KeyVersionRead) -> tuple[str, dict[str, Any]]:
    """A version that has been active, without what its age changes."""
    return f"version {version.version}", version.model_dump(exclude=_CHANGES)


def lost(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Records that are not what they were."""
    return [name for name, record in before.items() if after.get(name) != record]


def conditions(of: Object) -> dict[str, tuple[str, str]]:
    """Status and reason of each condition of an object."""
    return {one["type"]: (one["status"], one["reason"]) for one in of.get("status", {}).get("conditions", [])}


def told(of: Object, versions: list[KeyVersionRead]) -> bool:
    """Whether a model's status shows the newest of these versions as they are."""
    said = of.get("status", {}).get("versions", [])
    shown = [(one["version"], one["state"], one.get("keyId")) for one in said]
    newest = [(one.version, one.state.value, one.key_id) for one in reversed(versions)]
    return shown == newest[: len(shown)] and bool(shown)


def named(served: list[str], newest: KeyVersionRead) -> tuple[str, ...]:
    """Applications in order, without the newest version's number."""
    own = app_name(newest.tenant, newest.model, newest.version)
    return tuple(sorted("newest" if name == own else name for name in served))


def running(job: Object) -> bool:
    """Whether a Job is not over; one that is being deleted is there as long as its pods may be."""
    ended = {one["type"] for one in job.get("status", {}).get("conditions", []) if one["status"] == "True"}
    return "deletionTimestamp" in job["metadata"] or not ended & {"Complete", "Failed"}


def open_grants(cluster: Cluster) -> int:
    """Grants that nobody has used or made void, by the database's own word; of what failed they are void."""
    pod = cluster.pod(RELEASE, "app.kubernetes.io/component=postgresql")
    return int(cluster.run(RELEASE, pod, "sh", "-c", _PSQL, OPEN_GRANTS))


def settled(shape: Shape) -> Iterator[str]:
    """What of a rotation's end is not as the documentation promises it: so the measure is measured."""
    needed = {"Ready", "KeyIssued", "Materialized", "Verified", "Serving"}
    false = {"Rotating", "Draining", "Degraded"}
    for kind, wanted in [*((one, "True") for one in needed), *((one, "False") for one in false)]:
        if shape.conditions.get(kind, ("", ""))[0] != wanted:
            yield f"{kind} is {shape.conditions.get(kind)}"
    expected = {
        "cluster": {"Ready": ("True", "Running"), "CapacityLeft": ("True", "Room")},
        "newest": State.ACTIVE.value,
        "others": frozenset({State.RETIRED.value}),
        "active": True,
        "told": True,
        "listed": ("door", "newest"),
        "deployed": 2,
        "jobs": 0,
        "grants": 0,
        "ready": True,
    }
    for name, value in expected.items():
        if getattr(shape, name) != value:
            yield f"{name} is {getattr(shape, name)}, not {value}"
