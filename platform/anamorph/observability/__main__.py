"""Write dashboards and rules into a folder."""

from __future__ import annotations

import sys
from importlib.resources import files
from pathlib import Path

from anamorph.observability import DASHBOARDS, dashboard_json


def write(folder: Path) -> None:
    """Write ``grafana/*.json`` and ``alerts/serving.yaml`` below ``folder``."""
    grafana, alerts = folder / "grafana", folder / "alerts"
    for place in (grafana, alerts):
        place.mkdir(parents=True, exist_ok=True)
    for dashboard in DASHBOARDS:
        (grafana / f"{dashboard.name}.json").write_text(dashboard_json(dashboard))
    rules = files("anamorph.observability") / "alerts" / "serving.yaml"
    (alerts / "serving.yaml").write_text(rules.read_text())


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m anamorph.observability FOLDER")
    write(Path(sys.argv[1]))
