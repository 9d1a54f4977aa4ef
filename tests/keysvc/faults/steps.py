"""Every transition of a version's life: what comes before, the call that asks for it, what it changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from tests.keysvc.faults import lives
from tests.keysvc.faults.calls import Outcome, ask
from tests.keysvc.faults.lives import Place
from tests.keysvc.faults.site import ARTIFACT, Owner

from anamorph.wire.admin import BackupCreate
from anamorph.wire.states import State

if TYPE_CHECKING:
    from tests.servers.production import KeyServiceProcess

Request = Callable[[Place, "KeyServiceProcess"], Outcome]
Move = tuple[State | None, State]


@dataclass(frozen=True)
class Step:
    """``action`` is the audit log's word; ``moves`` is the version's state before and after.

    ``older`` are those of the version before it, if the same transaction moves that too.
    """

    action: str
    arrange: Callable[[Owner], Place]
    request: Request
    moves: Move
    older: Move | None = None

    def __str__(self) -> str:
        return f"{self.action}-{self.arrange.__name__}"

    def states(self, place: Place) -> dict[int, State]:
        """What the versions of the place are in afterwards."""
        found = {place.version: self.moves[1]}
        return found | ({place.version - 1: self.older[1]} if self.older else {})


def rotate(place: Place, process: KeyServiceProcess) -> Outcome:
    return ask(process, "POST", f"{place.owner.keys_path}:rotate", place.owner.admin, key="do-rotate")


def release(place: Place, process: KeyServiceProcess) -> Outcome:
    return place.call(process, "release", place.grant, {"purpose": "materialize"}, key=False)


def stage(place: Place, process: KeyServiceProcess) -> Outcome:
    return place.call(process, "stage", place.grant, ARTIFACT.model_dump(mode="json"), key=False)


def give_up(place: Place, process: KeyServiceProcess) -> Outcome:
    return place.call(process, "fail", place.grant, {"reason": "r"}, key=False)


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
ACTIVATE = by_platform("activate", {"endpoint": "http://e"})
REVOKED_FROM: dict[State, Callable[[Owner], Place]] = {
    S.PENDING: lives.pending,
    S.MATERIALIZING: lives.materializing,
    S.STAGED: lives.staged,
    S.ACTIVE: lives.active,
    S.DRAINING: lives.draining,
    S.SUSPENDED: lives.suspended,
    S.RETIRED: lives.retired,
}
# What callers ask for, in the order of a life: every transition that there is.
STEPS = (
    Step("rotate", lives.new, rotate, (None, S.PENDING)),
    Step("materialize", lives.pending, by_platform("materialize", key=False), (S.PENDING, S.MATERIALIZING)),
    # In parts: the job that finishes gets its grant first, then each part its own.
    Step(
        "materialize",
        lives.pending,
        by_platform("materialize", {"parts": lives.PARTS}, key=False),
        (S.PENDING, S.MATERIALIZING),
    ),
    Step(
        "grant",
        lives.in_parts,
        by_platform("materialize", {"parts": lives.PARTS, "part": 1}, key=False),
        (S.MATERIALIZING, S.MATERIALIZING),
    ),
    Step("release", lives.materializing, release, (S.MATERIALIZING, S.MATERIALIZING)),
    Step("stage", lives.released, stage, (S.MATERIALIZING, S.STAGED)),
    Step("activate", lives.staged, ACTIVATE, (S.STAGED, S.ACTIVE)),
    # Two rows change in one transaction: killed between them, and when both are written.
    Step("drain", lives.replacing, ACTIVATE, (S.STAGED, S.ACTIVE), older=(S.ACTIVE, S.DRAINING)),
    Step("activate", lives.replacing, ACTIVATE, (S.STAGED, S.ACTIVE), older=(S.ACTIVE, S.DRAINING)),
    Step("suspend", lives.active, by_admin("suspend"), (S.ACTIVE, S.SUSPENDED)),
    Step("resume", lives.suspended, by_admin("resume"), (S.SUSPENDED, S.ACTIVE)),
    Step("suspend", lives.draining, by_admin("suspend"), (S.DRAINING, S.SUSPENDED)),
    Step("resume", lives.suspended_draining, by_admin("resume"), (S.SUSPENDED, S.DRAINING)),
    Step("retire", lives.drained, by_platform("retire"), (S.DRAINING, S.RETIRED)),
    Step("restore", lives.scheduled, by_admin("restore"), (S.DESTROY_SCHEDULED, S.RETIRED)),
    Step("cancel", lives.pending, cancel, (S.PENDING, S.FAILED)),
    Step("fail", lives.materializing, give_up, (S.MATERIALIZING, S.FAILED)),
    Step("fail", lives.staged, by_platform("fail", {"reason": "r"}, key=False), (S.STAGED, S.FAILED)),
    *(
        Step("revoke", arrange, by_admin("revoke"), (origin, S.COMPROMISED))
        for origin, arrange in REVOKED_FROM.items()
    ),
    Step("destroy", lives.retired, by_admin("destroy"), (S.RETIRED, S.DESTROY_SCHEDULED)),
    Step("destroy", lives.failed, by_admin("destroy"), (S.FAILED, S.DESTROY_SCHEDULED)),
    Step("destroy", lives.compromised, by_admin("destroy"), (S.COMPROMISED, S.DESTROY_SCHEDULED)),
    Step(
        "destroyed", lives.failed_and_scheduled, by_platform("destroyed"), (S.DESTROY_SCHEDULED, S.DESTROYED)
    ),
)
# What the processes do by themselves once a call has let them.
PREPARE = Step("prepare", lives.new, rotate, (None, S.PENDING))
SHRED = Step("shred", lives.shredding, backup, (S.DESTROYED, S.DESTROYED))
