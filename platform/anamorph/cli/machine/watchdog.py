"""Cleans up after a command that was killed: ``python -m anamorph.cli.machine.watchdog HOME [--remove]``.

It waits for the end of its standard input, which the kernel brings about however the
command at the other end dies, and then does what ``anamorph down`` does.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from anamorph.cli.machine.home import Home


@contextmanager
def watched(home: Home, *, remove: bool) -> Iterator[None]:
    """Run a block under a watchdog; at its end the watchdog does its work and is waited for."""
    command = [sys.executable, "-m", "anamorph.cli.machine.watchdog", str(home.root)]
    with subprocess.Popen(
        [*command, *(["--remove"] if remove else [])], stdin=subprocess.PIPE, start_new_session=True
    ) as process:
        try:
            yield
        finally:
            if process.stdin is not None:
                process.stdin.close()
            process.wait()


def main(arguments: list[str]) -> None:
    """Wait, then stop the system of the home named first."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.buffer.read()
    from anamorph.cli.machine.system import stop

    home = Home(Path(arguments[0]))
    stop(home)
    if "--remove" in arguments:
        shutil.rmtree(home.root, ignore_errors=True)


if __name__ == "__main__":
    main(sys.argv[1:])
