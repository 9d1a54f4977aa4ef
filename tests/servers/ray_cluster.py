"""A Ray cluster of several nodes on this machine, each on an address and in a session of its own.

Nodes are ordinary ``ray start`` processes: a node is killed as a machine dies, all of it
at once, and nothing of it is shared with the others but the files.
"""

from __future__ import annotations

import os
import random
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psutil
from tests.servers.hosts import Hosts
from tests.servers.process import MARK, PATIENCE_S

from anamorph.serve.cluster.local import INHERITED, INHERITED_PREFIXES, free_ports
from anamorph.serve.cluster.session import Session

NODE_ATTEMPTS = 3
RAY = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]


@dataclass
class Node:
    """One node: its address, whose last number is the host's, and the POSIX session of all its processes."""

    address: str
    session: Session

    @property
    def host(self) -> int:
        """Its number among the cluster's hosts."""
        return int(self.address.rpartition(".")[2])

    def pids(self) -> list[int]:
        return self.session.members()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to every process of the node: SIGSTOP freezes the machine, SIGCONT thaws it."""
        for pid in self.pids():
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def kill(self) -> None:
        """End every process of the node at once, as a machine dies."""
        self.signal(signal.SIGKILL)
        self.session.end(grace_s=0)


@dataclass
class RayCluster:
    """A head and any number of further nodes; what ``RayProcess`` offers, and nodes that come and go."""

    home: Path
    temp_dir: Path
    network: str
    gcs_port: int
    dashboard_port: int
    serve_port: int
    token_file: Path
    env: Mapping[str, str] = field(default_factory=dict)
    hosts: Hosts | None = None
    nodes: list[Node] = field(default_factory=list)

    @property
    def gcs_address(self) -> str:
        return f"{self.network}.1:{self.gcs_port}"

    @property
    def dashboard_url(self) -> str:
        return f"http://{self.network}.1:{self.dashboard_port}"

    @property
    def serve_url(self) -> str:
        return f"http://{self.network}.1:{self.serve_port}"

    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token_file.read_text().strip()}"}

    def http_options(self) -> dict[str, Any]:
        return {"host": f"{self.network}.1", "port": self.serve_port}

    def pids(self) -> list[int]:
        """Every live process of every node."""
        return [pid for node in self.nodes for pid in node.pids()]

    def add(self, num_cpus: int, resources: str = "{}") -> Node:
        """Start another node; returns once the head counts it as alive.

        Ray gives a start up that takes 30 s, as it may on a busy machine: then another one is made.

        Raises:
            RuntimeError: none of three came up.
        """
        for _ in range(NODE_ATTEMPTS):
            node = self._start([f"--address={self.gcs_address}"], num_cpus, resources)
            with suppress(RuntimeError):
                self._until("the node", partial(self._joined_or_ended, node))
            if node.address in self.alive():
                return node
            node.kill()
        raise RuntimeError(f"{NODE_ATTEMPTS} nodes were started and none came up:\n{self._logs()}")

    def _joined_or_ended(self, node: Node) -> bool:
        return node.address in self.alive() or not node.pids()

    def alive(self) -> list[str]:
        """Addresses of the nodes that the head believes alive."""
        url = f"{self.dashboard_url}/api/v0/nodes?limit=1000"
        with suppress(httpx.HTTPError, KeyError, TypeError):
            answer = httpx.get(url, headers=self.headers(), timeout=30).json()
            return [n["node_ip"] for n in answer["data"]["result"]["result"] if n["state"] == "ALIVE"]
        return []

    def start_head(self, num_cpus: int) -> None:
        """Start the head and wait until it answers and Serve's HTTP options are set."""
        flags = ["--head", "--no-monitor", f"--port={self.gcs_port}", "--include-dashboard=true"]
        flags += [f"--dashboard-host={self.network}.1", f"--dashboard-port={self.dashboard_port}"]
        self._start([*flags, f"--temp-dir={self.temp_dir}"], num_cpus, "{}")
        self._until("the head", lambda: len(self.alive()) > 0)
        body = {"proxy_location": "HeadOnly", "http_options": self.http_options(), "applications": []}
        url = f"{self.dashboard_url}/api/serve/applications/"
        self._until("Serve", lambda: _succeeds(url, self.headers(), body))

    def stop(self) -> None:
        """End every process of every node, stopped ones too."""
        for node in reversed(self.nodes):
            node.kill()

    def _start(self, flags: Sequence[str], num_cpus: int, resources: str) -> Node:
        number = len(self.nodes) + 1
        agent, agent_grpc, metrics, runtime_env, client = free_ports(5)
        address = f"{self.network}.{number}"
        ports = {"dashboard-agent-listen-port": agent, "dashboard-agent-grpc-port": agent_grpc}
        ports |= {"metrics-export-port": metrics, "runtime-env-agent-port": runtime_env}
        ports |= {"min-worker-port": 0, "max-worker-port": 0}
        ports |= {"ray-client-server-port": client} if number == 1 else {}
        sizes = {"num-cpus": num_cpus, "object-store-memory": 100_000_000, "resources": resources}
        options = {"node-ip-address": address, **ports, **sizes}
        host = self.hosts.command(number) if self.hosts else []
        with (self.home / f"node-{number}.log").open("wb") as log:
            child = subprocess.Popen(
                [*host, *RAY, *flags, *(f"--{name}={value}" for name, value in options.items())],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment(metrics),
                start_new_session=True,
            )
        node = Node(address, Session(child.pid, psutil.Process(child.pid).create_time()))
        self.nodes.append(node)
        child.returncode = 0  # the session's end waits for it, not this object
        return node

    def _environment(self, metrics: int) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if k in INHERITED or k.startswith(INHERITED_PREFIXES)}
        mark = {MARK: os.environ[MARK]} if MARK in os.environ else {}
        return {
            **kept,
            **mark,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token_file),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_SERVE_LOG_TO_STDERR": "0",
            "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "anamorph.serve.cluster.proxy:middlewares",
            "DASHBOARD_METRIC_PORT": str(metrics + 1),
            "OMP_WAIT_POLICY": "PASSIVE",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            **self.env,
        }

    def _until(self, what: str, condition: Any) -> None:
        end = time.monotonic() + PATIENCE_S
        while not condition():
            if time.monotonic() > end:
                raise RuntimeError(f"{what} did not come up in {PATIENCE_S:.0f} s:\n{self._logs()}")
            time.sleep(0.2)

    def _logs(self) -> str:
        return "\n".join(p.read_text(errors="replace")[-1500:] for p in self.home.glob("node-*.log"))


def _succeeds(url: str, headers: dict[str, str], body: dict[str, Any]) -> bool:
    with suppress(httpx.TransportError):
        return httpx.put(url, headers=headers, json=body, timeout=30).is_success
    return False


@contextmanager
def running_cluster(
    home: Path,
    num_cpus: Sequence[int] = (4, 4),
    env: Mapping[str, str] | None = None,
    hosts: Hosts | None = None,
) -> Iterator[RayCluster]:
    """A cluster with one node for each entry of ``num_cpus``, the head first; nothing of it is left.

    Args:
        home: receives logs and the cluster's token.
        num_cpus: logical CPUs of each node: what they limit is placement, not threads.
        env: further environment of every process.
        hosts: each node on a host of its own, the head on this machine; otherwise on loopback addresses.
    """
    # Sockets lie deep below Ray's folder and their paths are short: not under pytest's.
    with tempfile.TemporaryDirectory(prefix="ray-nodes-", dir="/tmp", ignore_cleanup_errors=True) as temp:
        token = home / "ray-token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        loopback = f"127.{random.randint(1, 254)}.{random.randint(0, 254)}"
        network = hosts.network if hosts else loopback
        gcs, dashboard, serve = free_ports(3)
        cluster = RayCluster(home, Path(temp), network, gcs, dashboard, serve, token, env or {}, hosts)
        try:
            cluster.start_head(num_cpus[0])
            for cpus in num_cpus[1:]:
                cluster.add(cpus)
            yield cluster
        finally:
            cluster.stop()
