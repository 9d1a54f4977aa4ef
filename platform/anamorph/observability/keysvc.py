"""The key service: releases, ages of keys, rotations, and what it stands on."""

from __future__ import annotations

from anamorph.observability.panels import Dashboard, Panel, Query
from anamorph.observability.queries import quantile, rate

_K = "anamorph_keysvc_"

KEYSVC = Dashboard(
    "keysvc",
    "Anamorph: key service",
    (
        Panel(
            "Releases",
            (
                Query(
                    rate(f"{_K}releases_total", "anamorph_purpose, anamorph_source"),
                    "{{anamorph_purpose}} {{anamorph_source}}",
                ),
            ),
            "reqps",
        ),
        Panel(
            "Release, p99",
            (
                Query(
                    quantile(0.99, f"{_K}release_duration_seconds", "anamorph_source"), "{{anamorph_source}}"
                ),
            ),
            "s",
        ),
        Panel(
            "Refused and failed releases",
            (
                Query(rate(f"{_K}denials_total", "error_type"), "refused {{error_type}}"),
                Query(rate(f"{_K}release_failures_total", "error_type"), "failed {{error_type}}"),
            ),
            "reqps",
        ),
        Panel("Key versions", (Query(f"max by (anamorph_state) ({_K}versions)", "{{anamorph_state}}"),)),
        Panel(
            "Age of keys",
            (
                Query(f"max({_K}key_oldest_seconds)", "oldest in use"),
                Query(f"max({_K}key_overdue_seconds)", "past its policy"),
                Query(f"max({_K}drain_overdue_seconds)", "draining past its grace"),
            ),
            "s",
        ),
        Panel(
            "Oldest rotation in each phase",
            (Query(f"max by (anamorph_phase) ({_K}rotation_age_seconds)", "{{anamorph_phase}}"),),
            "s",
        ),
        Panel(
            "Calls of the KMS",
            (
                Query(
                    rate(
                        f"{_K}call_duration_seconds_count",
                        "anamorph_action, error_type",
                        'anamorph_kind="kms"',
                    ),
                    "{{anamorph_action}} {{error_type}}",
                ),
            ),
            "reqps",
        ),
        Panel(
            "KMS, p99",
            (
                Query(
                    quantile(0.99, f"{_K}call_duration_seconds", "anamorph_action", 'anamorph_kind="kms"'),
                    "{{anamorph_action}}",
                ),
            ),
            "s",
        ),
        Panel(
            "Requests by status",
            (
                Query(
                    rate(f"{_K}request_duration_seconds_count", "http_response_status_code"),
                    "{{http_response_status_code}}",
                ),
            ),
            "reqps",
        ),
        Panel(
            "Background jobs",
            (
                Query(
                    rate(f"{_K}worker_rounds_total", "anamorph_action, error_type"),
                    "{{anamorph_action}} {{error_type}}",
                ),
            ),
            "short",
            "Turns per second.",
        ),
        Panel(
            "Work that waits",
            (
                Query(f"max({_K}operation_waiting_seconds)", "operations"),
                Query(f"max({_K}delivery_waiting_seconds)", "webhook deliveries"),
            ),
            "s",
        ),
        Panel(
            "Database connections",
            (
                Query(f"sum({_K}database_connections)", "in use"),
                Query(f"sum({_K}database_connections_limit)", "most"),
            ),
        ),
    ),
)
