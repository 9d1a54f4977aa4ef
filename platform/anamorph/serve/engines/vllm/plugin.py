"""What vLLM loads as a plugin in each of its own processes: they end with whoever started them.

vLLM's processes wait for work and do not notice that the replica is gone: killed, it would
leave them behind with all their memory. A plugin is vLLM's own way in; nothing is patched.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading

NAME = "anamorph"


def end_with_parent() -> None:
    """Start a thread that ends this process once its parent has; nothing in the replica itself."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_wait, args=(parent,), name="end-with-parent", daemon=True).start()


def _wait(parent: multiprocessing.process.BaseProcess) -> None:
    parent.join()
    os.kill(os.getpid(), signal.SIGKILL)
