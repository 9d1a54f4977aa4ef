from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field

import httpx
import pytest

from anamorph.canary import Target
from anamorph.wire.inference import KEY_ID_HEADER

KEY_ID = "acme.smol.v1." + "0" * 16
ENCRYPTED = Target("http://zone/acme/smol/v1", "token", KEY_ID)
PLAINTEXT = Target("http://zone/plaintext/smol/v0", "token")


@dataclass
class Zone:
    """Both endpoints, at a speed per token that a test sets; time passes only while they answer."""

    seconds: dict[str, float] = field(default_factory=lambda: {"encrypted": 0.02, "plaintext": 0.01})
    first: float = 0.5
    now: float = 0.0
    short_by: int = 0
    per_chunk: int = 1
    requests: list[tuple[str, dict[str, object]]] = field(default_factory=list)

    def clock(self) -> float:
        return self.now

    def client(self) -> httpx.Client:
        return httpx.Client(transport=httpx.MockTransport(self.answer))

    def answer(self, request: httpx.Request) -> httpx.Response:
        side = "plaintext" if "/plaintext/" in request.url.path else "encrypted"
        body = json.loads(request.content)
        self.requests.append((side, body))
        key_id = request.headers.get(KEY_ID_HEADER)
        headers = {"Content-Type": "text/event-stream"} | ({KEY_ID_HEADER: key_id} if key_id else {})
        events = self.events(side, key_id or "", body["max_tokens"] - self.short_by)
        return httpx.Response(200, headers=headers, content=events)

    def events(self, side: str, key_id: str, tokens: int) -> Iterator[bytes]:
        self.now += self.first * self.seconds[side]
        for sent in range(0, tokens, self.per_chunk):
            if sent:
                self.now += self.seconds[side] * self.per_chunk
            last = sent + self.per_chunk >= tokens
            count = min(self.per_chunk, tokens - sent)
            choice = {"index": 0, "token_ids": [1] * count, "finish_reason": "length" if last else None}
            chunk = {"id": "c", "created": 0, "model": "m", "system_fingerprint": key_id, "choices": [choice]}
            yield b"data: " + json.dumps(chunk).encode() + b"\n\n"
        yield b"data: [DONE]\n\n"


@pytest.fixture
def zone() -> Zone:
    return Zone()
