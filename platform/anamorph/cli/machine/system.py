"""The whole system of one machine: key service, Ray, operator, tenants, proxies.

What can happen at the same time does: Ray starts while the key service does.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from anamorph.cli.machine.home import MODEL, TENANTS, Home, Running, SystemState, write_private
from anamorph.cli.machine.processes import MARK, alive, await_file, end, end_marked, spawn
from anamorph.cli.machine.tenants import Report, ServedModel, await_active, ensure_tenant
from anamorph.errors import SetupError
from anamorph.serve.cluster.local import RayProcess, free_ports, start_ray, stop_ray

Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What to start.

    Args:
        model: what every tenant serves.
        tenants: who is created.
        proxies: whose OpenAI proxy runs.
        interval_s: pause between two turns of the operator.
        materializer: another command for materialisation jobs, for tests.
        otlp_endpoint: collector that every component sends traces and metrics to.
    """

    model: ServedModel
    tenants: tuple[str, ...] = TENANTS
    proxies: tuple[str, ...] = TENANTS[:1]
    baseline: bool = True
    interval_s: float = 0.5
    materializer: str | None = None
    otlp_endpoint: str | None = None
    timeout_s: float = 600


def is_up(home: Home) -> bool:
    """Whether everything that was started here still runs."""
    state, ray = home.load(), RayProcess.load(home.ray)
    if state is None or ray is None or not state.ready:
        return False
    return ray.alive() and all(alive(process) for process in state.processes)


def start(home: Home, plan: Plan, say: Say, report: Report) -> SystemState:
    """Start everything and wait until every tenant is served; whatever fails, nothing stays behind.

    Raises:
        SetupError: a component did not start; its log lies in ``home/logs``.
        MaterializationError: a replica could not be made.
    """
    try:
        return _Starter(home, plan, say).run(report)
    except BaseException:
        stop(home)
        raise


def stop(home: Home) -> None:
    """End everything that ``start`` started here, also after a start that was cut off.

    Raises:
        SetupError: a process survives SIGKILL.
    """
    state = home.load()
    if state is None:
        return
    end(state.processes)
    _stop_ray(home)
    end_marked(state.instance)
    home.state_file.unlink(missing_ok=True)


def _stop_ray(home: Home) -> None:
    ray = RayProcess.load(home.ray)
    if ray is not None:
        stop_ray(ray)


class _Starter:
    """One start: its state is saved after every step, so that it can be undone from anywhere."""

    def __init__(self, home: Home, plan: Plan, say: Say) -> None:
        self._home = home
        self._plan = plan
        self._say = say
        self._state = SystemState(instance=secrets.token_hex(16))

    def run(self, report: Report) -> SystemState:
        self._home.save(self._state)
        ports = _ports(self._home, ("keysvc", "serve", *self._plan.proxies))
        with ThreadPoolExecutor(1) as pool:
            self._say("starting the key service (SQLite, local wrapping key) and Ray")
            ray = pool.submit(self._start_ray, ports["serve"])
            try:
                url = self._start_keysvc(ports["keysvc"])
                self._say(f"creating tenants {', '.join(self._plan.tenants)}, their models and keys")
                for tenant in self._plan.tenants:
                    ensure_tenant(self._home, url, tenant, self._plan.model)
                self._start_operator(url, ray.result())
            except BaseException:
                _stop_ray(self._home)  # else leaving this block would wait until it is up
                raise
        self._say("making, deploying and verifying an encrypted replica for each tenant")
        await_active(self._home, url, self._plan.tenants, report, self._plan.timeout_s)
        for tenant in self._plan.proxies:
            self._start_proxy(tenant, url, ports[tenant])
        if self._plan.baseline and self._plan.otlp_endpoint is not None:
            self._start_canary(url)
        self._keep(replace(self._state, ready=True))
        return self._state

    def _keep(self, state: SystemState) -> None:
        self._state = state
        self._home.save(state)

    def _spawn(self, name: str, *command: str, **urls: str) -> Running:
        log = self._home.logs / f"{name}.log"
        running = spawn(name, [sys.executable, "-m", *command], log, self._state.instance)
        self._keep(self._state.plus(running, **urls))
        return running

    def _start_ray(self, port: int) -> RayProcess:
        env = {MARK: self._state.instance}
        return start_ray(self._home.ray, http_port=port, num_cpus=64, env=env)

    def _start_keysvc(self, port: int) -> str:
        place = ["--home", str(self._home.keysvc)]
        init = [sys.executable, "-m", "anamorph_keysvc.main", "init", *place]
        done = subprocess.run(init, capture_output=True, text=True, check=False, env=_marked(self._state))
        if done.returncode != 0:
            raise SetupError(f"the key service cannot be set up: {done.stderr.strip()[-400:]}")
        ready = self._home.root / "keysvc.port"
        ready.unlink(missing_ok=True)
        url = f"http://127.0.0.1:{port}"
        options = ["--port", str(port), "--port-file", str(ready), *self._telemetry()]
        running = self._spawn("key-service", "anamorph_keysvc.main", "serve", *place, *options, keysvc=url)
        await_file(ready, running, 60)
        return url

    def _start_operator(self, url: str, ray: RayProcess) -> None:
        model = self._plan.model
        options = {
            "keysvc": url,
            "key-file": self._home.platform_key,
            "ray-dashboard": ray.dashboard_url,
            "ray-token-file": ray.token_file,
            "serve-url": ray.serve_url,
            "store": self._home.store,
            "scratch": self._home.scratch,
            "allow-base": model.folder,
            "interval": self._plan.interval_s,
        }
        if self._plan.baseline:
            options["baseline"] = f"{MODEL}={model.folder},dtype={model.dtype},engine={model.engine}"
        if self._plan.materializer is not None:
            options["materializer"] = self._plan.materializer
        flags = [f"--{name}={value}" for name, value in options.items()]
        flags += self._telemetry()
        serve, dashboard = ray.serve_url, ray.dashboard_url
        self._spawn("operator", "anamorph_operator.main", "local", *flags, serve=serve, dashboard=dashboard)

    def _telemetry(self) -> list[str]:
        endpoint = self._plan.otlp_endpoint
        return [] if endpoint is None else [f"--otlp-endpoint={endpoint}"]

    def _start_canary(self, url: str) -> None:
        options = {"keysvc": url, "key-file": self._home.platform_key, "serve-url": self._state.urls["serve"]}
        flags = [f"--{option}={value}" for option, value in options.items()]
        self._spawn("canary", "anamorph.cli", "canary", "watch", *flags, *self._telemetry())

    def _start_proxy(self, tenant: str, url: str, port: int) -> None:
        self._say(f"starting {tenant}'s local OpenAI proxy")
        name, ready = f"proxy-{tenant}", self._home.root / f"proxy-{tenant}.port"
        ready.unlink(missing_ok=True)
        options = {
            "keysvc": url,
            "tenant": tenant,
            "api-key-file": self._home.api_key(tenant, "client"),
            "model": f"{MODEL}={self._plan.model.folder}",
            "port": port,
            "port-file": ready,
        }
        flags = [f"--{option}={value}" for option, value in options.items()]
        flags += self._telemetry()
        place = {name: f"http://127.0.0.1:{port}/v1"}
        await_file(ready, self._spawn(name, "anamorph.cli", "proxy", *flags, **place), 90)


def _marked(state: SystemState) -> dict[str, str]:
    return os.environ | {MARK: state.instance}


def _ports(home: Home, names: tuple[str, ...]) -> dict[str, int]:
    """The home's own ports, drawn once: endpoints in the key service's records stay true.

    Raises:
        SetupError: somebody else listens on one of them now.
    """
    file = home.root / "ports.json"
    known: dict[str, int] = json.loads(file.read_text()) if file.exists() else {}
    fresh = [name for name in names if name not in known]
    known |= dict(zip(fresh, free_ports(len(fresh)), strict=True))
    write_private(file, json.dumps(known))
    for name in names:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", known[name]))
            except OSError:
                raise SetupError(f"port {known[name]} ({name}) is taken; free it or delete {file}") from None
    return {name: known[name] for name in names}
