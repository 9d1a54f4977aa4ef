"""A server program as a child process: started, waited for until it answers, stopped by its id."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from anamorph.serve.cluster.local import free_ports

# A busy machine takes its time: nothing is measured here, this only ends a start that never succeeds.
PATIENCE_S = 90.0
MARK = "ANAMORPH_CI_MARK"


def free_port() -> int:
    """A loopback TCP port that nothing listens on, the same for as long as a test restarts its server.

    Raises:
        SetupError: none is free.
    """
    return free_ports(1)[0]


@dataclass
class Program:
    """One program; ``start`` and ``stop`` may alternate.

    Args:
        command: the program and its arguments.
        log: the file to which its output is added.
        environment: its whole environment; ours where None.
        patience_s: how long it may take to start or to end.
    """

    command: Sequence[str]
    log: Path
    environment: Mapping[str, str] | None = None
    patience_s: float = PATIENCE_S
    _child: subprocess.Popen[bytes] | None = field(default=None, init=False, repr=False)

    @property
    def pid(self) -> int:
        assert self._child is not None, f"{self.command[0]} is not running"
        return self._child.pid

    @property
    def running(self) -> bool:
        return self._child is not None and self._child.poll() is None

    def start(self, ready: Callable[[], bool]) -> None:
        """Start it and wait until ``ready``; it has ended again where that fails.

        Raises:
            RuntimeError: it ended by itself, or is not ready in time; with the end of its log.
        """
        assert not self.running, f"{self.command[0]} runs already"
        # A session of its own: Ctrl-C ends the tests, and these then stop the server in order.
        with self.log.open("ab") as log:
            self._child = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment(),
                start_new_session=True,
            )
        try:
            self.wait_until(ready)
        except BaseException:
            self.stop(signal.SIGKILL)
            raise

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        """Send a signal and wait for the end; where it does not come, kill. Twice does no harm."""
        if self._child is None:
            return
        self._child.send_signal(how)
        try:
            self._child.wait(self.patience_s)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        self._child = None

    def wait_until(self, ready: Callable[[], bool]) -> None:
        """Wait for something of the running program; RuntimeError as ``start``'s."""
        end = time.monotonic() + self.patience_s
        while not ready():
            if not self.running:
                raise RuntimeError(self._complaint("ended while it started"))
            if time.monotonic() > end:
                raise RuntimeError(self._complaint(f"is not ready after {self.patience_s:.0f} s"))
            time.sleep(0.05)

    def _environment(self) -> dict[str, str] | None:
        if self.environment is None:
            return None
        # By its mark .ci/run finds what outlives the tests.
        mark = {name: os.environ[name] for name in (MARK,) if name in os.environ}
        return {**mark, **self.environment}

    def _complaint(self, what: str) -> str:
        end = self.log.read_text(errors="replace")[-3000:]
        return f"{shlex.join(self.command)} {what}; its log ends:\n{end}"
