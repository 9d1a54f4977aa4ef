"""Every transition of a version's life: what comes before, the call that asks for it, the state after."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from tests.keysvc.faults.calls import Outcome, ask, until
from tests.keysvc.faults.site import ARTIFACT, POLICY, Owner

from anamorph.wire.admin import BackupCreate
from anamorph.wire.keyservice import KeyService, everything
from anamorph.wire.states import State

if TYPE_CHECKING:
    from tests.servers.production import KeyServiceProcess


@dataclass(frozen=True)
class Place:
    """Where a tenant's life stands: its newest version, and what its caller holds."""

    owner: Owner
    version: int = 1
    grant: str = ""
    operation: str = ""

    def call(
        self, process: KeyServiceProcess, verb: str, token: str, body: Any = None, *, key: bool = True
    ) -> Outcome:
        """``verb`` on the version, always the same request: under one key where the route takes one."""
        path = f"{self.owner.keys_path}/{self.version}:{verb}"
        # The platform calls for all tenants, and a key is good for one request of a caller.
        once = f"{self.owner.tenant}-{verb}" if key else None
        return ask(process, "POST", path, token, body, key=once)

    def platform(
        self, process: KeyServiceProcess, verb: str, body: Any = None, *, key: bool = True
    ) -> Outcome:
        secret = self.owner.site.production.platform_key_file.read_text().strip()
        return self.call(process, verb, secret, body, key=key)

    def admin(self, process: KeyServiceProcess, verb: str) -> Outcome:
        return self.call(process, verb, self.owner.admin)


Request = Callable[[Place, "KeyServiceProcess"], Outcome]


@dataclass(frozen=True)
class Step:
    """``action`` is the audit log's word."""

    action: str
    arrange: Callable[[Owner], Place]
    request: Request
    state: State

    def __str__(self) -> str:
        return self.action


def new(owner: Owner) -> Place:
    return Place(owner)


def pending(owner: Owner) -> Place:
    version = owner.rotate()
    with owner.keys() as keys:
        (operation,) = everything(keys.list_operations, owner.tenant)
    return Place(owner, version, operation=operation.id)


def materializing(owner: Owner) -> Place:
    place = pending(owner)
    with owner.site.platform() as platform:
        return Place(owner, place.version, platform.materialize(*owner.at, place.version).secret)


def released(owner: Owner) -> Place:
    place = materializing(owner)
    with KeyService(owner.site.second.url, place.grant) as job:
        job.release(*owner.at, place.version, "materialize")
    return place


def staged(owner: Owner) -> Place:
    place = pending(owner)
    owner.stage(place.version)
    return place


def active(owner: Owner) -> Place:
    return Place(owner, owner.active())


def suspended(owner: Owner) -> Place:
    place = active(owner)
    with owner.keys() as keys:
        keys.suspend(*owner.at, place.version)
    return place


def drained(owner: Owner) -> Place:
    place = active(owner)
    owner.active()
    time.sleep(POLICY.grace_s)
    return place


def scheduled(owner: Owner) -> Place:
    place = drained(owner)
    with owner.site.platform() as platform, owner.keys() as keys:
        platform.retire(*owner.at, place.version)
        keys.destroy(*owner.at, place.version)
    return place


def failed(owner: Owner) -> Place:
    place = pending(owner)
    with owner.keys() as keys:
        keys.cancel_operation(owner.tenant, place.operation)
    return place


def failed_and_scheduled(owner: Owner) -> Place:
    place = failed(owner)
    with owner.keys() as keys:
        keys.destroy(*owner.at, place.version)
    return place


def shredding(owner: Owner) -> Place:
    place = failed_and_scheduled(owner)
    with owner.site.platform() as platform:
        platform.destroyed(*owner.at, place.version)
    with owner.keys() as keys:
        (shred,) = [one for one in everything(keys.list_operations, owner.tenant) if one.kind == "shred"]
        until(lambda: keys.get_operation(owner.tenant, shred.id).phase == "await-backup")
    return place


def rotate(place: Place, process: KeyServiceProcess) -> Outcome:
    return ask(process, "POST", f"{place.owner.keys_path}:rotate", place.owner.admin, key="do-rotate")


def release(place: Place, process: KeyServiceProcess) -> Outcome:
    return place.call(process, "release", place.grant, {"purpose": "materialize"}, key=False)


def stage(place: Place, process: KeyServiceProcess) -> Outcome:
    return place.call(process, "stage", place.grant, ARTIFACT.model_dump(mode="json"), key=False)


def cancel(place: Place, process: KeyServiceProcess) -> Outcome:
    path = f"/v1/tenants/{place.owner.tenant}/operations/{place.operation}:cancel"
    return ask(process, "POST", path, place.owner.admin, key="do-cancel")


def by_platform(verb: str, body: Any = None, *, key: bool = True) -> Request:
    return lambda place, process: place.platform(process, verb, body, key=key)


def by_admin(verb: str) -> Request:
    return lambda place, process: place.admin(process, verb)


def backup(place: Place, process: KeyServiceProcess) -> Outcome:
    """Lets a shredding go on."""
    secret = place.owner.site.production.platform_key_file.read_text().strip()
    body = BackupCreate(taken_at=datetime.now(UTC)).model_dump(mode="json")
    return ask(process, "POST", "/v1/backups", secret, body)


S = State
# What callers ask for, in the order of a life.
STEPS = (
    Step("rotate", new, rotate, S.PENDING),
    Step("materialize", pending, by_platform("materialize", key=False), S.MATERIALIZING),
    Step("release", materializing, release, S.MATERIALIZING),
    Step("stage", released, stage, S.STAGED),
    Step("activate", staged, by_platform("activate", {"endpoint": "http://e"}), S.ACTIVE),
    Step("suspend", active, by_admin("suspend"), S.SUSPENDED),
    Step("resume", suspended, by_admin("resume"), S.ACTIVE),
    Step("retire", drained, by_platform("retire"), S.RETIRED),
    Step("restore", scheduled, by_admin("restore"), S.RETIRED),
    Step("cancel", pending, cancel, S.FAILED),
    Step("fail", staged, by_platform("fail", {"reason": "r"}, key=False), S.FAILED),
    Step("revoke", active, by_admin("revoke"), S.COMPROMISED),
    Step("destroy", failed, by_admin("destroy"), S.DESTROY_SCHEDULED),
    Step("destroyed", failed_and_scheduled, by_platform("destroyed"), S.DESTROYED),
)
# What the processes do by themselves once a call has let them.
PREPARE = Step("prepare", new, rotate, S.PENDING)
SHRED = Step("shred", shredding, backup, S.DESTROYED)
