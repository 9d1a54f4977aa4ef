"""vLLM in its own environment, as child processes: the stock server, and an endpoint of our engine."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from tests.servers.process import Program, free_port

PYTHON = "ANAMORPH_VLLM_PYTHON"
ENDPOINT = Path(__file__).with_name("vllm_endpoint.py")
# vLLM alone takes a minute and a half on two busy cores.
PATIENCE_S = 300.0


def vllm_python() -> Path:
    """The interpreter of vLLM's environment; the calling test is skipped, with the remedy, without one."""
    named = os.environ.get(PYTHON)
    if named is None:
        pytest.skip(
            f"needs vLLM in an environment of its own: make test-vllm, or name its Python in {PYTHON}"
        )
    return Path(named).absolute()


def environment(python: Path, home: Path) -> dict[str, str]:
    """Nothing of ours but the interpreter's place: no network settings, caches in ``home``."""
    path = f"{python.parent}:/usr/bin:/bin"
    return {"PATH": path, "HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}


@dataclass
class VllmProcess:
    """A program that answers HTTP on ``port`` once it is ready, and the processes that it starts."""

    folder: Path
    port: int = field(default_factory=free_port)
    pid: int = 0
    _program: Program = field(init=False, repr=False)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        return (self.folder / "vllm.log").read_text(errors="replace")

    def start(self, command: list[str], environment: dict[str, str], health: str) -> None:
        self._program = Program(command, self.folder / "vllm.log", environment, PATIENCE_S)
        self._program.start(lambda: self._answers(health))
        self.pid = self._program.pid

    def stop(self) -> None:
        self._program.stop()

    def kill(self) -> None:
        """End all of it at once, also what a test has stopped."""
        left = self.processes()
        self.stop()
        for one in left:
            with suppress(psutil.NoSuchProcess):
                one.kill()

    def processes(self) -> list[psutil.Process]:
        """What it started and what those started, whatever has become of their parents."""
        return [one for one in psutil.process_iter() if _session(one) == self.pid and one.pid != self.pid]

    def _answers(self, path: str) -> bool:
        try:
            return httpx.get(self.url + path, timeout=5, trust_env=False).is_success
        except httpx.TransportError:
            return False


def _session(process: psutil.Process) -> int | None:
    try:
        return None if process.status() == psutil.STATUS_ZOMBIE else os.getsid(process.pid)
    except (psutil.NoSuchProcess, ProcessLookupError):
        return None


def stock_server(folder: Path, model: Path, **options: str) -> VllmProcess:
    """The stock OpenAI-compatible server on a folder, as vLLM's documentation starts it, ids only."""
    python = vllm_python()
    server = VllmProcess(folder)
    flags = {"model": str(model), "host": "127.0.0.1", "port": str(server.port), **options}
    arguments = [item for name, value in flags.items() for item in (f"--{name}", value)]
    switches = ["--tokens-only", "--enforce-eager", "--enable-prompt-tokens-details"]
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server", *arguments, *switches]
    own = {"VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    server.start(command, {**environment(python, folder), **own}, "/health")
    return server


def endpoint(folder: Path, settings: dict[str, Any], jwks: list[dict[str, Any]]) -> VllmProcess:
    """One application with the vLLM engine, without Ray."""
    python = vllm_python()
    server = VllmProcess(folder)
    state = {"status": "serving", "jwks": jwks}
    given = {"settings": settings, "state": state, "port": server.port, "threads": os.cpu_count()}
    (folder / "endpoint.json").write_text(json.dumps(given))
    command = [str(python), str(ENDPOINT), str(folder / "endpoint.json")]
    server.start(command, environment(python, folder), "/healthz")
    return server
