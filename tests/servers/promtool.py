"""Alerting rules before Prometheus' own tool: cases, and what it says of them."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from tests.servers.find import binary

MINUTES = 200


@dataclass(frozen=True)
class Case:
    """Series per minute in which an alert fires at ``MINUTES``, and such in which it must not.

    ``0+1x240`` grows by one each minute, ``5x240`` stays at five, ``_x180`` is not there yet.
    """

    fires: dict[str, str]
    silent: list[dict[str, str]] = field(default_factory=list)
    labels: dict[str, str] = field(default_factory=dict)


def rules(file: Path) -> list[dict[str, Any]]:
    """The rules of a file's one group."""
    (group,) = yaml.safe_load(file.read_text())["groups"]
    found: list[dict[str, Any]] = group["rules"]
    return found


def promtool(*args: str, cwd: Path) -> None:
    done = subprocess.run(
        [str(binary("promtool")), *args], cwd=cwd, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def unit(alert: str, series: dict[str, str], expected: list[dict[str, str]]) -> dict[str, Any]:
    """One unit test of promtool: with which labels Prometheus would say that ``alert`` fires."""
    query = f'ALERTS{{alertname="Anamorph{alert}",alertstate="firing"}}'
    return {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "promql_expr_test": [
            {
                "expr": f"count without (alertname, alertstate, severity) ({query})",
                "eval_time": f"{MINUTES}m",
                "exp_samples": [{"labels": _written(labels), "value": 1} for labels in expected],
            }
        ],
    }


def units(alert: str, case: Case) -> list[dict[str, Any]]:
    """Once in which it fires, and every case in which it stays silent."""
    return [unit(alert, case.fires, [case.labels]), *(unit(alert, series, []) for series in case.silent)]


def _written(labels: dict[str, str]) -> str:
    return "{" + ",".join(f'{name}="{value}"' for name, value in labels.items()) + "}"


def judge(rules: Path, folder: Path, tests: list[dict[str, Any]]) -> None:
    """Hold a file of rules against unit tests; what does not come true is an ``AssertionError``."""
    file = folder / "test.yaml"
    file.write_text(yaml.safe_dump({"rule_files": [str(rules)], "tests": tests}))
    promtool("test", "rules", str(file), cwd=folder)
