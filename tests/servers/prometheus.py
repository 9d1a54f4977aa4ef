"""Prometheus: scrapes one page, evaluates rules, answers queries."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml
from tests.servers.find import binary
from tests.servers.process import Program, free_port

PATIENCE_S = 60.0


@dataclass(frozen=True)
class Prometheus:
    """A running server."""

    url: str

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Samples of an instant query, each with ``metric`` and ``value``."""
        answer = httpx.get(f"{self.url}/api/v1/query", params={"query": expression}, timeout=30)
        assert answer.is_success, answer.text
        return list(answer.json()["data"]["result"])

    def alerts(self) -> list[dict[str, Any]]:
        """Alerts that are pending or firing."""
        return list(httpx.get(f"{self.url}/api/v1/alerts", timeout=30).json()["data"]["alerts"])

    def wait(self, condition: Callable[[Prometheus], Any]) -> Any:
        """What ``condition`` answers once it is true."""
        end = time.monotonic() + PATIENCE_S
        while not (found := condition(self)):
            assert time.monotonic() < end, "Prometheus did not come to it"
            time.sleep(0.2)
        return found


@contextmanager
def running_prometheus(folder: Path, target: str, rules: Sequence[Path] = ()) -> Iterator[Prometheus]:
    """A server that scrapes ``target`` (``host:port``) every second.

    Args:
        folder: of its data.
        target: serves ``/metrics``.
        rules: files of alerting rules, evaluated every second.
    """
    port = free_port()
    config = folder / "prometheus.yaml"
    config.write_text(
        yaml.safe_dump(
            {
                "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
                "rule_files": [str(path) for path in rules],
                "scrape_configs": [
                    {"job_name": "otelcol", "honor_labels": True, "static_configs": [{"targets": [target]}]}
                ],
            }
        )
    )
    command = [
        str(binary("prometheus")),
        f"--config.file={config}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    made = Prometheus(f"http://127.0.0.1:{port}")
    program = Program(command, folder / "prometheus.log")
    program.start(lambda: _ready(made))
    try:
        yield made
    finally:
        program.stop()


def _ready(server: Prometheus) -> bool:
    try:
        return httpx.get(f"{server.url}/-/ready", timeout=2).status_code == 200
    except httpx.TransportError:
        return False
