"""Ends database connections that a deadline has passed over.

A driver waits without end for a server whose host has gone silent. Shutting the socket
down makes that wait fail, so the thread that sits in it ends with an ordinary error.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_TICK_S = 0.1


class Watchdog:
    """Watches sockets in one thread, which starts with the first and ends with ``close``."""

    def __init__(self) -> None:
        self._ends_at: dict[socket.socket, float] = {}
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    @contextmanager
    def watch(self, descriptor: int, seconds: float) -> Iterator[None]:
        """Shut the socket down if the block takes longer than ``seconds``."""
        # A descriptor of our own: the driver may close its own in the block, and its number go to another.
        with socket.socket(fileno=os.dup(descriptor)) as copy:
            self._add(copy, time.monotonic() + seconds)
            try:
                yield
            finally:
                with self._lock:
                    self._ends_at.pop(copy, None)

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join()

    def _add(self, copy: socket.socket, ends_at: float) -> None:
        with self._lock:
            self._ends_at[copy] = ends_at
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="database-watchdog", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        while not self._closed.wait(_TICK_S):
            now = time.monotonic()
            # Under the lock: a socket that left the block may serve somebody else already.
            with self._lock:
                for copy in [known for known, end in self._ends_at.items() if end < now]:
                    del self._ends_at[copy]
                    with suppress(OSError):
                        copy.shutdown(socket.SHUT_RDWR)
