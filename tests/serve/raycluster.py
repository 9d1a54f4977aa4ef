"""A real Ray with our applications on it, as the operator would drive it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import jwt
import psutil
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from anamorph.serve.local_ray import RayProcess
from anamorph.wire.inference import KEY_ID_HEADER
from anamorph.wire.serving import APP_IMPORT_PATH, DOOR_IMPORT_PATH, app_name, route_prefix

KCV = "0123456789abcdef"


def until(what: str, condition: Callable[[], Any], seconds: float = 90) -> Any:
    """Wait for something to become true; fails by name."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {seconds} s in vain for {what}"
        time.sleep(0.1)
    return value


@dataclass
class Cluster:
    """One Ray, one issuer of tokens, one list of applications."""

    ray: RayProcess
    jwks: list[dict[str, str]]
    key: Ed25519PrivateKey
    apps: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def _api(self) -> str:
        return f"{self.ray.dashboard_url}/api/serve/applications/"

    def put(self) -> None:
        body = {
            "proxy_location": "HeadOnly",
            "http_options": self.ray.http_options(),
            "applications": list(self.apps.values()),
        }
        response = httpx.put(self._api, headers=self.ray.headers(), json=body, timeout=60)
        assert response.status_code == 200, response.text

    def state(self, name: str) -> dict[str, Any]:
        found = httpx.get(self._api, headers=self.ray.headers(), timeout=30).json()["applications"]
        return dict(found.get(name, {"status": "ABSENT"}))

    def deploy(self, version: int = 1, **args: Any) -> str:
        """Put one application of ``acme/smol`` on the list and write it; returns its name."""
        name = app_name("acme", "smol", version)
        defaults: dict[str, Any] = {
            "tenant": "acme",
            "model": "smol",
            "version": version,
            "replica": "fake:?vocab_size=500&delay_ms=2",
            "key_id": f"acme.smol.v{version}.{KCV}",
            "engine": "fake",
            "context_length": 2000,
        }
        self.apps[name] = {
            "name": name,
            "route_prefix": route_prefix("acme", "smol", version),
            "import_path": APP_IMPORT_PATH,
            "args": {**defaults, **args},
            "deployments": [{"name": "engine", "user_config": {"status": "serving", "jwks": self.jwks}}],
        }
        self.put()
        return name

    def serve(self, version: int = 1, **args: Any) -> str:
        """``deploy`` and wait until it runs; returns its endpoint."""
        name = self.deploy(version, **args)
        until(name, lambda: self.state(name)["status"] == "RUNNING")
        return self.endpoint(version)

    def remove(self, version: int) -> None:
        name = app_name("acme", "smol", version)
        del self.apps[name]
        self.put()
        until("deletion", lambda: self.state(name)["status"] == "ABSENT")

    def door(self, routes: list[dict[str, Any]]) -> None:
        state = {"jwks": self.jwks, "routes": [{"tenant": "acme", "model": "smol", **r} for r in routes]}
        deployment = {"name": "door", "user_config": state}
        self.apps["door"] = {
            "name": "door",
            "route_prefix": "/",
            "import_path": DOOR_IMPORT_PATH,
            "args": {},
            "deployments": [deployment],
        }
        self.put()
        until("the door", lambda: self.state("door")["status"] == "RUNNING")

    def endpoint(self, version: int = 1) -> str:
        return self.ray.serve_url + route_prefix("acme", "smol", version)

    def token(self, **claims: Any) -> str:
        now = int(time.time())
        said = {"iss": "anamorph", "aud": "inference", "tenant": "acme", "model": "smol", "sub": "client"}
        times = {"iat": now, "exp": now + 600}
        headers = {"kid": self.jwks[0]["kid"]}
        return jwt.encode({**said, **times, **claims}, self.key, algorithm="EdDSA", headers=headers)

    def headers(self, version: int = 1, **claims: Any) -> dict[str, str]:
        key_id = self.apps[app_name("acme", "smol", version)]["args"]["key_id"]
        return {"Authorization": f"Bearer {self.token(**claims)}", KEY_ID_HEADER: key_id}

    def usage(self, version: int = 1) -> dict[str, Any]:
        headers = self.headers(version, sub="operator")
        return dict(httpx.get(f"{self.endpoint(version)}/usage", headers=headers, timeout=30).json())

    def kill_replica(self, version: int = 1) -> int:
        """kill -9 the process that serves a version; returns its pid."""
        pid = until("a replica", lambda: self._replica(version))
        os.kill(pid, signal.SIGKILL)
        return int(pid)

    def _replica(self, version: int) -> int | None:
        # Ray titles a replica's process by application, deployment and what it is doing.
        ours = set(self.ray.pids())
        for process in psutil.process_iter(["cmdline"]):
            title = " ".join(process.info["cmdline"] or [])
            if process.pid in ours and title.startswith("ray::") and f"v{version}:engine" in title:
                return process.pid
        return None

    def logs(self) -> str:
        """Everything that Ray and our code have logged so far."""
        files = [p for p in (self.ray.temp_dir / "session_latest").rglob("*") if p.is_file()]
        texts = [p for p in files if p.suffix in {".log", ".out", ".err", ".json"}]
        return "\n".join(_read(path) for path in texts)


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:  # rotated away in between
        return ""
