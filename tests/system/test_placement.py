"""Rotations of versions that sleep, are several, or share a pool, on the real system and under load."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from anamorph.cli.machine.home import MODEL
from anamorph.client import AsyncClient, TokenCodec
from anamorph.errors import AnamorphError
from anamorph.keys import VocabKey
from anamorph.wire.admin import Autoscaling, KeyVersionRead, ModelCreate, Serving
from anamorph.wire.keyservice import everything
from anamorph.wire.states import State

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(900)]
Answer = Callable[[TokenCodec, str, list[int], int], list[int]]
TENANT, VOCAB, CLIENTS, TOKENS = "acme", 64, 4, 5
SERVINGS = {
    "asleep": Serving(autoscaling=Autoscaling(min_replicas=0, idle_s=1)),
    "several": Serving(autoscaling=Autoscaling(min_replicas=2, max_replicas=2)),
    "pooled": Serving(placement="shared", pool="small"),
}


@dataclass
class Model:
    """One model of the tenant, and clients that keep asking it."""

    system: Any
    name: str
    answer: Answer
    failures: list[str] = field(default_factory=list)
    wrong: int = 0
    key_ids: set[str] = field(default_factory=set)

    def versions(self) -> dict[int, KeyVersionRead]:
        with self.system.keys() as keys:
            return {v.version: v for v in everything(keys.list_versions, TENANT, self.name)}

    def rotate(self) -> int:
        """Rotate, and wait until the new version is active."""
        with self.system.keys() as keys:
            number = keys.rotate(TENANT, self.name).version
        self.await_state(number, State.ACTIVE)
        return int(number)

    def await_state(self, number: int, state: State) -> None:
        self.system.await_until(lambda: self.versions()[number].state is state)

    @functools.cache  # noqa: B019 - lives as long as its test
    def codec(self, key_id: str) -> TokenCodec:
        with self.system.keys() as keys:
            release = keys.release(TENANT, self.name, int(key_id.split(".")[2][1:]), "client")
        return TokenCodec(VocabKey(release.material(), release.key_id, release.vocab_kcv), VOCAB)

    def __hash__(self) -> int:
        return hash(self.name)

    async def asking(self, stop: asyncio.Event, number: int) -> None:
        async with AsyncClient(self.system.url, self.system.api_key(), TENANT, self.name) as client:
            while not stop.is_set():
                number += CLIENTS
                await self._ask(client, [number % VOCAB, 5, number % 7])

    async def _ask(self, client: AsyncClient, prompt: list[int]) -> None:
        try:
            got = await client.complete(prompt, max_tokens=TOKENS, temperature=0)
        except AnamorphError as error:
            self.failures.append(f"{type(error).__name__}: {error}")
            return
        key_id = got.system_fingerprint
        self.key_ids.add(key_id)
        codec = await asyncio.to_thread(self.codec, key_id)
        self.wrong += got.choices[0].token_ids != self.answer(codec, key_id, prompt, TOKENS)

    async def under_load(self, work: Callable[[], None]) -> None:
        """Run blocking work while the clients keep asking."""
        stop = asyncio.Event()
        clients = [asyncio.create_task(self.asking(stop, number)) for number in range(CLIENTS)]
        try:
            await asyncio.to_thread(work)
        finally:
            stop.set()
            await asyncio.gather(*clients)


@pytest.fixture(params=list(SERVINGS))
def model(request: pytest.FixtureRequest, settled: Any, answer: Answer) -> Model:
    """A model that is served in one of the ways, its first version active."""
    name: str = request.param
    with settled.keys() as keys:
        known = keys.get_model(TENANT, MODEL).model_dump(include=set(ModelCreate.model_fields))
        keys.create_model(TENANT, ModelCreate.model_validate(known | {"id": name, "serving": SERVINGS[name]}))
    made = Model(settled, name, answer)
    made.rotate()
    return made


def applications(system: Any) -> dict[str, Any]:
    """What Ray's REST API says."""
    ray = system.ray
    found = httpx.get(f"{ray.dashboard_url}/api/serve/applications/", headers=ray.headers(), timeout=30)
    return dict(found.json()["applications"])


def served(system: Any, name: str) -> set[int]:
    """The versions of a model that have an application or a place in a pool; none of them has a route."""
    found = set()
    for app, details in applications(system).items():
        config = details["deployed_app_config"]
        if app.startswith(f"{TENANT}.{name}.v"):
            assert details["route_prefix"] is None
            found.add(int(app.rpartition(".v")[2]))
        if app.startswith("shared."):
            assert details["route_prefix"] is None
            members = config["deployments"][0]["user_config"]["members"]
            found |= {member["version"] for member in members if member["model"] == name}
    return found


async def test_rotations_without_a_route_lose_and_falsify_nothing(model: Model) -> None:
    """Two rotations with clients asking: nothing failed, nothing wrong, and the old ones are gone."""

    def rotate() -> None:
        for _ in range(2):
            before = max(model.versions())
            after = model.rotate()
            model.await_state(before, State.RETIRED)
            model.system.await_until(lambda after=after: served(model.system, model.name) == {after})

    await model.under_load(rotate)
    assert model.failures == []
    assert model.wrong == 0
    assert len(model.key_ids) == 3
    # What the door counted has reached the key service.
    model.system.await_until(lambda: model.versions()[max(model.versions())].served_tokens > 0)
