"""Who uses how much, and who waits."""

from __future__ import annotations

from anamorph.observability.panels import Dashboard, Panel, Query, Variable
from anamorph.observability.queries import REQUESTS, TENANT, quantile, rate

_UNNAMED = 'anamorph_tenant="_OTHER"'
_FIRST = "gen_ai_server_time_to_first_token_seconds"
_CHOSEN, _FAILED = 'anamorph_tenant=~"$tenant"', ',error_type!=""'

TENANTS = Dashboard(
    "tenants",
    "Anamorph: tenants",
    (
        Panel(
            "Tokens",
            (
                Query(
                    f"topk(10, {rate('anamorph_server_tokens_total', TENANT, _CHOSEN)})",
                    "{{anamorph_tenant}}",
                ),
            ),
            "short",
            "Per second, the ten largest. _OTHER are tenants beyond those that a process names.",
        ),
        Panel(
            "Requests",
            (Query(f"topk(10, {rate(REQUESTS, TENANT, _CHOSEN)})", "{{anamorph_tenant}}"),),
            "reqps",
        ),
        Panel(
            "Failed requests",
            (
                Query(
                    f"topk(10, {rate(REQUESTS, f'{TENANT}, error_type', _CHOSEN + _FAILED)})",
                    "{{anamorph_tenant}} {{error_type}}",
                ),
            ),
            "reqps",
        ),
        Panel(
            "Time to first token, p99",
            (
                Query(
                    f"topk(10, {quantile(0.99, _FIRST, TENANT, _CHOSEN)})",
                    "{{anamorph_tenant}}",
                ),
            ),
            "s",
        ),
        Panel(
            "Wait in the queue, p99",
            (
                Query(
                    f"topk(10, {quantile(0.99, 'anamorph_server_queue_duration_seconds', TENANT, _CHOSEN)})",
                    "{{anamorph_tenant}}",
                ),
            ),
            "s",
            "A neighbour that takes more than its share shows here first.",
        ),
        Panel(
            "Requests that are not named",
            (Query(f"{rate(REQUESTS, '', _UNNAMED)} / {rate(REQUESTS)}", "share"),),
            "percentunit",
            "Share of requests of tenants beyond the number that a process names.",
        ),
    ),
    (Variable("tenant", TENANT, REQUESTS),),
)
