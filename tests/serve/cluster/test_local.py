"""Starting and stopping one Ray on one machine, whatever is killed in between."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import httpx
import psutil
import pytest

from anamorph.errors import SetupError
from anamorph.serve.cluster.local import RayProcess, start_ray, stop_ray

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(300)]


def addresses(ray: RayProcess) -> set[str]:
    """Addresses that processes of the cluster listen on."""
    ours = set(ray.pids())
    listening = (c for c in psutil.net_connections("inet") if c.status == psutil.CONN_LISTEN)
    return {c.laddr.ip.removeprefix("::ffff:") for c in listening if c.pid in ours}


def running(pid: int, name: str) -> bool:
    """Whether this very process still runs; one that only waits for its parent's notice does not."""
    try:
        process = psutil.Process(pid)
        return bool(process.name() == name and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def environment(pid: int) -> dict[str, str]:
    """What a process inherited; nothing for one that has just ended."""
    try:
        return dict(psutil.Process(pid).environ())
    except psutil.NoSuchProcess:
        return {}


def test_a_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loopback only, token required, no foreign environment; a second start refuses; stop leaves nothing."""
    monkeypatch.setenv("ANAMORPH_CANARY_SECRET", "must-not-be-inherited")
    ray = start_ray(tmp_path, num_cpus=2)
    try:
        assert addresses(ray) == {"127.0.0.1"}
        assert "ANAMORPH_CANARY_SECRET" not in psutil.Process(ray.pid).environ()
        assert not any("ANAMORPH_CANARY_SECRET" in environment(pid) for pid in ray.pids())
        api = f"{ray.dashboard_url}/api/serve/applications/"
        with httpx.Client(timeout=60) as http:
            assert http.get(api).status_code == 401
            assert http.get(api, headers={"Authorization": "Bearer wrong"}).status_code == 403
            assert http.get(api, headers=ray.headers()).json()["http_options"]["host"] == "127.0.0.1"
            assert http.get(f"{ray.serve_url}/nothing").json()["error"]["code"] == "not_found"
        assert ray.token_file.stat().st_mode & 0o777 == 0o600
        with pytest.raises(SetupError, match="still running"):
            start_ray(tmp_path)
        assert RayProcess.load(tmp_path) == ray
    finally:
        stop_ray(ray)
    assert not ray.alive()
    assert ray.pids() == []
    assert not ray.temp_dir.exists()
    assert RayProcess.load(tmp_path) is None
    stop_ray(ray)  # a second stop finds nothing to do


@pytest.mark.parametrize("part", ["leader", "gcs_server", "raylet"])
def test_killed_parts_leave_nothing_behind(tmp_path: Path, part: str) -> None:
    """kill -9 of any part, the leader included: stop still finds and ends all the others."""
    ray = start_ray(tmp_path, num_cpus=2)
    try:
        names = {p: psutil.Process(p).name() for p in ray.pids()}
        (victim,) = [ray.pid] if part == "leader" else [p for p, name in names.items() if name == part]
        os.kill(victim, signal.SIGKILL)
    finally:
        stop_ray(ray)
    assert not [name for pid, name in names.items() if running(pid, name)]


def test_a_ray_that_gives_up_is_started_again(tmp_path: Path) -> None:
    """A cluster that dies while it starts leaves nothing behind, and another takes its place."""
    victims: list[int] = []

    def kill_the_first() -> None:
        while (first := RayProcess.load(tmp_path)) is None:
            time.sleep(0.01)
        victims.append(first.pid)
        os.kill(first.pid, signal.SIGKILL)

    killer = threading.Thread(target=kill_the_first)
    killer.start()
    ray = start_ray(tmp_path, num_cpus=2)
    try:
        killer.join()
        assert ray.alive()
        assert [ray.pid] != victims
    finally:
        stop_ray(ray)


def test_a_start_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    """No time to come up: an error that names the log, and no process."""
    with pytest.raises(SetupError, match=r"ray-start\.log"):
        start_ray(tmp_path, timeout_s=0.5)
    assert RayProcess.load(tmp_path) is None
    sessions = [p.cmdline() for p in psutil.process_iter() if p.status() != psutil.STATUS_ZOMBIE]
    assert not [c for c in sessions if any(str(tmp_path) in part for part in c)]
