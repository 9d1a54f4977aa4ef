"""Where the life of a tenant's versions may stand, and how it comes there."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tests.keysvc.faults.calls import Outcome, ask, until
from tests.keysvc.faults.site import POLICY, Owner

from anamorph.wire.keyservice import KeyService, everything

if TYPE_CHECKING:
    from tests.servers.production import KeyServiceProcess

PARTS = 3


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


def in_parts(owner: Owner) -> Place:
    """MATERIALIZING in parts, none of which has its grant."""
    place = pending(owner)
    with owner.site.platform() as platform:
        return Place(owner, place.version, platform.materialize(*owner.at, place.version, parts=PARTS).secret)


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


def replacing(owner: Owner) -> Place:
    """STAGED, and another version is ACTIVE."""
    owner.active()
    version = owner.rotate()
    owner.stage(version)
    return Place(owner, version)


def suspended(owner: Owner) -> Place:
    return _suspend(active(owner))


def draining(owner: Owner) -> Place:
    place = active(owner)
    owner.active()
    return place


def suspended_draining(owner: Owner) -> Place:
    return _suspend(draining(owner))


def _suspend(place: Place) -> Place:
    with place.owner.keys() as keys:
        keys.suspend(*place.owner.at, place.version)
    return place


def drained(owner: Owner) -> Place:
    place = draining(owner)
    time.sleep(POLICY.grace_s)
    return place


def retired(owner: Owner) -> Place:
    place = drained(owner)
    with owner.site.platform() as platform:
        platform.retire(*owner.at, place.version)
    return place


def compromised(owner: Owner) -> Place:
    place = active(owner)
    with owner.keys() as keys:
        keys.revoke(*owner.at, place.version)
    return place


def scheduled(owner: Owner) -> Place:
    place = retired(owner)
    with owner.keys() as keys:
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
