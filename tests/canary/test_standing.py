"""What is read back from Prometheus; `tests/observability` does so from a real one."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from rich.console import Console

from anamorph.canary.standing import standings, standings_json, standings_table
from anamorph.errors import Unavailable

PLACE = {"anamorph_tenant": "acme", "gen_ai_request_model": "smol", "anamorph_version": "2"}


def series(name: str, value: float, **labels: str) -> dict[str, Any]:
    return {"metric": {"__name__": name, **PLACE, **labels}, "value": [1.0, str(value)]}


RATIO, SECONDS = "anamorph_overhead_ratio", "anamorph_overhead_latency_seconds"
FOUND = {
    RATIO: [
        series(RATIO, value, anamorph_measure="tpot", anamorph_statistic=statistic)
        for statistic, value in (("low", 0.99), ("median", 1.01), ("high", 1.03))
    ],
    SECONDS: [
        series(SECONDS, value, anamorph_measure="tpot", anamorph_protection=side)
        for side, value in (("plaintext", 0.0100), ("encrypted", 0.0101))
    ],
    "anamorph_overhead_pairs": [series("anamorph_overhead_pairs", 360)],
    "anamorph_overhead_drift": [series("anamorph_overhead_drift", 1, anamorph_measure="tpot")],
}


def prometheus(queries: list[str], status: int = 200) -> httpx.Client:
    def answer(request: httpx.Request) -> httpx.Response:
        query = request.url.params["query"]
        queries.append(query)
        result = FOUND[query.partition("{")[0]]
        return httpx.Response(status, json={"status": "success", "data": {"result": result}})

    return httpx.Client(transport=httpx.MockTransport(answer))


def test_one_version() -> None:
    """Ratio with its interval, both sides' medians, the number of pairs, and what has changed."""
    with prometheus([]) as http:
        (found,) = standings(http, "http://p:9090/")
    assert (found.tenant, found.model, found.version, found.pairs) == ("acme", "smol", "2", 360)
    ratio = found.ratios["tpot"]
    assert (ratio.low, ratio.median, ratio.high) == (0.99, 1.01, 1.03)
    assert found.seconds == {"tpot": {"plaintext": 0.01, "encrypted": 0.0101}}
    assert found.drifting == ("tpot",)


def test_one_tenant_alone() -> None:
    """The choice is made by Prometheus."""
    queries: list[str] = []
    with prometheus(queries) as http:
        standings(http, "http://p:9090", tenant="acme", model="smol")
    assert all('{anamorph_tenant="acme",gen_ai_request_model="smol"}' in query for query in queries)


def test_as_json_and_as_table() -> None:
    """The same numbers for programs and for people."""
    with prometheus([]) as http:
        found = standings(http, "http://p:9090")
    assert json.loads(standings_json(found))["items"][0]["ratios"]["tpot"]["median"] == 1.01
    console = Console(width=120, record=True, quiet=False)
    console.print(standings_table(found))
    text = console.export_text()
    assert "acme/smol/v2" in text
    assert "0.990 – 1.030" in text


def test_a_prometheus_that_refuses() -> None:
    """It is said, and no number is."""
    with prometheus([], 503) as http, pytest.raises(Unavailable, match="Prometheus"):
        standings(http, "http://p:9090")
