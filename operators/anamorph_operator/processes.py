"""Materialisation jobs: each a process of its own, never outliving the operator.

A job reads its order, with the grant in it, from standard input: neither command
line nor environment ever holds a secret. It leads a process group, which is killed
as a whole; and the kernel kills it when the operator dies, however that happens.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from anamorph_operator.state import Job, Ref

DEFAULT_COMMAND = (sys.executable, "-m", "anamorph.cli", "materialize")
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class _Process:
    handle: asyncio.subprocess.Process
    attempts: int


class Processes:
    """Starts, watches and ends jobs.

    Args:
        command: the materialiser; it gets its order as one JSON object on standard input.
        now: clock.
    """

    def __init__(self, command: Sequence[str], now: Callable[[], datetime]) -> None:
        self._command = tuple(command)
        self._now = now
        self._processes: dict[Ref, _Process] = {}
        self._ended: dict[Ref, Job] = {}

    def observe(self) -> dict[Ref, Job]:
        """Every job that this process has started, ended ones with their exit status."""
        for ref, process in list(self._processes.items()):
            code = process.handle.returncode
            if code is not None:
                del self._processes[ref]
                self._ended[ref] = Job(False, process.attempts, code, self._now())
        running = {ref: Job(True, process.attempts) for ref, process in self._processes.items()}
        return self._ended | running

    async def start(self, ref: Ref, order: dict[str, Any]) -> None:
        """Start a job and hand it its order; an attempt is counted even if it cannot start."""
        attempts = self._ended[ref].attempts + 1 if ref in self._ended else 1
        self._ended[ref] = Job(False, attempts, None, self._now())
        handle = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=asyncio.subprocess.PIPE,
            start_new_session=True,
            preexec_fn=die_with_parent(),
        )
        self._processes[ref] = _Process(handle, attempts)
        assert handle.stdin is not None  # noqa: S101 - it is a pipe
        with suppress(BrokenPipeError, ConnectionResetError):  # it died; its exit status says why
            handle.stdin.write(json.dumps(order).encode())
            await handle.stdin.drain()
            handle.stdin.close()
            await handle.stdin.wait_closed()

    async def stop(self, ref: Ref, grace_s: float = 3) -> None:
        """End one job with everything it started, and wait until it is gone."""
        process = self._processes.get(ref)
        if process is None:
            return
        _signal_group(process.handle, signal.SIGTERM)
        with suppress(TimeoutError):
            await asyncio.wait_for(process.handle.wait(), grace_s)
        _signal_group(process.handle, signal.SIGKILL)
        await process.handle.wait()
        self.observe()
        # Stopping is our wish and no failure: it does not count as an attempt.
        self._ended[ref] = replace(self._ended[ref], attempts=process.attempts - 1)

    async def close(self) -> None:
        """End every job."""
        await asyncio.gather(*(self.stop(ref) for ref in list(self._processes)))


def _signal_group(handle: asyncio.subprocess.Process, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(handle.pid, number)


def die_with_parent() -> Callable[[], None] | None:
    """A ``preexec_fn`` after which the kernel kills the child when this process dies.

    Linux only (``prctl(2)``, ``PR_SET_PDEATHSIG``); elsewhere ``None``, and a job that
    outlives a killed operator ends on its void grant. To be called, and its result
    used, on the main thread: the kernel watches the thread that forks.
    """
    if not sys.platform.startswith("linux"):
        return None
    libc, parent = ctypes.CDLL(None, use_errno=True), os.getpid()

    def prepare() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died in between
            os._exit(1)

    return prepare
