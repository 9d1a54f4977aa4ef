"""Dashboards as files; `test_running` holds their queries against what running processes export."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from anamorph.observability import DASHBOARDS, dashboard_json
from anamorph.observability.__main__ import write
from anamorph.observability.panels import Dashboard

EACH = pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda one: one.name)


def test_the_command_writes_all(tmp_path: Path) -> None:
    """Dashboards, each in its file, and the rules."""
    write(tmp_path)
    write(tmp_path)
    names = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*")}
    assert names == {f"grafana/{one.name}.json" for one in DASHBOARDS} | {"alerts/serving.yaml"}


@EACH
def test_panels_do_not_overlap(dashboard: Dashboard) -> None:
    """Each has a number and a place of its own within the 24 columns."""
    panels = json.loads(dashboard_json(dashboard))["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for panel in panels
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24


@EACH
def test_whatever_prometheus_there_is(dashboard: Dashboard) -> None:
    """Every panel and query asks the chosen data source, and every variable in a query is defined."""
    made = json.loads(dashboard_json(dashboard))
    sources = [panel["datasource"]["uid"] for panel in made["panels"]]
    sources += [target["datasource"]["uid"] for panel in made["panels"] for target in panel["targets"]]
    assert set(sources) == {"${datasource}"}
    defined = {one["name"] for one in made["templating"]["list"]}
    text = " ".join(target["expr"] for panel in made["panels"] for target in panel["targets"])
    assert [name for name in ("tenant", "model") if f"${name}" in text and name not in defined] == []


@EACH
def test_titles_are_unique(dashboard: Dashboard) -> None:
    """So that an alert or a person can name a panel."""
    titles = [panel.title for panel in dashboard.panels]
    assert len(set(titles)) == len(titles)
    assert all(panel.queries for panel in dashboard.panels)
