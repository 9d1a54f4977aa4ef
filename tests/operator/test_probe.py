"""Readings of usage: of many versions a few at a time, and who does not answer costs the others nothing."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta

import httpx
import pytest

from anamorph.wire.admin import InferenceTokenRead
from anamorph.wire.serving import Usage
from anamorph_operator.probe import Prober, Tokens
from anamorph_operator.state import Ref

NOW = datetime(2026, 1, 1, tzinfo=UTC)
REFS = [Ref("acme", f"m{number:03}", 1) for number in range(100)]


class Engines:
    """Every version's engine; of some, none answers."""

    def __init__(self, silent: int = 0) -> None:
        self._silent = {ref.route for ref in REFS[:silent]}
        self.under_way = self.most = 0

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        try:
            await asyncio.sleep(0)
            if request.url.path.removesuffix("/usage") in self._silent:
                raise httpx.ReadTimeout("silent")
            return httpx.Response(200, json=Usage(source="p", tokens=1).model_dump())
        finally:
            self.under_way -= 1


async def token(tenant: str, model: str) -> InferenceTokenRead:
    return InferenceTokenRead(token=f"{tenant}/{model}", expires_at=NOW + timedelta(hours=1))


def prober(engines: Engines) -> Prober:
    http = httpx.AsyncClient(transport=httpx.MockTransport(engines))
    return Prober(http, Tokens(token, lambda: NOW), lambda: NOW)


async def test_many_are_read_a_few_at_a_time() -> None:
    engines = Engines()
    found = await prober(engines).usage("http://serve", REFS)
    assert found.keys() == set(REFS)
    assert 1 < engines.most < 32


@pytest.mark.parametrize("silent", [1, 99])
async def test_one_that_does_not_answer_is_left_out(silent: int) -> None:
    found = await prober(Engines(silent)).usage("http://serve", REFS)
    assert found.keys() == set(REFS[silent:])


async def test_after_its_time_no_further_one_is_asked() -> None:
    engines = Engines()
    assert await prober(engines).usage("http://serve", REFS, within_s=0) == {}
    assert engines.most == 0
