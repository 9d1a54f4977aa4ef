"""What grows with the number of applications in one Ray cluster, and how.

    python benchmarks/applications.py [--most 20] [--step 5] [--routes 100,1000,10000] [--json FILE]

Starts applications with the fake engine, step by step, until there are --most or the machine's memory
is nine tenths full. At each step: how long the write took and how long until all ran; bytes of the
configuration, of Ray's own answer, of the proxy's routes and of Ray's metrics; memory and idle processor
time of a replica and of Serve's controller; time to first token through the proxy, of random
applications. Then the door's state with more and more routes, which is what tenants without an
application of their own cost.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.serve.conftest import Issuer  # noqa: E402 -- the checkout, not a package

from anamorph.cli.machine.signals import end_as_interrupt  # noqa: E402 -- as above
from anamorph.serve.cluster.local import RayProcess, start_ray, stop_ray  # noqa: E402 -- as above
from anamorph.wire.serving import (  # noqa: E402 -- as above
    APP_IMPORT_PATH,
    DOOR_IMPORT_PATH,
    DoorState,
    EngineSettings,
    KeyState,
    Route,
    app_name,
    route_prefix,
)

MODEL = "chat"
ASKED = 200
IDLE_S = 10.0
PATIENCE_S = 600.0
FULL = 0.9


class Cluster:
    """One Ray, and the list of applications that is written to it.

    Args:
        replica: what every engine serves, without files.
        encrypted: under a key of its own each; the ids that are sent count as encrypted already.
    """

    def __init__(
        self, ray: RayProcess, replica: str = "fake:?vocab_size=1000", *, encrypted: bool = False
    ) -> None:
        self.ray = ray
        self._replica, self._encrypted = replica, encrypted
        self.issuer = Issuer()
        self.http = httpx.Client(timeout=300, trust_env=False)
        self._url = f"{ray.dashboard_url}/api/serve/applications/"

    def body(self, count: int, routes: int = 0) -> dict[str, Any]:
        """The list with so many engines, and a door that knows so many versions."""
        apps = [self._door(routes), *(self._engine(number) for number in range(count))]
        options = self.ray.http_options()
        return {"proxy_location": "HeadOnly", "http_options": options, "applications": apps}

    def write(self, body: dict[str, Any]) -> float:
        """Seconds that the write took."""
        began = time.perf_counter()
        self.http.put(self._url, headers=self.ray.headers(), json=body).raise_for_status()
        return time.perf_counter() - began

    def read(self) -> tuple[dict[str, Any], int, float]:
        """What Ray says of every application, its bytes, and the seconds it took."""
        began = time.perf_counter()
        answer = self.http.get(self._url, headers=self.ray.headers()).raise_for_status()
        return answer.json()["applications"], len(answer.content), time.perf_counter() - began

    def await_running(self, count: int) -> float:
        """Seconds until so many applications and the door run.

        Raises:
            AssertionError: it takes longer than ten minutes, or one fails.
        """
        began = time.perf_counter()
        while True:
            states = [app["status"] for app in self.read()[0].values()]
            assert "DEPLOY_FAILED" not in states, "an application failed to deploy"
            if states == ["RUNNING"] * (count + 1):
                return time.perf_counter() - began
            assert time.perf_counter() - began < PATIENCE_S, f"after ten minutes: {states}"
            time.sleep(0.1)

    def first_token_s(self, number: int) -> float:
        """Seconds to the first token of a short stream."""
        url = f"{self.endpoint(number)}/v1/completions"
        headers = {"Authorization": f"Bearer {self.token(number)}"}
        body = {"prompt": [1, 2, 3], "max_tokens": 4, "stream": True}
        began = time.perf_counter()
        with self.http.stream("POST", url, headers=headers, json=body) as answer:
            assert answer.status_code == 200, answer.status_code
            lines = answer.iter_lines()
            next(lines)
            took = time.perf_counter() - began
            for _ in lines:
                pass
        return took

    def endpoint(self, number: int) -> str:
        """URL of the n-th tenant's version."""
        return f"{self.ray.serve_url}{route_prefix(tenant(number), MODEL, 1)}"

    def key_id(self, number: int) -> str:
        """Key id of the n-th tenant's version."""
        return f"{tenant(number)}.{MODEL}.v1.{number:016x}"

    def token(self, number: int) -> str:
        """An inference token of the n-th tenant."""
        return self.issuer.token(time.time(), tenant=tenant(number), model=MODEL)

    def _engine(self, number: int) -> dict[str, Any]:
        settings = EngineSettings(
            tenant=tenant(number),
            model=MODEL,
            version=1,
            protection="encrypted" if self._encrypted else "plaintext",
            key_id=self.key_id(number) if self._encrypted else None,
            replica=self._replica,
            engine="fake",
            context_length=2048,
        )
        return {
            "name": app_name(tenant(number), MODEL, 1),
            "route_prefix": route_prefix(tenant(number), MODEL, 1),
            "import_path": APP_IMPORT_PATH,
            "args": settings.model_dump(mode="json", exclude_unset=True),
            "deployments": [{"name": "engine", "user_config": self._state(KeyState(jwks=self.issuer.jwks))}],
        }

    def _door(self, routes: int) -> dict[str, Any]:
        known = tuple(_route(number) for number in range(routes))
        state = self._state(DoorState(jwks=self.issuer.jwks, routes=known))
        return {
            "name": "door",
            "route_prefix": "/",
            "import_path": DOOR_IMPORT_PATH,
            "args": {},
            "deployments": [{"name": "door", "user_config": state}],
        }

    @staticmethod
    def _state(state: KeyState | DoorState) -> dict[str, Any]:
        return state.model_dump(mode="json")


def tenant(number: int) -> str:
    """The name of the n-th tenant."""
    return f"t{number:05d}"


def _route(number: int) -> Route:
    key_id = f"{tenant(number)}.{MODEL}.v1.{number:016x}"
    return Route(tenant=tenant(number), model=MODEL, version=1, key_id=key_id, status="serving")


def step(cluster: Cluster, count: int) -> dict[str, Any]:
    """Bring the cluster to so many applications and measure it."""
    body = cluster.body(count)
    wrote, ran = cluster.write(body), cluster.await_running(count)
    _, answer_bytes, read_s = cluster.read()
    idle = idle_use(cluster.ray.pids())
    source = random.Random(count)  # noqa: S311 -- choice of applications, not secrecy
    first = [cluster.first_token_s(source.randrange(count)) for _ in range(ASKED)][ASKED // 10 :]
    metrics = metrics_page(cluster.ray)
    return {
        "applications": count,
        "configuration_bytes": len(json.dumps(body)),
        "write_s": wrote,
        "until_running_s": ran,
        "read_s": read_s,
        "read_bytes": answer_bytes,
        "routes_bytes": len(cluster.http.get(f"{cluster.ray.serve_url}/-/routes").content),
        "metrics_bytes": len(metrics),
        "metrics_series": sum(line[:1] not in {"", "#"} for line in metrics.splitlines()),
        "ttft_p50_ms": 1e3 * statistics.median(first),
        "ttft_p99_ms": 1e3 * sorted(first)[int(0.99 * len(first))],
    } | idle


@dataclass(frozen=True)
class Use:
    """What one process takes.

    Args:
        bytes: of memory, its share of what is shared with others.
        cores: processor time per second.
    """

    title: str
    bytes: int
    cores: float
    threads: int


def idle_use(pids: Sequence[int]) -> dict[str, Any]:
    """Memory and processor time of Ray's processes while nobody asks."""
    before = {pid: seconds for pid in pids if (seconds := _seconds(pid)) is not None}
    time.sleep(IDLE_S)
    uses = [use for pid, seconds in before.items() if (use := _use(pid, seconds)) is not None]
    replicas = [use for use in uses if use.title.startswith("ray::ServeReplica:")]
    controller = [use for use in uses if use.title.startswith("ray::ServeController")]
    return {
        "replica_mb": statistics.mean(use.bytes for use in replicas) / 2**20,
        "replica_idle_cores": statistics.mean(use.cores for use in replicas),
        "controller_mb": sum(use.bytes for use in controller) / 2**20,
        "controller_idle_cores": sum(use.cores for use in controller),
        "cluster_mb": sum(use.bytes for use in uses) / 2**20,
        "cluster_idle_cores": sum(use.cores for use in uses),
        "processes": len(uses),
        "threads": sum(use.threads for use in uses),
    }


def _seconds(pid: int) -> float | None:
    with suppress(psutil.NoSuchProcess):
        times = psutil.Process(pid).cpu_times()
        return float(times.user + times.system)
    return None


def _use(pid: int, before: float) -> Use | None:
    """None for a process that has ended meanwhile."""
    after = _seconds(pid)
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        title, memory = (process.cmdline() or [""])[0], process.memory_full_info().pss
        return None if after is None else Use(title, memory, (after - before) / IDLE_S, process.num_threads())
    return None


def metrics_page(ray: RayProcess) -> str:
    """Ray's own metrics of its only node, which hold a series per application and kind."""
    listed = json.loads((ray.temp_dir / "prom_metrics_service_discovery.json").read_text())
    address = next(target for group in listed for target in group["targets"])
    return httpx.get(f"http://{address}/metrics", timeout=60, trust_env=False).text


def door_states(cluster: Cluster, sizes: Sequence[int]) -> list[dict[str, Any]]:
    """The door with more and more versions in its state, and no engine."""
    found = []
    for routes in sizes:
        body = cluster.body(0, routes)
        found.append(
            {
                "routes": routes,
                "configuration_bytes": len(json.dumps(body)),
                "write_s": cluster.write(body),
                "until_running_s": cluster.await_running(0),
                "read_bytes": cluster.read()[1],
                "answered_s": _answered(cluster, routes - 1),
            }
        )
        print(json.dumps(found[-1]), file=sys.stderr, flush=True)
    return found


def _answered(cluster: Cluster, number: int) -> float:
    """Seconds until the door knows the last version: the state has reached its replica."""
    url = f"{cluster.endpoint(number)}/v1/models"
    headers = {"Authorization": f"Bearer {cluster.token(number)}"}
    began = time.perf_counter()
    while cluster.http.get(url, headers=headers).status_code == 404:
        assert time.perf_counter() - began < PATIENCE_S
        time.sleep(0.02)
    return time.perf_counter() - began


def grown(rows: Sequence[dict[str, Any]], figure: str) -> float:
    """What one more application adds to a figure: the slope of a straight line through all steps."""
    if len(rows) < 2:
        return float("nan")
    line = statistics.linear_regression([row["applications"] for row in rows], [row[figure] for row in rows])
    return line.slope


def main() -> None:
    """Grow, measure, print."""
    end_as_interrupt()
    parser = argparse.ArgumentParser(description="What grows with the number of applications.")
    parser.add_argument("--most", type=int, default=20)
    parser.add_argument("--step", type=int, default=5)
    parser.add_argument("--routes", default="100,1000,10000", help="sizes of the door's state")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="an-") as home:
        ray = start_ray(Path(home), num_cpus=1000)
        try:
            cluster = Cluster(ray)
            doors = door_states(cluster, [int(size) for size in options.routes.split(",")])
            for count in range(options.step, options.most + 1, options.step):
                rows.append(step(cluster, count))
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
                if psutil.virtual_memory().percent > 100 * FULL:
                    break
            cluster.http.close()
        finally:
            stop_ray(ray)
    each = {name: grown(rows, name) for name in (rows[0] if rows else {})}
    result = {"steps": rows, "per_application": each, "door": doors}
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
