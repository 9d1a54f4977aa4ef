"""Dashboards and alerting rules for what Anamorph measures.

``python -m anamorph.observability FOLDER`` writes ``grafana/*.json`` and ``alerts/serving.yaml``;
the rules of the key service come with ``anamorph_keysvc``.
"""

from anamorph.observability.dashboards import DASHBOARDS, dashboard_json

__all__ = ["DASHBOARDS", "dashboard_json"]
