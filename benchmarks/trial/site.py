"""The system on a Ray of two nodes with its replicas in an S3 store, each part where it can be broken.

Clients and operator reach key service and Serve through toxiproxy, so that the network can be cut.
Whoever starts the system also stands in for what would restart a dead process in production.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psutil
from benchmarks.trial.stand import System, left_over
from benchmarks.trial.store import ObjectStore, running_store
from tests.servers.process import free_port
from tests.servers.proxies import HOST, Fault, Toxiproxy, running_toxiproxy
from tests.servers.ray_cluster import Node, RayCluster, running_cluster

from anamorph.cli.machine.home import Home, Running, SystemState
from anamorph.cli.machine.processes import MARK, alive, await_file, end, end_marked, spawn
from anamorph.cli.machine.tenants import ServedModel, await_active, ensure_tenant, platform_keys
from anamorph.wire.keyservice import everything
from anamorph.wire.states import State

JOB = Path(__file__).with_name("job.py")
KEYSVC, OPERATOR = "key-service", "operator"
# What one node has room for: a few engines of 0.1 logical CPUs each, so that two nodes share them.
NODE_CPUS = 4


@dataclass
class Site(System):
    """Everything that a fault may strike."""

    cluster: RayCluster = field(kw_only=True)
    store: ObjectStore = field(kw_only=True)
    keysvc_link: Fault = field(kw_only=True)
    serve_link: Fault = field(kw_only=True)
    tenants: tuple[str, ...] = field(kw_only=True)
    # Command lines of processes that the orderly end did not end.
    orphans: list[str] = field(default_factory=list, kw_only=True)

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.keysvc_link.port}"

    @property
    def worker_node(self) -> Node:
        """The node that is not the head."""
        return self.cluster.nodes[-1]

    def workers(self, title: str) -> list[psutil.Process]:
        """Ray's processes whose title begins so, on all nodes."""
        found = []
        for pid in self.cluster.pids():
            with suppress(psutil.NoSuchProcess, IndexError):
                process = psutil.Process(pid)
                if process.cmdline()[0].startswith(title):
                    found.append(process)
        return found

    def titles(self, title: str) -> list[str]:
        """Whole titles of the ``workers`` that still live."""
        found = []
        for process in self.workers(title):
            with suppress(psutil.NoSuchProcess, IndexError):
                found.append(process.cmdline()[0])
        return found

    def applications(self) -> dict[str, Any]:
        """What Ray says of each application; empty while it does not answer."""
        url = f"{self.cluster.dashboard_url}/api/serve/applications/"
        with suppress(httpx.HTTPError, ValueError, KeyError):
            answer = httpx.get(url, headers=self.cluster.headers(), timeout=10, trust_env=False)
            found: dict[str, Any] = answer.json()["applications"]
            return found
        return {}

    def placement_groups(self) -> list[str]:
        """States of the placement groups that are not removed."""
        url = f"{self.cluster.dashboard_url}/api/v0/placement_groups?limit=1000"
        answer = httpx.get(url, headers=self.cluster.headers(), timeout=30, trust_env=False).json()
        states = [group["state"] for group in answer["data"]["result"]["result"]]
        return [state for state in states if state != "REMOVED"]

    def what_is_amiss(self) -> list[str]:
        """What is not as it should be now; clients are asked apart."""
        dead = [one.name for one in self.home.running().processes if not alive(one)]
        nodes = len(self.cluster.alive())
        amiss = [f"{name} is dead" for name in dead] + ([] if nodes == 2 else [f"{nodes} nodes alive"])
        states = {name: app["status"] for name, app in self.applications().items()}
        if not states:
            return [*amiss, "Serve does not answer"]
        # A version that is not active yet may still be starting: nobody is sent there.
        wanted = {name: states.get(name, "missing") for name in self.expected_applications()}
        return amiss + [f"{name} is {state}" for name, state in wanted.items() if state != "RUNNING"]

    def expected_applications(self) -> set[str]:
        """The door, and every version that may be asked."""
        served = {State.ACTIVE, State.DRAINING}
        with platform_keys(self.home, self.url) as keys:
            versions = list(everything(partial(keys.all_versions, states=served)))
        return {"door"} | {f"{v.tenant}.{v.model}.v{v.version}" for v in versions}

    def strays(self) -> list[str]:
        """Replicas that run without an application that stands."""
        names = self.applications().keys()
        return [title for title in self.titles("ray::ServeReplica:") if title.split(":")[3] not in names]


@contextmanager
def running_site(served: Mapping[str, ServedModel]) -> Iterator[Site]:
    """The whole of it, every tenant served its model; nothing is left at the end.

    Raises:
        SetupError: a component did not start.
    """
    with ExitStack() as ends:
        folder = Path(ends.enter_context(tempfile.TemporaryDirectory(prefix="anamorph-chaos-")))
        home = Home(folder / "home")
        home.create()
        store = ends.enter_context(running_store(folder))
        _credentials_by_file(store, folder, ends)
        instance = secrets.token_hex(16)
        home.save(SystemState(instance, ready=True))
        ends.callback(end_marked, instance)
        orphans: list[str] = []
        ends.callback(lambda: orphans.extend(left_over(instance)))  # before the rest is ended by force
        (folder / "ray").mkdir()
        cluster = ends.enter_context(
            running_cluster(folder / "ray", (NODE_CPUS, NODE_CPUS), {MARK: instance})
        )
        proxies = ends.enter_context(running_toxiproxy(folder))
        port = free_port()
        links = {"keysvc_link": ends.enter_context(_link(proxies, f"{HOST}:{port}"))}
        links["serve_link"] = ends.enter_context(_link(proxies, _serve(cluster)))
        site = Site(home, cluster=cluster, store=store, tenants=tuple(served), orphans=orphans, **links)
        ends.callback(lambda: end(home.running().processes))
        _start_keysvc(home, instance, port)
        for tenant, model in served.items():
            ensure_tenant(home, site.url, tenant, model)
        _start_operator(site, instance, {str(model.folder) for model in served.values()})
        await_active(home, site.url, site.tenants, lambda _: None, 240)
        yield site


def _serve(cluster: RayCluster) -> str:
    return cluster.serve_url.removeprefix("http://")


@contextmanager
def _link(proxies: Toxiproxy, upstream: str) -> Iterator[Fault]:
    """A port of toxiproxy before an address."""
    name, port = f"link-{secrets.token_hex(4)}", free_port()
    proxy = {"name": name, "listen": f"{HOST}:{port}", "upstream": upstream, "enabled": True}
    proxies.api.post("/proxies", json=proxy).raise_for_status()
    yield Fault(port, name, upstream, proxies.api)


def _credentials_by_file(store: ObjectStore, folder: Path, ends: ExitStack) -> None:
    """Credentials of the store where every S3 client looks: Ray's processes inherit HOME and no secret."""
    aws = folder / ".aws"
    aws.mkdir(mode=0o700)
    (aws / "config").write_text(f"[default]\nregion = us-east-1\nendpoint_url = {store.endpoint}\n")
    secret = aws / "credentials"
    secret.touch(mode=0o600)
    secret.write_text(
        f"[default]\naws_access_key_id = {store.access}\naws_secret_access_key = {store.secret}\n"
    )
    before = os.environ["HOME"]
    os.environ["HOME"] = str(folder)
    ends.callback(os.environ.__setitem__, "HOME", before)


def _start(home: Home, name: str, instance: str, command: Sequence[str], **urls: str) -> Running:
    running = spawn(name, [sys.executable, "-m", *command], home.logs / f"{name}.log", instance)
    home.save(home.running().plus(running, **urls))
    return running


def _start_keysvc(home: Home, instance: str, port: int) -> None:
    ready, place = home.root / "keysvc.port", ["--home", str(home.keysvc)]
    initialise = [sys.executable, "-m", "anamorph_keysvc.main", "init", *place]
    subprocess.run(initialise, capture_output=True, check=True)
    options = ["--port", str(port), "--port-file", str(ready)]
    running = _start(home, KEYSVC, instance, ["anamorph_keysvc.main", "serve", *place, *options])
    await_file(ready, running, 60)


def _start_operator(site: Site, instance: str, bases: set[str]) -> None:
    home, cluster = site.home, site.cluster
    options = {
        "keysvc": site.url,
        "key-file": home.platform_key,
        "ray-dashboard": cluster.dashboard_url,
        "ray-token-file": cluster.token_file,
        "serve-url": f"http://{HOST}:{site.serve_link.port}",
        "store": site.store.url,
        "scratch": home.scratch,
        "interval": 0.5,
        "materializer": f"{sys.executable} {JOB}",
    }
    flags = [f"--{name}={value}" for name, value in options.items()]
    flags += [f"--allow-base={base}" for base in sorted(bases)]
    _start(home, OPERATOR, instance, ["anamorph_operator.main", "local", *flags])


def pause(processes: Sequence[psutil.Process]) -> None:
    """SIGSTOP, to those that still run."""
    _send(processes, signal.SIGSTOP)


def resume(processes: Sequence[psutil.Process]) -> None:
    """SIGCONT, to those that still run."""
    _send(processes, signal.SIGCONT)


def kill(processes: Sequence[psutil.Process]) -> None:
    """SIGKILL, to those that still run."""
    _send(processes, signal.SIGKILL)


def _send(processes: Sequence[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)
