"""The door's way in without Ray: what it lets through, holds, counts, and says when an engine fails."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from anamorph.serve.api.app import build_app
from anamorph.serve.asgi.forward import Begin, Forwarded, Served, respond
from anamorph.serve.door.app import Door
from anamorph.serve.door.handles import Pieces
from anamorph.serve.engines.fake import FakeEngine, continuation
from anamorph.wire.inference import KEY_ID_HEADER
from anamorph.wire.serving import DoorState, Route

if TYPE_CHECKING:
    from tests.serve.conftest import Issuer, Serve

KEY_ID = "acme.smol.v1.0123456789abcdef"
NOW = 1_800_000_000.0
URL = "/acme/smol/v1/v1/completions"
JSON_BEGIN = Begin(200, ((b"content-type", b"application/json"), (b"content-length", b"2")), b"{")
STREAM_BEGIN = Begin(200, ((b"content-type", b"text/event-stream"),), b"data: 1\n\n")


@dataclass
class Engines:
    """Engines in this process, as Ray would reach them; every call is noted."""

    answer: Callable[[Forwarded], Pieces]
    calls: list[tuple[str, Forwarded, str]] = field(default_factory=list)
    kept: set[str] = field(default_factory=set)

    def call(self, app: str, request: Forwarded, session: str) -> Pieces:
        self.calls.append((app, request, session))
        return self.answer(request)

    def keep(self, apps: set[str]) -> None:
        self.kept = apps


@dataclass
class Front:
    """A door, the engines behind it, and a client with a valid token."""

    door: Door
    engines: Engines
    http: httpx.AsyncClient
    issuer: Issuer
    broken: list[str]

    def headers(self, **claims: Any) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.issuer.token(**claims)}", KEY_ID_HEADER: KEY_ID}

    async def ask(self, **fields: Any) -> httpx.Response:
        body = {"prompt": [1, 2, 3], "max_tokens": 8, **fields}
        return await self.http.post(URL, json=body, headers=self.headers())

    async def usage(self) -> dict[str, Any]:
        answer = await self.http.get("/acme/smol/v1/usage", headers=self.headers(sub="operator"))
        assert answer.status_code == 200
        return dict(answer.json())


MakeFront = Callable[..., Front]


@pytest.fixture
async def front(issuer: Issuer, serve: Serve) -> AsyncIterator[MakeFront]:
    """Build one; without ``answer`` a real endpoint with the fake engine is behind it."""
    clients: list[httpx.AsyncClient] = []

    def make(
        answer: Callable[[Forwarded], Pieces] | None = None, *, delay_s: float = 0, **route: Any
    ) -> Front:
        app = build_app(serve(engine=FakeEngine(KEY_ID, vocab_size=500, delay_s=delay_s)).endpoint)
        engines = Engines(answer or (lambda request: respond(app, request)))
        broken: list[str] = []
        door = Door(engines, lambda: NOW, broken=broken.append)
        place = {"tenant": "acme", "model": "smol", "version": 1, "key_id": KEY_ID, "app": "acme.smol.v1"}
        state = Route.model_validate({**place, "status": "serving", **route})
        door.reconfigure(DoorState(jwks=issuer.jwks, routes=(state,)))
        transport = httpx.ASGITransport(door.app(), raise_app_exceptions=False)
        clients.append(httpx.AsyncClient(transport=transport, base_url="http://door"))
        return Front(door, engines, clients[-1], issuer, broken)

    yield make
    for client in clients:
        await client.aclose()


@pytest.mark.parametrize("status", ["serving", "pending"])
async def test_what_has_no_route_is_forwarded(front: MakeFront, status: str) -> None:
    """A version that is still being verified too: the operator asks it by its URL."""
    made = front(status=status)
    answer = await made.ask()
    assert answer.json()["choices"][0]["token_ids"] == continuation(KEY_ID, [1, 2, 3], 8, 500)
    [(app, request, session)] = made.engines.calls
    assert (app, request.path, request.method, session) == ("acme.smol.v1", "/v1/completions", "POST", "")
    assert made.engines.kept == {"acme.smol.v1"}


async def test_only_what_an_engine_looks_at_is_forwarded(front: MakeFront) -> None:
    """Cookies, addresses and whatever proxies add end at the door."""
    made = front()
    extra = {"Cookie": "a=b", "X-Forwarded-For": "10.1.2.3", "traceparent": "00-" + "1" * 32}
    await made.http.post(URL, json={"prompt": [1]}, headers=made.headers() | extra)
    [(_, request, _)] = made.engines.calls
    names = {name.decode() for name, _ in request.headers}
    assert names == {"authorization", "anamorph-key-id", "content-type", "traceparent"}


@pytest.mark.parametrize(
    ("path", "claims", "status", "route"),
    [
        (URL, None, 401, {}),
        (URL, {"tenant": "globex"}, 401, {}),
        (URL, {"model": "other"}, 401, {}),
        (URL, {"exp": int(NOW) - 100}, 401, {}),
        (URL, {"aud": "elsewhere"}, 401, {}),
        ("/acme/smol/v2/v1/completions", {}, 404, {}),
        (URL, {}, 403, {"status": "suspended"}),
        (URL, {}, 410, {"status": "gone"}),
        (URL, {}, 503, {"app": None}),
        ("/acme/smol/v1/usage", {}, 401, {}),
        ("/acme/smol/v1/usage", {"sub": "operator"}, 200, {"status": "gone"}),
        ("/acme/smol/v1/healthz", {}, 200, {}),
        ("/acme/smol/v1/healthz", {}, 410, {"status": "gone"}),
        ("/acme/smol/v1/healthz", None, 401, {}),
        ("/acme/smol/v1/metrics", {}, 404, {}),
    ],
)
async def test_what_the_door_answers_itself_reaches_no_engine(
    front: MakeFront, path: str, claims: dict[str, Any] | None, status: int, route: dict[str, Any]
) -> None:
    """Refusals and readings: whoever may not ask wakes nothing, and neither does whoever only looks."""
    made = front(**route)
    headers = {} if claims is None else made.headers(**claims)
    assert (await made.http.get(path, headers=headers)).status_code == status
    assert made.engines.calls == []


async def test_a_large_body_is_refused_before_it_is_forwarded(front: MakeFront) -> None:
    """Announced or not."""
    made = front()

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(5):
            yield b"x" * 2**18

    for content in (b"x" * (2**20 + 1), chunks()):
        answer = await made.http.post(URL, content=content, headers=made.headers())
        assert answer.status_code == 413
    assert made.engines.calls == []


async def test_requests_that_wait_are_bounded(front: MakeFront) -> None:
    """What waits for its first byte counts, what has begun does not; a place is free again afterwards."""
    go = asyncio.Event()

    async def waking(_: Forwarded) -> Pieces:
        await go.wait()
        yield JSON_BEGIN
        yield b"}"
        yield Served(3, last=True)

    made = front(waking, max_held=2)
    held = [asyncio.create_task(made.ask()) for _ in range(2)]
    while len(made.engines.calls) < 2:  # noqa: ASYNC110 - no event tells of a call
        await asyncio.sleep(0)
    assert (await made.usage())["in_flight"] == 2
    refused = await made.ask()
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "5")
    assert refused.json()["error"]["code"] == "overloaded"
    go.set()
    assert [answer.status_code for answer in await asyncio.gather(*held)] == [200, 200]
    assert (await made.ask()).status_code == 200
    assert ((await made.usage())["tokens"], (await made.usage())["in_flight"]) == (9, 0)


async def test_what_streams_does_not_count_as_held(front: MakeFront) -> None:
    """One place, and a stream that has begun leaves it to the next."""
    made = front(delay_s=0.02, max_held=1)

    async def one() -> int:
        return (await made.ask(stream=True, max_tokens=20)).status_code

    first = asyncio.create_task(one())
    await asyncio.sleep(0.15)
    assert not first.done()
    assert await one() == 200
    assert await first == 200


async def test_usage_counts_prompt_and_answer(front: MakeFront) -> None:
    """Of whole answers and streams, and nothing for what the engine refuses; the source is the process."""
    made = front()
    source = (await made.usage())["source"]
    await made.ask(max_tokens=50, ignore_eos=True)
    await made.ask(max_tokens=50, stream=True)
    await made.ask(prompt="text")
    assert await made.usage() == {"source": source, "tokens": 106, "in_flight": 0}


def failing(*first: Begin | Served | bytes) -> Callable[[Forwarded], Pieces]:
    """An engine whose process dies after these."""

    async def answer(_: Forwarded) -> Pieces:
        for piece in first:
            yield piece
        raise ConnectionResetError("of whatever kind Ray raises")

    return answer


async def test_a_failure_before_the_beginning_is_a_503(front: MakeFront) -> None:
    """With Retry-After; nothing of the cause."""
    answer = await front(failing()).ask()
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert "whatever" not in answer.text


async def test_a_failure_in_a_stream_is_its_last_event(front: MakeFront) -> None:
    """What came before stays, and there is no [DONE]."""
    made = front(failing(STREAM_BEGIN, b"data: 2\n\n"))
    answer = await made.ask(stream=True)
    one, two, error = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    assert (answer.status_code, one, two) == (200, "1", "2")
    assert json.loads(error)["error"]["code"] == "unavailable"
    assert (await made.usage())["in_flight"] == 0
    assert made.broken == ["unavailable"]


async def test_a_stream_without_its_last_report_has_broken_off(front: MakeFront) -> None:
    """An engine that just stops is as bad as one that dies."""

    async def short(_: Forwarded) -> Pieces:
        yield STREAM_BEGIN

    assert '"error"' in (await front(short).ask(stream=True)).text


async def test_a_deadline_is_the_doors_too(front: MakeFront) -> None:
    """Before the beginning a 503, after it an event; the engine's work is cancelled."""
    slow = front(delay_s=0.3, request_timeout_s=0.1)
    answer = await slow.ask()
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "timeout")
    assert slow.broken == []  # its status says it
    streaming = front(delay_s=0.05, request_timeout_s=0.3)
    answer = await streaming.ask(stream=True, max_tokens=100)
    *_, last = [line for line in answer.text.split("\n\n") if line]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"
    assert (await streaming.usage())["in_flight"] == 0
    assert streaming.broken == ["timeout"]


async def test_sessions_are_made_only_where_there_are_several_replicas(front: MakeFront) -> None:
    """Bodies are not even looked at otherwise."""
    prompt = list(range(40))
    alone, several = front(), front(affinity=True)
    for made in (alone, several):
        await made.ask(prompt=prompt)
        await made.ask(prompt=[*prompt, 7])
    assert [session for _, _, session in alone.engines.calls] == ["", ""]
    one, two = (session for _, _, session in several.engines.calls)
    assert one == two != ""
