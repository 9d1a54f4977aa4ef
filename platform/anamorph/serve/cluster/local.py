"""One Ray on one machine: started on loopback, watched as a session, stopped without a trace.

How ``anamorph up`` uses it::

    ray = start_ray(home, num_cpus=4)              # ~10 s: Ray and Serve answer, no application yet
    httpx.put(f"{ray.dashboard_url}/api/serve/applications/", headers=ray.headers(), json={...})
    ...                                            # ray.serve_url is where clients go
    stop_ray(RayProcess.load(home))                # from any process, also after a crash of the starter

Every process of a cluster shares one POSIX session, whose number is the pid of
``ray start --block``. Children that are reparented keep it, so stopping needs neither
process names nor ``ray stop`` (which would take other people's clusters along).

Only the standard library, psutil and httpx: importing this loads no Ray.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from anamorph.errors import SetupError
from anamorph.serve.cluster.session import Session

STATE_FILE = "ray.json"
START_LOG = "ray-start.log"
# On a busy machine Ray gives up after 30 s of waiting for its own parts, and a port that was
# free when it was drawn may be taken by then: both are worth another try.
ATTEMPTS = 3
# Ray puts Unix sockets 60 characters below its temporary folder; a socket's path ends at 107.
LONGEST_TEMP_DIR = 46
# Above those of well-known services, below those that Linux gives out by itself.
PORTS = range(20_000, 32_000)
# What Ray and its workers may inherit. Everything else, credentials above all, stays outside.
INHERITED = frozenset({"PATH", "HOME", "LANG", "LC_ALL", "TZ", "USER", "PYTHONPATH", "LD_LIBRARY_PATH"})
INHERITED_PREFIXES = ("CUDA_", "NVIDIA_", "OTEL_", "OMP_")


@dataclass(frozen=True)
class RayProcess:
    """A running cluster: enough to use it and to stop it from another process.

    Args:
        pid: leader of the session, ``ray start --block``; it dies when a part of the cluster dies.
        started: the leader's start time (seconds since the epoch), against a reused pid.
        gcs_address: ``127.0.0.1:port``, for ``ray.init(address=…)``.
        dashboard_url: base URL of the REST API; every call needs ``headers()``.
        serve_url: base URL of the applications.
        token_file: 0600 file with the cluster's token.
        temp_dir: Ray's own folder, removed by ``stop_ray``.
    """

    pid: int
    started: float
    home: Path
    gcs_address: str
    dashboard_url: str
    serve_url: str
    token_file: Path
    temp_dir: Path

    def headers(self) -> dict[str, str]:
        """Authorization header of the dashboard's REST API."""
        return {"Authorization": f"Bearer {self.token_file.read_text().strip()}"}

    def http_options(self) -> dict[str, Any]:
        """``http_options`` for every ``PUT`` of applications; Serve warns when they differ."""
        return {"host": "127.0.0.1", "port": int(self.serve_url.rpartition(":")[2])}

    def alive(self) -> bool:
        """Whether the session's leader runs; it ends itself when GCS, raylet or dashboard die."""
        return self._session().led()

    def pids(self) -> list[int]:
        """Every live process of the cluster, workers included."""
        return self._session().members()

    def _session(self) -> Session:
        return Session(self.pid, self.started)

    def save(self) -> None:
        """Write ``home/ray.json`` (nothing secret), from which ``load`` reads it back."""
        text = json.dumps({k: str(v) if isinstance(v, Path) else v for k, v in asdict(self).items()})
        partial = self.home / f"{STATE_FILE}.partial"
        partial.write_text(text)
        partial.replace(self.home / STATE_FILE)

    @classmethod
    def load(cls, home: Path) -> RayProcess | None:
        """The cluster last started with this home, alive or not; None if there was none."""
        try:
            fields = json.loads((home / STATE_FILE).read_text())
        except FileNotFoundError:
            return None
        paths = {name: Path(fields[name]) for name in ("home", "token_file", "temp_dir")}
        return cls(**{**fields, **paths})


def start_ray(
    home: Path,
    *,
    http_port: int = 0,
    num_cpus: int = 8,
    object_store_bytes: int = 100_000_000,
    env: Mapping[str, str] | None = None,
    timeout_s: float = 180,
) -> RayProcess:
    """Start Ray and Serve on 127.0.0.1 and wait until both answer.

    Args:
        home: folder of this installation; receives ``ray.json``, ``ray-token`` and ``ray-start.log``.
        http_port: port of the applications; 0 picks a free one.
        num_cpus: logical CPUs. Serve's controller and each application take a fraction or one of
            these: what they limit is placement, not threads.
        object_store_bytes: shared memory for Ray's objects; Anamorph hardly uses it.
        env: further environment of the cluster's processes. Never a secret: all of it is readable
            through Ray.
        timeout_s: longest wait.

    Raises:
        SetupError: a cluster of this home still runs, or Ray did not come up; nothing is left running.
    """
    home.mkdir(parents=True, exist_ok=True)
    previous = RayProcess.load(home)
    if previous is not None and previous.pids():
        raise SetupError(f"Ray of {home} is still running; stop it first")
    deadline = time.monotonic() + timeout_s
    for _ in range(ATTEMPTS):
        ports = free_ports(9)
        ports[0] = http_port or ports[0]
        process = _spawn(home, ports, num_cpus, object_store_bytes, env or {})
        if _came_up(process, deadline):
            return process
        if time.monotonic() > deadline:
            break
    raise SetupError(f"Ray did not start; see {home / START_LOG}")


def _came_up(process: RayProcess, deadline: float) -> bool:
    """Whether it answers in time; what does not is stopped."""
    up = False
    try:
        process.save()
        up = _await_serve(process, deadline)
    finally:
        if not up:
            stop_ray(process)
    return up


def stop_ray(process: RayProcess, *, grace_s: float = 2) -> None:
    """End every process of the cluster and remove its files; no-op when nothing is left.

    The leader gets SIGTERM and ``grace_s`` seconds to end the others, then all that
    remains gets SIGKILL until the session is empty. Logs move to ``home/ray-logs``.

    Raises:
        SetupError: a process survives SIGKILL.
    """
    session = process._session()
    try:
        session.end(grace_s)
    except TimeoutError as error:
        raise SetupError(f"Ray does not end: {error}") from error
    _tidy(process)


def _spawn(
    home: Path, ports: list[int], num_cpus: int, object_store_bytes: int, env: Mapping[str, str]
) -> RayProcess:
    temp_dir = Path(tempfile.mkdtemp(prefix="anamorph-ray-"))
    if len(str(temp_dir)) > LONGEST_TEMP_DIR:
        temp_dir.rmdir()
        raise SetupError(f"Ray needs a short temporary folder, {temp_dir} is too long; set TMPDIR=/tmp")
    token_file = _new_token(home / "ray-token")
    serve, gcs, dashboard = ports[:3]
    argv = _command(ports, num_cpus, object_store_bytes, temp_dir)
    pid = os.posix_spawn(
        sys.executable, argv, _environment(token_file, ports, env), setsid=True, file_actions=_log_to(home)
    )
    return RayProcess(
        pid=pid,
        started=psutil.Process(pid).create_time(),
        home=home,
        gcs_address=f"127.0.0.1:{gcs}",
        dashboard_url=f"http://127.0.0.1:{dashboard}",
        serve_url=f"http://127.0.0.1:{serve}",
        token_file=token_file,
        temp_dir=temp_dir,
    )


def _command(ports: list[int], num_cpus: int, object_store_bytes: int, temp_dir: Path) -> list[str]:
    _, gcs, dashboard, agent, agent_grpc, metrics, runtime_env, client, _ = ports
    options = {
        "node-ip-address": "127.0.0.1",
        "port": gcs,
        "include-dashboard": "true",
        "dashboard-host": "127.0.0.1",
        "dashboard-port": dashboard,
        "dashboard-agent-listen-port": agent,
        "dashboard-agent-grpc-port": agent_grpc,
        "metrics-export-port": metrics,
        "runtime-env-agent-port": runtime_env,
        "ray-client-server-port": client,
        "min-worker-port": 0,
        "max-worker-port": 0,
        "num-cpus": num_cpus,
        "object-store-memory": object_store_bytes,
        "include-log-monitor": "false",
        "temp-dir": temp_dir,
    }
    flags = ["--head", "--block", "--no-monitor", "--disable-usage-stats"]
    ray = [sys.executable, "-m", "ray.scripts.scripts", "start"]
    return [*ray, *flags, *(f"--{name}={value}" for name, value in options.items())]


def _environment(token_file: Path, ports: list[int], extra: Mapping[str, str]) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k in INHERITED or k.startswith(INHERITED_PREFIXES)}
    return {
        **kept,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_file),
        "RAY_USAGE_STATS_ENABLED": "0",
        # With "no multi-node cluster" Ray keeps 127.0.0.1 as the node's address and binds nothing
        # wider; without it, the loopback address is replaced by the machine's outer one.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "DASHBOARD_METRIC_PORT": str(ports[8]),
        "RAY_SERVE_LOG_TO_STDERR": "0",
        # Ray's own text errors leave the proxy in OpenAI's shape.
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "anamorph.serve.cluster.proxy:middlewares",
        # Several engines share the cores of one machine: a thread that waits for another must sleep,
        # not spin (measured under load: 59 ms instead of 0.2 ms for one small product).
        "OMP_WAIT_POLICY": "PASSIVE",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **extra,
    }


def _log_to(home: Path) -> list[tuple[Any, ...]]:
    log = str(home / START_LOG)
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    return [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_OPEN, 1, log, flags, 0o600),
        (os.POSIX_SPAWN_DUP2, 1, 2),
    ]


def _new_token(path: Path) -> Path:
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_hex(32))
    return path.absolute()


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody listens on now, all different; another program may still take one.

    They lie below those that systems give out by themselves: Ray's own processes take such,
    and one of them would answer in place of what comes to listen here a moment later.

    Raises:
        SetupError: too few ports are free.
    """
    with ExitStack() as stack:
        found: list[int] = []
        for port in secrets.SystemRandom().sample(PORTS, len(PORTS)):
            if len(found) == count:
                break
            one = stack.enter_context(socket.socket())
            with suppress(OSError):
                one.bind(("127.0.0.1", port))
                found.append(port)
    if len(found) < count:
        raise SetupError(f"fewer than {count} ports of 127.0.0.1 are free: end what holds them")
    return found


def _await_serve(process: RayProcess, deadline: float) -> bool:
    """Whether Ray and Serve answer before the deadline, and before Ray gives up."""
    # The empty list starts Serve's controller and proxy with these HTTP options, once and for all.
    body = {"proxy_location": "HeadOnly", "http_options": process.http_options(), "applications": []}
    with httpx.Client(timeout=30, trust_env=False) as http:
        while not _ready(http, process, body):
            if not process.alive() or time.monotonic() > deadline:
                return False
            time.sleep(0.1)
    return True


def _ready(http: httpx.Client, process: RayProcess, body: dict[str, Any]) -> bool:
    url = f"{process.dashboard_url}/api/serve/applications/"
    with suppress(httpx.TransportError):
        return http.put(url, headers=process.headers(), json=body).is_success
    return False


def _tidy(process: RayProcess) -> None:
    logs = process.home / "ray-logs"
    newest = process.temp_dir / "session_latest" / "logs"
    if newest.is_dir():
        shutil.rmtree(logs, ignore_errors=True)
        shutil.copytree(newest.resolve(), logs, ignore_dangling_symlinks=True)
    shutil.rmtree(process.temp_dir, ignore_errors=True)
    process.token_file.unlink(missing_ok=True)
    (process.home / STATE_FILE).unlink(missing_ok=True)
