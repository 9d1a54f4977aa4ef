"""A pool of fake members, asked as the door asks it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import pytest
from tests.serve.conftest import NOW, Issuer

from anamorph import telemetry
from anamorph.serve.applications.pool import open_backend
from anamorph.serve.asgi.forward import Begin, Forwarded, respond
from anamorph.serve.slots.base import Backend
from anamorph.serve.slots.pool import Pool
from anamorph.wire.inference import KEY_ID_HEADER
from anamorph.wire.serving import PoolMember, PoolSettings, PoolState

KCV = "0123456789abcdef"


def member(tenant: str, version: int = 1, **fields: Any) -> PoolMember:
    """A fake member; ``replica`` says what its steps and swaps cost."""
    defaults: dict[str, Any] = {
        "tenant": tenant,
        "model": "smol",
        "version": version,
        "replica": "fake:?vocab_size=500",
        "key_id": f"{tenant}.smol.v{version}.{KCV}",
        "public_key": "",
        "manifest_sha256": "",
    }
    return PoolMember.model_validate({**defaults, **fields})


@dataclass
class Answered:
    """What came back: status, headers, body."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def ids(self) -> list[int]:
        return list(json.loads(self.body)["choices"][0]["token_ids"])

    @property
    def error(self) -> dict[str, Any]:
        return dict(json.loads(self.body)["error"])

    @property
    def events(self) -> list[str]:
        return [line.removeprefix("data: ") for line in self.body.decode().split("\n\n") if line]


@dataclass
class Asked:
    """A pool and who may ask it."""

    pool: Pool
    issuer: Issuer

    async def put(self, *members: PoolMember) -> None:
        """What the operator pushes, and until it is done."""
        self.pool.reconfigure(PoolState(jwks=self.issuer.jwks, members=members))
        await self.pool.settled()

    async def ask(
        self, tenant: str, version: int = 1, *, path: str = "/v1/completions", **fields: Any
    ) -> Answered:
        claims = {"tenant": tenant, **fields.pop("claims", {})}
        headers = {
            "authorization": f"Bearer {self.issuer.token(NOW, **claims)}",
            KEY_ID_HEADER.lower(): fields.pop("key_id", f"{tenant}.smol.v{version}.{KCV}"),
        }
        coded = tuple((name.encode(), value.encode()) for name, value in headers.items())
        method, body = ("POST", json.dumps(fields).encode()) if fields else ("GET", b"")
        request = Forwarded(tenant, "smol", version, method, path, coded, body)
        begin, rest = Begin(0, (), b""), b""
        async with aclosing(respond(self.pool.app(tenant, "smol", version), request)) as pieces:
            async for piece in pieces:
                if isinstance(piece, Begin):
                    begin = piece
                elif isinstance(piece, bytes):
                    rest += piece
        return Answered(begin.status, {k.decode(): v.decode() for k, v in begin.headers}, begin.body + rest)


Start = Callable[..., Asked]


@pytest.fixture
async def start(issuer: Issuer, observed: telemetry.Telemetry) -> AsyncIterator[Start]:
    """Begin a pool; keyword arguments are fields of ``PoolSettings``, or ``backend``."""
    pools: list[Pool] = []

    def begin(*, backend: Backend | None = None, **fields: Any) -> Asked:
        defaults = {"pool": "small", "engine": "fake", "context_length": 400, "slots": 2}
        settings = PoolSettings.model_validate({**defaults, **fields})
        made = backend or open_backend(settings, threads=1)
        pools.append(Pool(settings, made, observed, clock=lambda: NOW))
        return Asked(pools[-1], issuer)

    yield begin
    for pool in pools:
        await pool.close()
