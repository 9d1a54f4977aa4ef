"""What signals do to a command: they end it the way Ctrl-C does, and never twice; or at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def end_as_interrupt() -> None:
    """Raise ``KeyboardInterrupt`` on any of the three signals, so that ``finally`` blocks run.

    Also where the shell had SIGINT ignored, as it does for background jobs.
    """
    for number in _ENDING:
        signal.signal(number, _interrupt)


def end_at_once() -> None:
    """SIGTERM ends the process with 143, and nothing is tidied up: for work that may be killed at any moment.

    Said explicitly because the kernel ignores a SIGTERM without a handler to the first process of
    a container: a pod that is deleted would stay until its grace period is over.
    """
    signal.signal(signal.SIGTERM, _end)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Ignore the three signals while something is being cleaned up."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in _ENDING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - the signal module's signature
    raise KeyboardInterrupt


def _end(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - the signal module's signature
    os._exit(128 + number)
