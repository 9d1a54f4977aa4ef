"""Grafana dashboards as values, and their JSON (schema 39, Grafana 11)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

SCHEMA = 39
_COLUMNS = 24
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}


@dataclass(frozen=True)
class Query:
    """PromQL, and how its series are called in the legend."""

    expr: str
    legend: str = ""


@dataclass(frozen=True)
class Panel:
    """One picture.

    Args:
        title: above it.
        queries: one or more.
        unit: as Grafana calls it: ``s``, ``reqps``, ``percentunit``, ``short``.
        help: what it shows and when to worry, for the panel's corner.
        kind: Grafana's panel type.
        width: of 24 columns.
        limit: a line to hold the values against.
    """

    title: str
    queries: tuple[Query, ...]
    unit: str = "short"
    help: str = ""
    kind: Literal["timeseries", "stat"] = "timeseries"
    width: int = 8
    limit: float | None = None


@dataclass(frozen=True)
class Variable:
    """A choice at the top of a dashboard: the values of one label."""

    name: str
    label: str
    metric: str


@dataclass(frozen=True)
class Dashboard:
    """A page; ``name`` is its file and its uid."""

    name: str
    title: str
    panels: tuple[Panel, ...]
    variables: tuple[Variable, ...] = field(default=())


def as_json(dashboard: Dashboard) -> dict[str, Any]:
    """What Grafana imports, or loads by provisioning."""
    return {
        "uid": f"anamorph-{dashboard.name}",
        "title": dashboard.title,
        "tags": ["anamorph"],
        "schemaVersion": SCHEMA,
        "version": 1,
        "editable": False,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "timezone": "browser",
        "templating": {"list": [_source_variable(), *(_variable(one) for one in dashboard.variables)]},
        "annotations": {"list": []},
        "panels": list(_placed(dashboard.panels)),
    }


def _source_variable() -> dict[str, Any]:
    return {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Prometheus"}


def _variable(variable: Variable) -> dict[str, Any]:
    query = f"label_values({variable.metric}, {variable.label})"
    return {
        "name": variable.name,
        "type": "query",
        "datasource": _SOURCE,
        "query": {"query": query, "refId": variable.name},
        "refresh": 2,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
        "sort": 1,
    }


def _placed(panels: tuple[Panel, ...], height: int = 8) -> Iterator[dict[str, Any]]:
    x = y = 0
    for number, panel in enumerate(panels, start=1):
        if x + panel.width > _COLUMNS:
            x, y = 0, y + height
        yield _panel(panel, number, {"x": x, "y": y, "w": panel.width, "h": height})
        x += panel.width


def _panel(panel: Panel, number: int, place: dict[str, int]) -> dict[str, Any]:
    return {
        "id": number,
        "title": panel.title,
        "description": panel.help,
        "type": panel.kind,
        "datasource": _SOURCE,
        "gridPos": place,
        "fieldConfig": {"defaults": _defaults(panel), "overrides": []},
        "options": _OPTIONS[panel.kind],
        "targets": [_target(query, letter) for query, letter in zip(panel.queries, "ABCDEFGH", strict=False)],
    }


def _defaults(panel: Panel) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [{"color": "green", "value": None}]
    if panel.limit is not None:
        steps.append({"color": "red", "value": panel.limit})
    custom = {} if panel.limit is None else {"custom": {"thresholdsStyle": {"mode": "line"}}}
    return {"unit": panel.unit, "thresholds": {"mode": "absolute", "steps": steps}, **custom}


_OPTIONS: dict[str, dict[str, Any]] = {
    "timeseries": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
    "stat": {"reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False}},
}


def _target(query: Query, letter: str) -> dict[str, Any]:
    return {"refId": letter, "datasource": _SOURCE, "expr": query.expr, "legendFormat": query.legend}
