"""Rotation on the real system: under load, and with replicas that are not what they should be."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from anamorph.cli.machine.home import MODEL
from anamorph.client import AsyncClient, TokenCodec
from anamorph.errors import AnamorphError
from anamorph.wire.admin import ModelCreate
from anamorph.wire.states import State

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(900)]
Answer = Callable[[TokenCodec, str, list[int], int], list[int]]
CLIENTS, TOKENS, ROTATIONS = 6, 5, 3


@dataclass
class Load:
    """Clients that keep asking, and what they met."""

    system: Any
    answer: Answer
    sent: int = 0
    failures: list[str] = field(default_factory=list)
    wrong: int = 0
    key_ids: set[str] = field(default_factory=set)
    codecs: dict[str, TokenCodec] = field(default_factory=dict)

    async def run(self, stop: asyncio.Event) -> None:
        await asyncio.gather(*(self._client(stop, number) for number in range(CLIENTS)))

    async def _client(self, stop: asyncio.Event, number: int) -> None:
        async with AsyncClient(self.system.url, self.system.api_key(), "acme", MODEL) as client:
            while not stop.is_set():
                number += CLIENTS
                await self._ask(client, [number % 64, 5, number % 7])

    async def _ask(self, client: AsyncClient, prompt: list[int]) -> None:
        self.sent += 1
        try:
            got = await client.complete(prompt, max_tokens=TOKENS, temperature=0)
        except AnamorphError as error:
            self.failures.append(f"{type(error).__name__}: {error}")
            return
        key_id = got.system_fingerprint
        self.key_ids.add(key_id)
        codec = await self._codec(key_id)
        self.wrong += got.choices[0].token_ids != self.answer(codec, key_id, prompt, TOKENS)

    async def _codec(self, key_id: str) -> TokenCodec:
        if key_id not in self.codecs:
            version = int(key_id.split(".")[2][1:])
            self.codecs[key_id] = await asyncio.to_thread(self.system.codec, version)
        return self.codecs[key_id]


async def under_load(load: Load, work: Callable[[], None]) -> None:
    """Run blocking work while the clients keep asking."""
    stop = asyncio.Event()
    clients = asyncio.create_task(load.run(stop))
    try:
        await asyncio.to_thread(work)
    finally:
        stop.set()
        await clients


async def test_rotations_under_load_lose_and_falsify_nothing(settled: Any, answer: Answer) -> None:
    """Three rotations with six clients asking: none failed, none wrong, every version was used."""
    load, first = Load(settled, answer), settled.active().version

    def rotate() -> None:
        for _ in range(ROTATIONS):
            before = settled.active().version
            settled.await_state(settled.rotate(), State.ACTIVE)
            settled.await_state(before, State.RETIRED)

    await under_load(load, rotate)
    assert load.failures == []
    assert load.wrong == 0
    assert {int(key_id.split(".")[2][1:]) for key_id in load.key_ids} == set(
        range(first, first + ROTATIONS + 1)
    )


async def test_a_swapped_replica_trips_the_count_of_wrong_answers(settled: Any, answer: Answer) -> None:
    """If something else computes under the same key id, clients see it, and the operator puts it right."""
    load, active = Load(settled, answer), settled.active()
    name = f"acme.{MODEL}.v{active.version}"
    command = settled.kill("operator")
    true = swap_replica(settled, name, "fake:?vocab_size=60")
    await under_load(load, lambda: settled.await_until(lambda: load.wrong > 0))
    assert load.wrong > 0
    settled.restart("operator", command)
    settled.await_until(lambda: application(settled, name)["deployed_app_config"]["args"]["replica"] == true)
    settled.await_until(lambda: application(settled, name)["status"] == "RUNNING")
    after = Load(settled, answer)
    await under_load(after, lambda: settled.await_until(lambda: after.sent > 20))
    assert after.wrong == 0


def test_a_replica_that_fails_its_probe_never_becomes_active(settled: Any) -> None:
    """The version fails with its reason; the former one stays active, and the next rotation works."""
    before, lie = settled.active().version, settled.home.scratch / "lie"
    lie.touch()
    try:
        number = settled.rotate()
        settled.await_state(number, State.FAILED)
    finally:
        lie.unlink()
    [failed] = [version for version in settled.versions() if version.version == number]
    assert "does not answer what materialisation computed" in (failed.failure or "")
    assert settled.active().version == before
    settled.await_until(lambda: f"acme.{MODEL}.v{number}" not in applications(settled))
    settled.await_state(settled.rotate(), State.ACTIVE)


def test_a_base_outside_the_allow_list_fails_its_version_at_once(settled: Any) -> None:
    """The operator starts no job on a folder that it was not told to trust."""
    with settled.keys() as keys:
        known = keys.get_model("acme", MODEL).model_dump(include=set(ModelCreate.model_fields))
        keys.create_model("acme", ModelCreate(**(known | {"id": "foreign", "base": "/etc"})))
        keys.rotate("acme", "foreign")

        def refused() -> bool:
            return keys.get_version("acme", "foreign", 1).state is State.FAILED

        settled.await_until(refused)
        assert "allow-list" in (keys.get_version("acme", "foreign", 1).failure or "")


def applications(system: Any) -> dict[str, Any]:
    """What Ray's REST API says."""
    ray = system.ray
    answer = httpx.get(f"{ray.dashboard_url}/api/serve/applications/", headers=ray.headers(), timeout=30)
    found: dict[str, Any] = answer.json()["applications"]
    return found


def application(system: Any, name: str) -> dict[str, Any]:
    """One application; waits until Ray knows it."""
    found: dict[str, Any] = applications(system)[name]
    return found


def swap_replica(system: Any, name: str, replica: str) -> str:
    """Put another replica under an application, as somebody with access to the cluster could."""
    configs = [details["deployed_app_config"] for details in applications(system).values()]
    [config] = [one for one in configs if one["name"] == name]
    true: str = config["args"]["replica"]
    config["args"]["replica"] = replica
    ray = system.ray
    body = {"proxy_location": "HeadOnly", "http_options": ray.http_options(), "applications": configs}
    url = f"{ray.dashboard_url}/api/serve/applications/"
    httpx.put(url, headers=ray.headers(), json=body, timeout=60).raise_for_status()
    system.await_until(lambda: application(system, name)["status"] == "RUNNING")
    return true
