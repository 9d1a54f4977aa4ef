"""What the continuous canary has found so far, read from the Prometheus that its metrics reach."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import httpx
from rich.table import Table

from anamorph.canary.report import MEASURES, TITLES
from anamorph.canary.statistics import CONFIDENCE, Ratio
from anamorph.errors import Unavailable

# As Prometheus spells the names of ``telemetry.names``.
_RATIO, _LATENCY, _PAIRS, _DRIFT = (
    f"anamorph_overhead_{name}" for name in ("ratio", "latency_seconds", "pairs", "drift")
)
_TENANT, _MODEL = "anamorph_tenant", "gen_ai_request_model"


@dataclass
class Standing:
    """One key version: its ratios with intervals, both sides' median seconds, and how many pairs."""

    tenant: str
    model: str
    version: str
    pairs: int = 0
    drifting: tuple[str, ...] = ()
    ratios: dict[str, Ratio] = field(default_factory=dict)
    seconds: dict[str, dict[str, float]] = field(default_factory=dict)
    """measure → side → median."""


def standings(
    http: httpx.Client, prometheus: str, *, tenant: str | None = None, model: str | None = None
) -> list[Standing]:
    """Every version that the canary measures now, by tenant and model.

    Args:
        http: with the caller's timeouts.
        prometheus: URL of its API, without ``/api/v1``.
        tenant: this one alone.
        model: this one alone.

    Raises:
        Unavailable: Prometheus does not answer, or refuses.
    """
    wanted = {_TENANT: tenant, _MODEL: model}
    selector = ",".join(f"{name}={json.dumps(value)}" for name, value in wanted.items() if value)
    found: dict[tuple[str, str, str], Standing] = {}
    for name in (_PAIRS, _RATIO, _LATENCY, _DRIFT):
        for labels, value in _query(http, prometheus, f"{name}{{{selector}}}"):
            place = labels.get(_TENANT, ""), labels.get(_MODEL, ""), labels.get("anamorph_version", "")
            _take(found.setdefault(place, Standing(*place)), name, labels, value)
    return [found[place] for place in sorted(found)]


def _take(into: Standing, name: str, labels: Mapping[str, str], value: float) -> None:
    measure = labels.get("anamorph_measure", "")
    if name == _PAIRS:
        into.pairs = int(value)
    elif name == _LATENCY:
        into.seconds.setdefault(measure, {})[labels["anamorph_protection"]] = value
    elif name == _DRIFT:
        into.drifting += (measure,) if value else ()
    else:
        known = asdict(into.ratios.get(measure, Ratio(1, 1, 1)))
        into.ratios[measure] = Ratio(**known | {labels["anamorph_statistic"]: value})


def _query(http: httpx.Client, prometheus: str, query: str) -> list[tuple[dict[str, str], float]]:
    try:
        answer = http.get(f"{prometheus.rstrip('/')}/api/v1/query", params={"query": query})
        answer.raise_for_status()
        result = answer.json()["data"]["result"]
        return [(dict(one["metric"]), float(one["value"][1])) for one in result]
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
        raise Unavailable(
            f"Prometheus does not answer at {prometheus}: {type(error).__name__}", code="no_prometheus"
        ) from None


def standings_json(found: Iterable[Standing]) -> str:
    """As one JSON object, ratios and medians as in a report of ``measure``."""
    items: list[dict[str, Any]] = [asdict(one) for one in found]
    return json.dumps({"source": "prometheus", "confidence": CONFIDENCE, "items": items}, indent=2) + "\n"


def standings_table(found: Iterable[Standing]) -> Table:
    """To print with rich: a line for each measure of each version."""
    table = Table(title="What encryption costs: encrypted over plaintext")
    for heading in ("version", "pairs", "", "plaintext", "encrypted", "ratio", f"{CONFIDENCE:.0%} interval"):
        table.add_column(heading, no_wrap=heading == "version")
    for one in found:
        place = f"{one.tenant}/{one.model}/v{one.version}"
        for measure in (measure for measure in MEASURES if measure in one.ratios):
            table.add_row(place, str(one.pairs), *_line(one, measure))
            place = ""
    return table


def _line(one: Standing, measure: str) -> tuple[str, ...]:
    ratio, seconds = one.ratios[measure], one.seconds.get(measure, {})
    times = (f"{seconds[side] * 1000:.2f}" if side in seconds else "" for side in ("plaintext", "encrypted"))
    mark = "  changed" if measure in one.drifting else ""
    return TITLES[measure], *times, f"{ratio.median:.3f}", f"{ratio.low:.3f} – {ratio.high:.3f}{mark}"
