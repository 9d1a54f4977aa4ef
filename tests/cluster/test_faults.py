"""Each part is lost at each step of a rotation: it ends as a rotation does that nothing happened to.

Only `make test-cluster-faults` runs this. A step is caught by the key service's record, which the status
follows a turn later. Cases do not build on each other, so that `-k` may choose: each begins with one active
version and nothing else under way, and leaves the same.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass

import openai
import pytest
from tests.cluster.cluster import RELEASE, Cluster, until
from tests.cluster.conftest import Walk
from tests.cluster.grid import Fault, Step, cases, missed, step_of
from tests.cluster.settled import Place, Shape, lost, settled
from tests.cluster.stand import NAMESPACE, TENANT, stand
from tests.cluster.strikes import Strike, Vault, strikes

from anamorph.errors import AnamorphError, NotFound
from anamorph.wire.admin import KeyVersionRead
from anamorph.wire.keyservice import KeyService
from anamorph.wire.states import State

pytestmark = [pytest.mark.cluster_faults, pytest.mark.timeout(3600)]
# Seconds until all is as after a rotation without a fault; Ray's cluster may have to be made anew.
CONVERGE_S = 900.0
# Rotations of one case until its step was caught: some last no longer than a look.
ATTEMPTS = 6
_LOOK_S = 0.1
# What fails in the guide's shell would end it.
VERIFY = f'anamorph audit-log verify {TENANT} --api-key-file "$WORK/{TENANT}-admin.key" || echo "it says $?"'


@dataclass(frozen=True)
class Grid:
    """What a case needs."""

    place: Place
    guide: Walk
    right: str
    strikes: Mapping[Fault, Strike]

    def seen(self, active: int) -> Step | None:
        """Where the rotation stands that was asked for when a version was active."""
        keys, at = self.place.keys, (self.place.tenant, self.place.model)
        newest: KeyVersionRead | None = None
        with suppress(NotFound):
            newest = keys.get_version(*at, active + 1)
        staged = newest is not None and newest.state is State.STAGED
        return step_of(newest, keys.get_version(*at, active), self.place.served() if staged else ())

    def amiss(self, shape: Shape | None) -> tuple[Shape | None, list[str]]:
        """How it stands now, and what of it is not as it should be; what does not answer is amiss.

        Args:
            shape: how it should stand; ``None`` for what the documentation promises.
        """
        try:
            now = self.place.shape()
            found = list(settled(now)) if shape is None else now.differences(shape)
            return now, found or self._answer()
        except (AnamorphError, AssertionError) as error:
            return None, [f"{type(error).__name__}: {error}"[:500]]

    def _answer(self) -> list[str]:
        try:
            told = self.guide.ask()
        except openai.APIError as error:
            return [f"no answer: {type(error).__name__}: {error}"[:500]]
        return [] if told == self.right else [f"the answer is {told!r}, not {self.right!r}"]

    def converged(self, shape: Shape | None = None) -> Shape:
        """Wait until nothing is amiss.

        Raises:
            AssertionError: it does not get there; with all that is amiss in the end, or why it failed.
        """
        end = time.monotonic() + CONVERGE_S
        while True:
            now, amiss = self.amiss(shape)
            if now is not None and not amiss:
                return now
            if now is not None and now.newest == State.FAILED.value:
                raise AssertionError(f"the version that was asked for has failed: {self._newest().failure}")
            assert time.monotonic() < end, f"not within {CONVERGE_S:.0f} s: {'; '.join(amiss)}"
            time.sleep(1)

    def _newest(self) -> KeyVersionRead:
        return self.place.versions()[-1]

    def at_rest(self, shape: Shape) -> None:
        """Wait for the beginning of a case; what failed in another one is replaced first."""
        newest = self._newest()
        if newest.state is State.FAILED:
            self.ask_for()
            self.begun(newest.version)
        self.converged(shape)

    def ask_for(self) -> None:
        """Ask for a rotation, by the annotation."""
        self.place.cluster.rotate(NAMESPACE)

    def strike_at(self, step: Step, strike: Strike, active: int) -> bool:
        """Ask for a rotation and strike at its step; whether it was caught there."""
        if step is Step.ASKED:  # over in no time: it is asked for when what it needs has just gone
            until(strike, "something to strike", 60)
            self.ask_for()
            return True
        self.ask_for()
        for seen in self.looks(active):
            if missed(seen, step):
                return False
            if seen is step and strike():
                return True
        raise AssertionError(f"not at {step} within {CONVERGE_S:.0f} s")

    def begun(self, active: int) -> None:
        """Wait for the version that was asked for: until then all is as after the rotation before."""
        if not any(seen is not Step.ASKED for seen in self.looks(active)):
            raise AssertionError(f"no version {active + 1} within {CONVERGE_S:.0f} s")

    def looks(self, active: int) -> Iterator[Step | None]:
        """Where the rotation stands, again and again, for so long; without an answer nothing is said."""
        end = time.monotonic() + CONVERGE_S
        while time.monotonic() < end:
            with suppress(AnamorphError):
                yield self.seen(active)
            time.sleep(_LOOK_S)


@pytest.fixture(scope="session")
def grid(cluster: Cluster, guide: Walk) -> Iterator[Grid]:
    """The guide's cluster with a tiny model, that answers."""
    with pytest.MonkeyPatch.context() as patch:
        trust = guide.work / "ca.crt"
        patch.setenv("ANAMORPH_CA_FILE", str(trust))
        right = stand(cluster, guide)
        with (
            KeyService("https://127.0.0.1:8400", guide.work / "platform-admin.key") as keys,
            closing(Vault("https://127.0.0.1:8200", trust, unseal_key(cluster))) as vault,
        ):
            vault.open()
            place = Place(cluster, keys, TENANT, NAMESPACE)
            yield Grid(place, guide, right, strikes(cluster, vault))


def unseal_key(cluster: Cluster) -> str:
    """The evaluation profile's, which its sidecar uses."""
    found = cluster.get("secret", "-n", RELEASE, "anamorph-vault-unseal")
    return base64.b64decode(found["data"]["unseal-key"]).decode()


@pytest.fixture(scope="session")
def undisturbed(grid: Grid) -> Shape:
    """How a rotation ends that nothing happened to: as documented, and the measure of all others."""
    before = grid.place.versions()
    grid.ask_for()
    grid.begun(before[-1].version)
    shape = grid.converged()
    assert len(grid.place.versions()) == len(before) + 1
    return shape


@pytest.mark.parametrize(("fault", "step"), list(cases()), ids=[f"{one}-{step}" for one, step in cases()])
def test_a_rotation_ends_as_if_nothing_had_happened(
    grid: Grid, undisturbed: Shape, fault: Fault, step: Step
) -> None:
    """One more version, which answers; the one before has ended; nothing is left over and nothing lost."""
    for _ in range(ATTEMPTS):
        grid.at_rest(undisturbed)
        records, versions = grid.place.records(), grid.place.versions()
        active = versions[-1].version
        caught = grid.strike_at(step, grid.strikes[fault], active)
        grid.begun(active)
        grid.converged(undisturbed)
        assert grid.place.versions()[-1].version == active + 1
        assert len(grid.place.versions()) == len(versions) + 1
        assert lost(records, grid.place.records()) == []
        assert f"intact: {TENANT}," in grid.guide.shell.run(VERIFY, 120)
        if caught:
            return
    pytest.fail(f"{step} was over before it was seen, {ATTEMPTS} times")
