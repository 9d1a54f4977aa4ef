"""What vLLM loads as a plugin in each of its own processes: they end with whoever started them.

vLLM's processes wait for work and do not notice that the replica is gone: killed, it would
leave them behind with all their memory. A plugin is vLLM's own way in; nothing is patched.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from importlib.metadata import entry_points

from anamorph.errors import SetupError

NAME = "anamorph"
_GROUP = "vllm.general_plugins"


def check_installed() -> None:
    """Refuse an installation in which vLLM would not find this plugin: it only logs that, and starts.

    Raises:
        SetupError: says to install anamorph again.
    """
    wanted = f"{__name__}:{end_with_parent.__name__}"
    if wanted not in {found.value for found in entry_points(group=_GROUP, name=NAME)}:
        raise SetupError(
            "vLLM would not find the plugin that ends its processes with the replica: "
            "install anamorph again in this environment"
        )


def end_with_parent() -> None:
    """Start a thread that ends this process once its parent has; nothing in the replica itself."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_wait, args=(parent,), name="end-with-parent", daemon=True).start()


def _wait(parent: multiprocessing.process.BaseProcess) -> None:
    parent.join()
    os.kill(os.getpid(), signal.SIGKILL)
