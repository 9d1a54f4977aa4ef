"""The first dashboard to look at: load, latency, errors, and what encryption costs."""

from __future__ import annotations

from anamorph.observability.panels import Dashboard, Panel, Query
from anamorph.observability.queries import REQUESTS, SIDE, quantile, quantiles, rate

_MEDIANS = 'anamorph_statistic="median",anamorph_measure=~"ttft|tpot"'
_FAILED = 'error_type!=""'

OVERVIEW = Dashboard(
    "overview",
    "Anamorph: overview",
    (
        Panel("Requests", (Query(rate(REQUESTS, SIDE), "{{anamorph_protection}}"),), "reqps"),
        Panel(
            "Failed requests",
            (
                Query(
                    f"{rate(REQUESTS, 'error_type', _FAILED)} / scalar({rate(REQUESTS)})",
                    "{{error_type}}",
                ),
            ),
            "percentunit",
            "By what went wrong. Cancelled are those whose caller hung up.",
            limit=0.01,
        ),
        Panel(
            "Answers of the door",
            (
                Query(
                    rate(
                        "anamorph_door_answer_duration_seconds_count",
                        "http_response_status_code",
                        'http_request_method="POST"',
                    ),
                    "{{http_response_status_code}}",
                ),
            ),
            "reqps",
            "POST, by status. A 503 is what no engine could count: asleep for good, dead, or too late.",
        ),
        Panel(
            "What encryption costs",
            (
                Query(
                    f"max by (anamorph_measure) (anamorph_overhead_ratio{{{_MEDIANS}}})",
                    "{{anamorph_measure}}",
                ),
            ),
            "percentunit",
            "Encrypted over plaintext, the worst version: 100 % is as fast.",
            "stat",
        ),
        Panel("Time to first token", quantiles("gen_ai_server_time_to_first_token_seconds"), "s"),
        Panel("Time per output token", quantiles("gen_ai_server_time_per_output_token_seconds"), "s"),
        Panel(
            "Wait in the engine's queue",
            quantiles("anamorph_server_queue_duration_seconds"),
            "s",
            "From admission until the engine computed. Where it grows, replicas are missing.",
        ),
        Panel(
            "Tokens",
            (Query(rate("anamorph_server_tokens_total", "gen_ai_token_type"), "{{gen_ai_token_type}}"),),
            "short",
            "Per second.",
        ),
        Panel(
            "Sequences",
            (
                Query("sum(anamorph_engine_sequences_running)", "running"),
                Query("sum(anamorph_engine_sequences_waiting)", "waiting"),
            ),
        ),
        Panel(
            "Requests in flight",
            (
                Query(
                    "sum by (anamorph_protection) (anamorph_server_active_requests)",
                    "{{anamorph_protection}}",
                ),
            ),
        ),
        Panel(
            "Cold start, p99",
            (
                Query(
                    quantile(0.99, "anamorph_engine_cold_start_seconds", "anamorph_phase"),
                    "{{anamorph_phase}}",
                ),
            ),
            "s",
            "From nothing to the first token, by phase.",
        ),
        Panel(
            "Slot swaps, p99",
            (
                Query(
                    quantile(0.99, "anamorph_pool_swap_duration_seconds", "anamorph_pool"),
                    "{{anamorph_pool}}",
                ),
            ),
            "s",
            "Copying a replica into a slot of a shared engine.",
        ),
        Panel(
            "Replica was in a slot",
            (Query(rate("anamorph_pool_requests_total", "anamorph_state"), "{{anamorph_state}}"),),
            "reqps",
        ),
    ),
)
