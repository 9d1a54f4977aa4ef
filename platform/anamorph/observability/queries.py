"""Pieces of PromQL. Metric names stand in these modules as Prometheus spells them."""

from __future__ import annotations

from anamorph.observability.panels import Query

REQUESTS = "gen_ai_server_request_duration_seconds_count"
TENANT, MODEL, SIDE = "anamorph_tenant", "gen_ai_request_model", "anamorph_protection"
_RANGE = "[$__rate_interval]"


def rate(metric: str, by: str = "", where: str = "") -> str:
    """Per second, summed; ``by`` and ``where`` as PromQL writes them."""
    grouped = f" by ({by})" if by else ""
    return f"sum{grouped} (rate({metric}{{{where}}}{_RANGE}))"


def quantile(q: float, metric: str, by: str = "", where: str = "") -> str:
    """A quantile of a histogram, named without ``_bucket``."""
    labels = f"le, {by}" if by else "le"
    return f"histogram_quantile({q}, sum by ({labels}) (rate({metric}_bucket{{{where}}}{_RANGE})))"


def quantiles(metric: str, by: str = SIDE) -> tuple[Query, ...]:
    """Median and 99th percentile, by one label."""
    return tuple(Query(quantile(q, metric, by), f"p{q * 100:.0f} {{{{{by}}}}}") for q in (0.5, 0.99))
