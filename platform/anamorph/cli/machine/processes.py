"""Starting processes that live on, and ending exactly those: never a name, never a reused pid.

Every process of a system carries its instance mark in its environment, and so does
whatever it starts. That finds the ones that nobody wrote down: Ray's workers, or a
child of an ``up`` that was killed between starting it and saying so.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from anamorph.cli.machine.home import Running
from anamorph.errors import SetupError

MARK = "ANAMORPH_INSTANCE"
# Jobs and engines share the cores of one machine: a thread of torch that waits must sleep, not spin.
COMMON = {"PYTHONUNBUFFERED": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def spawn(name: str, command: Sequence[str], log: Path, instance: str) -> Running:
    """Start a process in a session of its own, its output in a 0600 file.

    It is meant to outlive this process, hence no ``Popen``, which wants to see its child end.
    """
    flags = os.O_CREAT | os.O_WRONLY | os.O_APPEND
    pid = os.posix_spawn(
        command[0],
        list(command),
        os.environ | COMMON | {MARK: instance},
        setsid=True,
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, str(log), flags, 0o600),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ],
    )
    return Running(name, pid, psutil.Process(pid).create_time())


def alive(running: Running) -> bool:
    """Whether exactly this process still runs."""
    return _find(running) is not None


def end(running: Sequence[Running], grace_s: float = 8) -> None:
    """End these processes: SIGTERM, and SIGKILL to those that stay longer than the grace."""
    _end([process for one in running if (process := _find(one)) is not None], grace_s)


def end_marked(instance: str, grace_s: float = 3) -> None:
    """End every process that carries the instance's mark, except this one.

    Raises:
        SetupError: one survives SIGKILL.
    """
    for _ in range(10):
        left = marked(instance)
        if not left:
            return
        _end(left, grace_s)
        grace_s = 0
    raise SetupError(f"processes {[process.pid for process in marked(instance)]} do not end")


def marked(instance: str) -> list[psutil.Process]:
    """Live processes that carry the instance's mark, except this one."""
    found = []
    for process in psutil.process_iter():
        try:
            mine = process.environ().get(MARK) == instance and process.pid != os.getpid()
            if mine and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def await_file(path: Path, running: Running, timeout_s: float) -> str:
    """Content of a file that a process writes once it is ready.

    Raises:
        SetupError: the process ended, or took too long.
    """
    deadline = time.monotonic() + timeout_s
    while not path.exists():
        if not alive(running) or time.monotonic() > deadline:
            raise SetupError(f"the {running.name} did not start; its log says why")
        time.sleep(0.05)
    return path.read_text().strip()


def _find(running: Running) -> psutil.Process | None:
    try:
        process = psutil.Process(running.pid)
        same = abs(process.create_time() - running.started) < 1
        return process if same and process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.NoSuchProcess:
        return None


def _end(processes: list[psutil.Process], grace_s: float) -> None:
    """Signal through psutil, which checks the start time again before each signal."""
    for process in processes:
        _quietly(process.terminate)
    _, left = psutil.wait_procs(processes, timeout=grace_s)
    for process in left:
        _quietly(process.kill)
    psutil.wait_procs(left, timeout=5)


def _quietly(signal: object) -> None:
    try:
        signal()  # type: ignore[operator]
    except psutil.NoSuchProcess:
        return
