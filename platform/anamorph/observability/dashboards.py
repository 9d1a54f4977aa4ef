"""All dashboards. A test holds every query against what running processes export."""

from __future__ import annotations

import json

from anamorph.observability.keysvc import KEYSVC
from anamorph.observability.overhead import OVERHEAD
from anamorph.observability.overview import OVERVIEW
from anamorph.observability.panels import Dashboard, as_json
from anamorph.observability.tenants import TENANTS

DASHBOARDS = (OVERVIEW, OVERHEAD, TENANTS, KEYSVC)


def dashboard_json(dashboard: Dashboard) -> str:
    """A dashboard as the text of its file."""
    return json.dumps(as_json(dashboard), indent=2) + "\n"
