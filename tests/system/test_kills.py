"""kill -9 in the middle of rotations, at seeded moments: the system converges and no invariant breaks."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import httpx
import pytest

from anamorph.cli.machine.home import MODEL
from anamorph.client import Client, TokenCodec
from anamorph.errors import ServiceError
from anamorph.wire.admin import Role
from anamorph.wire.audit import first_break
from anamorph.wire.keyservice import everything
from anamorph.wire.states import GONE, State

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(1500)]
MOMENTS = 20
COMING = {State.PENDING, State.MATERIALIZING, State.STAGED}
Answer = Callable[[TokenCodec, str, list[int], int], list[int]]


@pytest.mark.parametrize(("name", "seed"), [("operator", 1), ("key-service", 2)])
def test_killed_at_twenty_moments_it_converges(settled: Any, answer: Answer, name: str, seed: int) -> None:
    """Whenever it dies: one ACTIVE, versions only grow, the audit chain holds, answers are right."""
    moments = random.Random(seed)
    seen: dict[int, State] = {}
    for _ in range(MOMENTS):
        keep_rotating(settled)
        time.sleep(moments.uniform(0, 3))
        command = settled.kill(name)
        time.sleep(moments.uniform(0, 0.5))
        settled.restart(name, command)
        check_invariants(settled, seen)
    settled.await_until(lambda: not any(v.state in COMING for v in settled.versions()))
    newest = settled.rotate()
    settled.await_state(newest, State.ACTIVE)
    check_invariants(settled, seen)
    check_service(settled, answer, newest)


def test_a_job_dies_with_its_operator(settled: Any) -> None:
    """No materialisation outlives a killed operator: the root is in its memory."""
    settled.rotate()
    settled.await_until(lambda: bool(settled.jobs()))
    command = settled.kill("operator")
    settled.await_until(lambda: not settled.jobs())
    settled.restart("operator", command)
    settled.await_until(lambda: not any(v.state in COMING for v in settled.versions()))


def keep_rotating(system: Any) -> None:
    """Ask for a rotation unless one is under way; the key service may be down at the moment."""
    with suppress(ServiceError):
        system.rotate()


def check_invariants(system: Any, seen: dict[int, State]) -> None:
    """Compare with what was seen before, as soon as the key service answers."""
    system.await_until(lambda: bool(system.versions()))
    versions = {version.version: version.state for version in system.versions()}
    assert list(versions) == list(range(1, len(versions) + 1))
    assert len(versions) >= len(seen)
    assert sum(state is State.ACTIVE for state in versions.values()) == 1
    for number, before in seen.items():
        assert before not in GONE or versions[number] in GONE, "a version came back from the dead"
    seen.update(versions)
    with system.keys(Role.ADMIN) as keys:
        assert first_break(list(everything(keys.audit, "acme")), tenant="acme") is None


def check_service(system: Any, answer: Answer, newest: int) -> None:
    """The newest version answers rightly, and only what may be served stands in Ray."""
    with Client(system.url, system.api_key(), "acme", MODEL) as client:
        got = client.complete([1, 2, 3], max_tokens=4, temperature=0)
    codec = system.codec(newest)
    assert got.system_fingerprint == codec.key_id
    assert got.choices[0].token_ids == answer(codec, codec.key_id, [1, 2, 3], 4)
    system.await_until(
        lambda: standing(system) == {"door", f"plaintext.{MODEL}.v0", f"acme.{MODEL}.v{newest}"}
    )


def standing(system: Any) -> set[str]:
    """Applications of the tenant under test, and the shared ones."""
    ray = system.ray
    answer = httpx.get(f"{ray.dashboard_url}/api/serve/applications/", headers=ray.headers(), timeout=30)
    return {name for name in answer.json()["applications"] if not name.startswith("globex")}
