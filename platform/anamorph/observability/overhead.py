"""What does encryption cost: what the continuous canary finds."""

from __future__ import annotations

from anamorph.observability.panels import Dashboard, Panel, Query, Variable
from anamorph.observability.queries import MODEL, TENANT, rate

_OF = 'anamorph_tenant=~"$tenant",gen_ai_request_model=~"$model"'
_VERSION = "{{anamorph_tenant}}/{{gen_ai_request_model}}/v{{anamorph_version}}"


def _interval(measure: str, title: str) -> Panel:
    queries = (
        Query(
            f'anamorph_overhead_ratio{{anamorph_measure="{measure}",anamorph_statistic="{one}",{_OF}}}',
            f"{one} {_VERSION}",
        )
        for one in ("low", "median", "high")
    )
    return Panel(
        title,
        tuple(queries),
        "percentunit",
        "Median and 95 % interval (paired bootstrap) over the canary's window.",
        limit=1.02,
    )


OVERHEAD = Dashboard(
    "overhead",
    "Anamorph: what does encryption cost?",
    (
        _interval("ttft", "Time to first token, encrypted over plaintext"),
        _interval("tpot", "Time per output token, encrypted over plaintext"),
        _interval("throughput", "Tokens per second, encrypted over plaintext"),
        Panel(
            "By length of the prompt",
            (
                Query(
                    'anamorph_overhead_length_ratio{anamorph_measure="ttft",anamorph_statistic="median"}',
                    "ttft {{anamorph_length}} ids",
                ),
                Query(
                    'anamorph_overhead_length_ratio{anamorph_measure="tpot",anamorph_statistic="median"}',
                    "tpot {{anamorph_length}} ids",
                ),
            ),
            "percentunit",
            "All versions together.",
        ),
        Panel(
            "Median times",
            (
                Query(
                    f"anamorph_overhead_latency_seconds{{{_OF}}}",
                    "{{anamorph_measure}} {{anamorph_protection}}",
                ),
            ),
            "s",
            "What the canary's own requests took, on both sides.",
        ),
        Panel(
            "Changes",
            (Query(f"anamorph_overhead_drift{{{_OF}}} > 0", "{{anamorph_measure}} " + _VERSION),),
            "short",
            "1 where the ratio differs from its own history (median test, at least 2 %).",
        ),
        Panel("Pairs in the window", (Query(f"anamorph_overhead_pairs{{{_OF}}}", _VERSION),)),
        Panel(
            "Pairs",
            (
                Query(rate("anamorph_canary_pairs_total", "error_type"), "measured {{error_type}}"),
                Query(
                    rate("anamorph_canary_skipped_total", "anamorph_reason"), "left out: {{anamorph_reason}}"
                ),
            ),
            "short",
            "Per second. Busy and disturbed pairs are left out by design.",
        ),
        Panel(
            "Ids moved by the canary",
            (Query(rate("anamorph_canary_tokens_total"), "ids"),),
            "short",
            "Per second; they count towards the token budgets.",
        ),
    ),
    (
        Variable("tenant", TENANT, "anamorph_overhead_pairs"),
        Variable("model", MODEL, "anamorph_overhead_pairs"),
    ),
)
