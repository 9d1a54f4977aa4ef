"""A pool with the fake engine: every tenant by his own key, whatever the operator and the others do."""

from __future__ import annotations

import asyncio
import json
import random
import time
from typing import Any

import pytest
from pydantic import ValidationError
from tests.serve.conftest import Issuer
from tests.serve.slots.conftest import KCV, Asked, Start, member

from anamorph import telemetry
from anamorph.errors import MixedKeys, SetupError, StoreUnavailable
from anamorph.serve.applications.pool import PoolReplica, build, open_backend
from anamorph.serve.asgi.forward import Begin, Forwarded, Served
from anamorph.serve.engines.fake import continuation
from anamorph.serve.slots.base import Job, Opened
from anamorph.serve.slots.fake import FakeBackend, FakeSlot
from anamorph.wire.inference import KEY_ID_HEADER
from anamorph.wire.serving import PoolMember, PoolSettings, PoolState

VOCAB = 500
PROMPT = [1, 2, 3]


def expected(tenant: str, prompt: list[int], n: int) -> list[int]:
    return continuation(f"{tenant}.smol.v1.{KCV}", prompt, n, VOCAB)


async def test_many_tenants_on_two_slots_get_their_own_answers(start: Start) -> None:
    """Twenty tenants at once, more than there are slots, none with another's tokens."""
    asked, rng = start(), random.Random(1)
    tenants = [f"t{i}" for i in range(20)]
    await asked.put(*(member(tenant) for tenant in tenants))

    async def one() -> bool:
        tenant, n = rng.choice(tenants), rng.randint(1, 9)
        prompt = [rng.randrange(VOCAB) for _ in range(4)]
        answer = await asked.ask(tenant, prompt=prompt, max_tokens=n)
        return answer.status == 200 and answer.ids == expected(tenant, prompt, n)

    assert all(await asyncio.gather(*(one() for _ in range(200))))


async def test_an_answer_names_the_members_key(start: Start) -> None:
    """Key id and fingerprint as under the other placement, and a foreign key id is refused."""
    asked = start()
    await asked.put(member("acme"), member("evil"))
    answer = await asked.ask("acme", prompt=PROMPT, max_tokens=2)
    assert answer.headers[KEY_ID_HEADER.lower()] == f"acme.smol.v1.{KCV}"
    wrong = await asked.ask("acme", prompt=PROMPT, max_tokens=2, key_id=f"evil.smol.v1.{KCV}")
    assert (wrong.status, wrong.error["code"]) == (409, "wrong_key")


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/models", "/usage"])
async def test_the_door_is_not_trusted_with_the_token(start: Start, path: str) -> None:
    """A token for another tenant is refused by the member itself, open or not yet."""
    asked = start()
    await asked.put(member("acme"), member("late", replica="/nowhere"))
    for tenant in ("acme", "late"):
        answer = await asked.ask(tenant, path=path, prompt=PROMPT, claims={"tenant": "evil"})
        assert answer.status == 401


async def test_a_stranger_is_not_found(start: Start) -> None:
    """Whoever is no member has no endpoint here."""
    assert (await start().ask("acme", prompt=PROMPT)).status == 404


async def test_a_refused_member_says_why_and_disturbs_nobody(start: Start) -> None:
    """The reason stands in the answer; it is not tried again until it changes."""
    asked = start()
    foreign = member("late", key_id=f"acme.smol.v2.{KCV}")
    await asked.put(member("acme"), member("evil", replica="/nowhere"), foreign)
    nowhere = await asked.ask("evil", prompt=PROMPT)
    assert nowhere.status == 503
    assert "folder does not exist" in nowhere.error["message"]
    assert "retry-after" not in nowhere.headers
    assert "another tenant" in (await asked.ask("late", prompt=PROMPT)).error["message"]
    assert (await asked.ask("acme", prompt=PROMPT, max_tokens=1)).status == 200
    await asked.put(member("evil"))
    assert (await asked.ask("evil", prompt=PROMPT, max_tokens=1)).status == 200


SLOW = "fake:?vocab_size=500&delay_ms=5"


async def streaming(asked: Asked, tenant: str, n: int = 300) -> asyncio.Task[Any]:
    """A stream that has begun."""
    task = asyncio.create_task(asked.ask(tenant, prompt=PROMPT, max_tokens=n, stream=True))
    async with asyncio.timeout(10):
        while asked.pool.engine.load(f"{tenant}.smol.v1.{KCV}").running == 0:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    return task


@pytest.mark.parametrize("gone", ["gone", "removed"])
async def test_a_revoked_members_streams_are_cut_at_once(start: Start, gone: str) -> None:
    """An error event and no [DONE]; the neighbour's stream goes on."""
    asked = start()
    await asked.put(member("acme", replica=SLOW), member("good", replica=SLOW))
    cut, kept = await streaming(asked, "acme"), await streaming(asked, "good", 40)
    left = [member("acme", replica=SLOW, status="gone")] if gone == "gone" else []
    await asked.put(*left, member("good", replica=SLOW))
    events = (await cut).events
    assert "key_gone" in events[-1]
    assert (await kept).events[-1] == "[DONE]"
    assert (await asked.ask("acme", prompt=PROMPT)).status == (410 if left else 404)


async def test_suspended_then_resumed(start: Start) -> None:
    """403 for what has not begun; what runs is finished; resumed without loading anything."""
    asked = start(slots=1, max_concurrent=1)
    await asked.put(member("acme", replica=SLOW))
    running = await streaming(asked, "acme", 30)
    queued = asyncio.create_task(asked.ask("acme", prompt=PROMPT, max_tokens=2))
    await asyncio.sleep(0.01)
    await asked.put(member("acme", replica=SLOW, status="suspended"))
    assert (await queued).status == 403
    assert (await asked.ask("acme", prompt=PROMPT)).status == 403
    assert (await running).events[-1] == "[DONE]"
    await asked.put(member("acme", replica=SLOW))
    assert (await asked.ask("acme", prompt=PROMPT, max_tokens=2)).ids == expected("acme", PROMPT, 2)


async def test_a_member_that_was_gone_comes_back(start: Start) -> None:
    """Restored versions are opened anew."""
    asked = start()
    for status, code in (("serving", 200), ("gone", 410), ("serving", 200)):
        await asked.put(member("acme", status=status))
        assert (await asked.ask("acme", prompt=PROMPT, max_tokens=1)).status == code


async def test_a_full_queue_is_429_and_the_others_are_served(start: Start) -> None:
    """The bound is each member's own; Retry-After says when."""
    asked = start(max_queued=2)
    await asked.put(member("acme", replica=SLOW, max_concurrent=1), member("good"))
    waiting = [asyncio.create_task(asked.ask("acme", prompt=PROMPT, max_tokens=20)) for _ in range(3)]
    await asyncio.sleep(0.02)
    refused = await asked.ask("acme", prompt=PROMPT)
    assert (refused.status, refused.error["code"], refused.headers["retry-after"]) == (429, "overloaded", "1")
    assert (await asked.ask("good", prompt=PROMPT, max_tokens=1)).status == 200
    assert [answer.status for answer in await asyncio.gather(*waiting)] == [200] * 3


async def test_a_rate_limit_says_how_long(start: Start) -> None:
    """Beyond the rate sequences wait; beyond the queue Retry-After is the time until the rate allows one."""
    asked = start(max_queued=0)
    await asked.put(member("acme", max_concurrent=1, tokens_per_s=2))
    assert (await asked.ask("acme", prompt=PROMPT, max_tokens=19)).status == 200
    waiting = asyncio.create_task(asked.ask("acme", prompt=PROMPT, max_tokens=1))
    await asyncio.sleep(0.01)
    refused = await asked.ask("acme", prompt=PROMPT, max_tokens=1)
    assert refused.status == 429
    assert int(refused.headers["retry-after"]) in (10, 11)
    waiting.cancel()


async def test_a_client_that_hangs_up_leaves_its_place(start: Start) -> None:
    """Cancelled in the queue or in the slot: nothing of it is computed any more."""
    asked = start(slots=1)
    await asked.put(member("acme", replica=SLOW), member("good"))
    running = await streaming(asked, "acme")
    queued = asyncio.create_task(asked.ask("good", prompt=PROMPT, max_tokens=1))
    await asyncio.sleep(0.01)
    for task in (queued, running):
        task.cancel()
    await asyncio.gather(queued, running, return_exceptions=True)
    assert (await asked.ask("good", prompt=PROMPT, max_tokens=3)).ids == expected("good", PROMPT, 3)


class _Mixing(FakeSlot):
    """A slot with a fault: it believes in another key than it was given."""

    def add(self, job: Job) -> None:
        super().add(job)
        self.key_id = "other.smol.v1." + KCV


async def test_mixed_keys_stop_the_engine_and_answer_nothing(start: Start, monkeypatch: Any) -> None:
    """The request fails, the pool is unhealthy (Ray restarts it), and later requests fail too."""
    settings = PoolSettings(pool="small", engine="fake", context_length=400)
    backend = FakeBackend(settings, lambda _: pytest.fail("fake members have no files"))
    asked = start(backend=backend)
    await asked.put(member("acme"), member("other"))
    mixing = _Mixing({f"acme.smol.v1.{KCV}": backend._replicas[f"acme.smol.v1.{KCV}"]}, time.sleep)
    monkeypatch.setattr(backend, "slot", lambda _: mixing)
    answer = await asked.ask("acme", prompt=PROMPT, max_tokens=5)
    assert (answer.status, answer.error["code"]) == (503, "unavailable")
    assert not asked.pool.engine.healthy()
    assert (await asked.ask("acme", prompt=PROMPT)).status == 503
    assert (await asked.ask("acme", path="/healthz")).status == 503


def test_a_slot_takes_no_foreign_sequence() -> None:
    """Before anything is computed."""
    from anamorph.serve.engines.base import Sampling

    with pytest.raises(MixedKeys):
        FakeSlot({}, time.sleep).add(Job(1, "acme", (1,), Sampling(1), frozenset()))


async def test_a_hanging_step_is_unhealthy(start: Start) -> None:
    """A step that takes longer than the limit shows in ``healthy``."""
    asked = start()
    asked.pool.engine._stall_s = 0.05
    await asked.put(member("acme", replica="fake:?vocab_size=500&delay_ms=300"))
    task = asyncio.create_task(asked.ask("acme", prompt=PROMPT, max_tokens=1))
    await asyncio.sleep(0.2)
    assert not asked.pool.engine.healthy()
    assert (await task).status == 200
    assert asked.pool.engine.healthy()


async def test_what_a_pool_tells_of_itself(start: Start, observed: telemetry.Telemetry) -> None:
    """Swaps, hits and misses, members by state, and who waits: of any number of members, bounded series."""
    asked = start(slots=1)
    tenants = [f"t{i}" for i in range(130)]
    await asked.put(*(member(tenant, replica=SLOW) for tenant in tenants), member("evil", replica="/nowhere"))
    tasks = [asyncio.create_task(asked.ask(tenant, prompt=PROMPT, max_tokens=50)) for tenant in tenants]
    async with asyncio.timeout(10):
        while len(asked.pool.waiting()) != 129:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    page = observed.prometheus().decode()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    waiting = [line for line in page.splitlines() if line.startswith("anamorph_pool_waiting")]
    assert 90 < len(waiting) <= 101
    assert sum(float(line.split()[-1]) for line in waiting) == 129
    assert 'anamorph_pool_members{anamorph_pool="small",anamorph_state="serving"} 130.0' in page
    assert 'anamorph_pool_members{anamorph_pool="small",anamorph_state="refused"} 1.0' in page
    assert 'anamorph_state="miss"} 130.0' in page
    assert "anamorph_pool_swap_duration_seconds_count" in page


async def test_a_member_that_moves_is_opened_anew(start: Start) -> None:
    """Another replica under the same key id: the old one is closed first, even while it is being verified."""
    asked = start()
    for replica in ("fake:?vocab_size=500", "fake:?vocab_size=500&delay_ms=1"):
        asked.pool.reconfigure(PoolState(jwks=asked.issuer.jwks, members=(member("acme", replica=replica),)))
        await asyncio.sleep(0)
    await asked.pool.settled()
    assert (await asked.ask("acme", prompt=PROMPT, max_tokens=2)).ids == expected("acme", PROMPT, 2)


class _Away(FakeBackend):
    """A store that does not answer at first."""

    calls = 0

    def open(self, wanted: PoolMember) -> Opened:
        self.calls += 1
        if self.calls < 3:
            raise StoreUnavailable("the store does not answer")
        return super().open(wanted)


async def test_a_store_that_is_away_is_asked_again(start: Start, monkeypatch: Any) -> None:
    """Meanwhile the member answers 503 with Retry-After."""
    monkeypatch.setattr("anamorph.serve.slots.pool.RETRY_OPENING_S", 0.05)
    settings = PoolSettings(pool="small", engine="fake", context_length=400)
    asked = start(backend=_Away(settings, lambda _: pytest.fail("fake members have no files")))
    await asked.put(member("acme"))
    away = await asked.ask("acme", prompt=PROMPT, max_tokens=1)
    assert (away.status, away.headers["retry-after"]) == (503, "5")
    async with asyncio.timeout(10):
        while (await asked.ask("acme", prompt=PROMPT, max_tokens=1)).status != 200:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_what_ray_runs(issuer: Issuer) -> None:
    """Settings and members are dicts; requests are forwarded; a stopped engine fails the health check."""
    settings = {"pool": "small", "engine": "fake", "context_length": 400}
    made = PoolReplica(PoolSettings.model_validate(settings).model_dump(mode="json"))
    state = PoolState(jwks=issuer.jwks, members=(member("acme"),))
    await made.reconfigure(state.model_dump(mode="json"))
    await made._pool.settled()
    token = issuer.token(time.time(), tenant="acme").encode()
    headers = ((b"authorization", b"Bearer " + token), (b"anamorph-key-id", state.members[0].key_id.encode()))
    body = json.dumps({"prompt": PROMPT, "max_tokens": 3}).encode()
    request = Forwarded("acme", "smol", 1, "POST", "/v1/completions", headers, body)
    begin, *_, last = [piece async for piece in made.forward(request)]
    assert isinstance(begin, Begin)
    assert json.loads(begin.body)["choices"][0]["token_ids"] == expected("acme", PROMPT, 3)
    assert last == Served(len(PROMPT) + 3, last=True)
    made.check_health()
    await made._pool.close()
    with pytest.raises(RuntimeError):
        made.check_health()


def test_a_pool_needs_an_engine_with_slots() -> None:
    """vLLM cannot swap weights here; unknown settings fail the deployment."""
    with pytest.raises(SetupError, match="no slots"):
        open_backend(PoolSettings(pool="small", engine="vllm", context_length=400))
    with pytest.raises(ValidationError):
        build({"pool": "small", "context_length": 400, "slotz": 1})
    assert build({"pool": "small", "context_length": 400}) is not None
