"""One bash that runs scripts one after the other, as a reader's terminal does.

What a script exports, defines or starts in the background is there for the next one.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

_LOOK_S = 0.05


class ScriptFailed(AssertionError):
    """A script ended with an error; says what it printed."""


class Shell:
    """Made by :func:`shell`."""

    def __init__(self, process: subprocess.Popen[str], folder: Path) -> None:
        self._process = process
        self._folder = folder
        self._count = 0

    def run(self, script: str, within_s: float) -> str:
        """Run a script to its end; return what it printed on both outputs.

        The shell ends with the first command that fails.

        Raises:
            ScriptFailed: a command of it failed, or it has not ended ``within_s`` seconds.
        """
        self._count += 1
        file, output, done = (self._folder / f"{self._count}.{end}" for end in ("sh", "out", "done"))
        file.write_text(script)
        assert self._process.stdin is not None
        # Output goes to a file: what stays in the background would hold a pipe open.
        line = f"source {shlex.quote(str(file))} > {shlex.quote(str(output))} 2>&1 < /dev/null"
        try:
            # Two commands: in a list with && bash would not end with the first one that fails.
            self._process.stdin.write(f"{line}\ntouch {shlex.quote(str(done))}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise ScriptFailed("the shell has ended with an earlier script") from None
        why = self._wait(done, within_s)
        printed = output.read_text(errors="replace") if output.exists() else ""
        if why is not None:
            raise ScriptFailed(f"{why}:\n{script}\nprinted\n{printed}")
        return printed

    def _wait(self, done: Path, within_s: float) -> str | None:
        """Why the script did not come to its end, if it did not."""
        end = time.monotonic() + within_s
        while not done.exists():
            if self._process.poll() is not None and not done.exists():
                return f"ended with {self._process.returncode}"
            if time.monotonic() > end:
                return f"not ended within {within_s:.0f} s"
            time.sleep(_LOOK_S)
        return None


@contextmanager
def shell(folder: Path, environment: Mapping[str, str]) -> Iterator[Shell]:
    """A bash in ``folder``; it and all that it has started end with the block."""
    with tempfile.TemporaryDirectory() as scratch:
        process = subprocess.Popen(
            ["bash", "-e", "-o", "pipefail", "-s"],
            stdin=subprocess.PIPE,
            cwd=folder,
            env=dict(environment),
            text=True,
            start_new_session=True,  # so that it can be ended with its background
        )
        try:
            yield Shell(process, Path(scratch))
        finally:
            _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    with suppress(ProcessLookupError):  # nothing of it is left
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdin is not None:
        process.stdin.close()
