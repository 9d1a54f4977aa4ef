"""All processes of one POSIX session, found and ended whatever became of their parents.

Children that are reparented keep their session, and the kernel gives a session's number
to no new process while a member lives. So a leader's pid and start time name the whole
tree, without process names and across a kill -9 of any member.
"""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from dataclasses import dataclass

import psutil


@dataclass(frozen=True)
class Session:
    """A session by its leader.

    Args:
        leader: pid of the process that began it, which is the session's number.
        started: the leader's start time, seconds since the epoch.
    """

    leader: int
    started: float

    def led(self) -> bool:
        """Whether the leader still runs."""
        return self._leads(zombie=False)

    def members(self) -> list[int]:
        """Every live process of the session."""
        # A leader with another start time means that ours is gone and its number is somebody else's.
        if psutil.pid_exists(self.leader) and not self._leads(zombie=True):
            return []
        return [pid for pid in psutil.pids() if self._has(pid)]

    def end(self, grace_s: float, patience_s: float = 20) -> None:
        """SIGTERM to the leader, ``grace_s`` seconds for it to end the others, then SIGKILL to all.

        Raises:
            TimeoutError: a process survives SIGKILL for ``patience_s`` seconds.
        """
        if self.led():
            _signal([self.leader], signal.SIGTERM)
            self._wait(grace_s)
        deadline = time.monotonic() + patience_s
        while remaining := self.members():
            if time.monotonic() > deadline:
                raise TimeoutError(f"processes {remaining} survive SIGKILL")
            _signal(remaining, signal.SIGKILL)
            self._wait(1)
        self._reap()

    def _leads(self, *, zombie: bool) -> bool:
        try:
            leader = psutil.Process(self.leader)
            same = abs(leader.create_time() - self.started) < 1
            return same and (zombie or leader.status() != psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            return False

    def _has(self, pid: int) -> bool:
        try:
            return os.getsid(pid) == self.leader and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
        except (ProcessLookupError, psutil.NoSuchProcess):
            return False

    def _wait(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while self.members() and time.monotonic() < deadline:
            self._reap()
            time.sleep(0.05)

    def _reap(self) -> None:
        # Only the process that began the session is its leader's parent.
        with suppress(ChildProcessError):
            os.waitpid(self.leader, os.WNOHANG)


def _signal(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)
