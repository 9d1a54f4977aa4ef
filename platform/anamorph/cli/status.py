"""``anamorph status``: what runs, and the state of every key version."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console
from rich.table import Table

from anamorph.cli.machine.home import Home, HomeOption, SystemState
from anamorph.cli.machine.processes import alive
from anamorph.cli.machine.tenants import platform_keys
from anamorph.cli.output import AsJson
from anamorph.errors import ServiceError
from anamorph.serve.cluster.local import RayProcess
from anamorph.wire.admin import KeyVersionRead
from anamorph.wire.keyservice import everything


def status(home: HomeOption = None, as_json: AsJson = False) -> None:
    """Show what runs, and the state of every key version."""
    place = Home.at(home)
    state = place.running()
    components, versions = _components(place, state), _versions(place, state)
    if as_json:
        report = {"home": str(place.root), "components": components, "versions": versions}
        print(json.dumps(report | {"urls": state.urls}, indent=1))
        return
    console = Console()
    console.print(_table("Components", components))
    console.print(
        "The key service does not answer." if versions is None else _table("Key versions", versions)
    )


def _components(home: Home, state: SystemState) -> list[dict[str, Any]]:
    rows = [
        {"name": one.name, "pid": one.pid, "running": alive(one), "url": state.urls.get(one.name, "")}
        for one in state.processes
    ]
    ray = RayProcess.load(home.ray)
    if ray is not None:
        rows.append({"name": "ray", "pid": ray.pid, "running": ray.alive(), "url": ray.serve_url})
    return rows


def _versions(home: Home, state: SystemState) -> list[dict[str, Any]] | None:
    try:
        with platform_keys(home, state.urls["keysvc"]) as keys:
            return [_row(version) for version in everything(keys.all_versions)]
    except ServiceError:
        return None


def _row(version: KeyVersionRead) -> dict[str, Any]:
    return {
        "tenant": version.tenant,
        "model": version.model,
        "version": version.version,
        "state": version.state.value,
        "key_id": version.key_id,
        "endpoint": version.endpoint or "",
        "served_tokens": version.served_tokens,
    }


def _table(title: str, rows: list[dict[str, Any]]) -> Table:
    table = Table(title=title, title_justify="left")
    for name in rows[0] if rows else ():
        table.add_column(name.replace("_", " "), overflow="fold")
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    return table
